package ktype

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// oracle is what testdata/oracle.c says of itself.
type oracle struct {
	sizes  map[string]uint64
	fields map[string][2]uint64 // offset, size
	bits   map[string][2]uint64 // first bit, width
	addrs  map[string]uint64
	mem    memory
}

// memory is a Memory of pieces, all of them readable.
type memory map[uint64][]byte

func (m memory) Read(addr uint64, b []byte) error {
	for start, data := range m {
		if off := addr - start; off < uint64(len(data)) && uint64(len(b)) <= uint64(len(data))-off {
			copy(b, data[off:])
			return nil
		}
	}
	return fmt.Errorf("no memory at %#x, %d bytes", addr, len(b))
}

// lack ends a test whose oracle isn't here.
func lack(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("VMPROBES_REQUIRE_ORACLES") == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// tool returns the path of a program, or skips the test.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		lack(t, "%s is not installed: no independent oracle", name)
	}
	return path
}

// compile returns an ELF file made from testdata/oracle.c.
func compile(t testing.TB, flags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "oracle")
	args := append([]string{"-O0", "-o", out, "testdata/oracle.c"}, flags...)
	msg, err := exec.Command(tool(t, "gcc"), args...).CombinedOutput()
	require.NoError(t, err, "gcc %v: %s", flags, msg)
	return out
}

// runOracle compiles and runs the program once.
func runOracle(t testing.TB) oracle {
	t.Helper()
	tool(t, "gcc")
	o, err := oracleOnce()
	require.NoError(t, err)
	return o
}

var oracleOnce = sync.OnceValues(func() (oracle, error) {
	dir, err := os.MkdirTemp("", "ktype")
	if err != nil {
		return oracle{}, err
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "oracle")
	if msg, err := exec.Command("gcc", "-o", bin, "testdata/oracle.c").CombinedOutput(); err != nil {
		return oracle{}, fmt.Errorf("gcc: %w: %s", err, msg)
	}
	out, err := exec.Command(bin).Output()
	if err != nil {
		return oracle{}, err
	}
	o := oracle{map[string]uint64{}, map[string][2]uint64{}, map[string][2]uint64{}, map[string]uint64{}, memory{}}
	sc := bufio.NewScanner(bytes.NewReader(out))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		kind, line, _ := strings.Cut(sc.Text(), " ")
		// Names may have a space, numbers don't.
		f := strings.Fields(line)
		num := func(i int) uint64 {
			n, e := strconv.ParseUint(f[i], 0, 64)
			if e != nil {
				err = e
			}
			return n
		}
		last := len(f) - 1
		switch kind {
		case "S":
			o.sizes[strings.Join(f[:last], " ")] = num(last)
		case "F":
			o.fields[strings.Join(f[:last-1], " ")] = [2]uint64{num(last - 1), num(last)}
		case "B":
			o.bits[strings.Join(f[:last-1], " ")] = [2]uint64{num(last - 1), num(last)}
		case "A":
			o.addrs[f[0]] = num(1)
		case "M":
			data, e := hex.DecodeString(f[1])
			if e != nil {
				err = e
			}
			o.mem[num(0)] = data
		}
	}
	if len(o.fields) < 60 || len(o.bits) < 10 || len(o.sizes) < 10 || len(o.mem) != 4 {
		err = fmt.Errorf("the program printed %d lines only", bytes.Count(out, []byte("\n")))
	}
	return o, err
})

// check compares types with what the C compiler has computed.
func (o oracle) check(t *testing.T, types *Types) {
	t.Helper()
	for name, want := range o.sizes {
		if types.Source() == "ISF" && !types.HasField(name) {
			continue // no typedefs there
		}
		got, err := types.Sizeof(name)
		if assert.NoError(t, err) {
			assert.Equal(t, want, got, name)
		}
	}
	for path, want := range o.fields {
		if types.Source() == "BTF" && strings.HasPrefix(path, "task.grid[") {
			continue // BTF of a[3][4] is that of a[12], see btf.rst
		}
		f, err := types.Offset(path)
		if assert.NoError(t, err) {
			assert.Equal(t, want, [2]uint64{f.Offset, f.Size}, path)
			assert.Zero(t, f.BitSize, path)
		}
	}
	for path, want := range o.bits {
		f, err := types.Offset(path)
		if !assert.NoError(t, err) {
			continue
		}
		assert.Equal(t, want[0], f.Offset*8+uint64(f.BitOffset), path)
		if want[1] == 64 && f.BitSize == 0 {
			continue // "unsigned long h : 64" is no bit-field to all
		}
		assert.Equal(t, want[1], uint64(f.BitSize), path)
	}
}

// variants are the ways to the types of testdata/oracle.c. Each is made once for
// all tests.
func variants(t *testing.T, f func(t *testing.T, types *Types)) {
	btf := func(t *testing.T) *Types {
		out := filepath.Join(t.TempDir(), "oracle.btf")
		msg, err := exec.Command(tool(t, "pahole"), "--btf_encode_detached="+out, compile(t, "-gdwarf-4")).CombinedOutput()
		require.NoError(t, err, "%s", msg)
		return parse(t, out, "BTF")
	}
	gbtf := func(t *testing.T) *Types {
		out := filepath.Join(t.TempDir(), "oracle.o")
		if msg, err := exec.Command(tool(t, "gcc"), "-gbtf", "-c", "-o", out, "testdata/oracle.c").CombinedOutput(); err != nil {
			lack(t, "gcc makes no BTF: %s", msg)
		}
		return parse(t, out, "BTF")
	}
	isf := func(t *testing.T) *Types {
		types, err := FromISF(bytes.NewReader(toISF(t, parse(t, compile(t, "-g"), "DWARF"))))
		require.NoError(t, err)
		require.Equal(t, "ISF", types.Source())
		return types
	}
	dwarf := func(flags ...string) func(t *testing.T) *Types {
		return func(t *testing.T) *Types { return parse(t, compile(t, flags...), "DWARF") }
	}
	for _, v := range []struct {
		name string
		make func(t *testing.T) *Types
	}{
		{"DWARF2", dwarf("-gdwarf-2")}, {"DWARF3", dwarf("-gdwarf-3")}, {"DWARF4", dwarf("-gdwarf-4")}, {"DWARF5", dwarf("-gdwarf-5")},
		{"types4", dwarf("-gdwarf-4", "-fdebug-types-section")}, {"types5", dwarf("-gdwarf-5", "-fdebug-types-section")},
		{"object", dwarf("-gdwarf-5", "-c")}, {"compressed", dwarf("-gdwarf-4", "-c", "-gz=zlib")},
		{"pahole", btf}, {"gcc-gbtf", gbtf}, {"ISF", isf},
	} {
		t.Run(v.name, func(t *testing.T) {
			made.Lock()
			defer made.Unlock()
			if made.types[v.name] == nil {
				made.types[v.name] = v.make(t)
			}
			f(t, made.types[v.name])
		})
	}
}

var made = struct {
	sync.Mutex
	types map[string]*Types
}{types: map[string]*Types{}}

func parse(t *testing.T, file, source string) *Types {
	t.Helper()
	types, err := ParseFile(file)
	require.NoError(t, err)
	require.Equal(t, source, types.Source())
	return types
}

func TestLayouts(t *testing.T) {
	t.Parallel()
	o := runOracle(t)
	variants(t, func(t *testing.T, types *Types) {
		o.check(t, types)
		assert.EqualValues(t, 8, types.PointerSize())
		typ, err := types.Type("task")
		require.NoError(t, err)
		var b bytes.Buffer
		require.NoError(t, types.Print(&b, "struct task"))
		assert.Contains(t, b.String(), "enum wide wide;")
		assert.Equal(t, KindStruct, typ.Kind())

		_, err = types.Offset("task.decl.x")
		assert.ErrorIs(t, err, ErrNoType, "a struct that is nowhere defined")
		_, err = types.Offset("task.parent.state")
		assert.ErrorIs(t, err, ErrPointer)
		assert.True(t, types.HasField("task.parent.parent.bits.k"))
		assert.False(t, types.HasField("task.parent.parent.bits.z"))

		if types.Source() != "ISF" {
			hook := types.must(t, "task.hook").Type
			assert.Equal(t, "int (*hook)(struct task *, const char *, ...)", hook.Decl("hook"))
			assert.Equal(t, "enum color color", types.must(t, "task.color").Type.Decl("color"))
			assert.Equal(t, "struct inner *ptrs[2]", types.must(t, "task.ptrs").Type.Decl("ptrs"))
		}
		for fn, want := range map[string]string{
			"func":    "int func(struct task *t, const char *name, u32 flags, enum color c, flag on, long int off, int (*cb)(void *))",
			"nothing": "void *nothing(void)",
			"printer": "int printer(const char *fmt, ...)",
		} {
			p, err := types.Prototype(fn)
			if types.Source() == "ISF" {
				assert.ErrorIs(t, err, ErrNoType)
			} else if assert.NoError(t, err) {
				assert.Equal(t, want, p.String())
			}
		}
		tasks, err := types.Variable("tasks")
		switch types.Source() {
		case "DWARF":
			require.NoError(t, err)
			assert.Equal(t, "struct task tasks[4]", tasks.Decl("tasks"))
		case "ISF":
			require.NoError(t, err)
			assert.Equal(t, "struct task", tasks.String())
		}
		_, err = types.Variable("no_such")
		assert.ErrorIs(t, err, ErrNoType)

		if strings.HasSuffix(t.Name(), "gcc-gbtf") {
			return // gcc 12 has no signs and no 64 bits of enums
		}
		wide, err := types.Enum("wide")
		require.NoError(t, err)
		assert.Equal(t, "WIDE", wide.Format(0x123456789abc))
		assert.Equal(t, "77", wide.Format(77))
		level, err := types.Enum("level")
		require.NoError(t, err)
		assert.Equal(t, "LOW", level.Format(0xfffffffe))
		assert.Equal(t, "-3", level.Format(0xfffffffd))
	})
}

// toISF writes the types of the oracle as dwarf2json would.
func toISF(t *testing.T, types *Types) []byte {
	t.Helper()
	users, enums, bases := map[string]any{}, map[string]any{}, map[string]any{"pointer": map[string]any{"size": 8, "kind": "int", "endian": "little"}}
	ids := map[*Type]string{}
	var ref func(u *Type) any
	id := func(u *Type) string {
		if u.name != "" {
			return u.name
		}
		if ids[u] == "" {
			ids[u] = fmt.Sprintf("unnamed_%d", len(ids))
		}
		return ids[u]
	}
	ref = func(u *Type) any {
		u = u.Underlying()
		switch u.Kind() {
		case KindVoid:
			bases["void"] = map[string]any{"size": 0, "kind": "void"}
			return map[string]any{"kind": "base", "name": "void"}
		case KindInt, KindFloat:
			kind := "int"
			if u.IsBool() {
				kind = "bool"
			}
			if u.Kind() == KindFloat {
				kind = "float"
			}
			bases[u.name] = map[string]any{"size": u.size, "kind": kind, "signed": u.Signed(), "endian": "little"}
			return map[string]any{"kind": "base", "name": u.name}
		case KindPointer:
			return map[string]any{"kind": "pointer", "subtype": ref(u.Elem())}
		case KindArray:
			return map[string]any{"kind": "array", "count": u.Len(), "subtype": ref(u.Elem())}
		case KindEnum:
			if enums[u.name] == nil {
				base := "unsigned"
				if u.Signed() {
					base = "signed"
				}
				bases[base] = map[string]any{"size": u.size, "kind": "int", "signed": u.Signed()}
				values := map[string]any{}
				for _, v := range u.Values() {
					values[v.Name] = v.Value
				}
				enums[u.name] = map[string]any{"size": u.size, "base": base, "constants": values}
			}
			return map[string]any{"kind": "enum", "name": u.name}
		case KindStruct, KindUnion:
			name := id(u)
			if users[name] == nil {
				fields := map[string]any{}
				users[name] = map[string]any{"kind": u.Kind().String(), "size": u.size, "fields": fields}
				n := 0
				for fn, f := range u.Fields() {
					field := map[string]any{"offset": f.Offset, "type": ref(f.Type)}
					if f.BitSize > 0 {
						size, _ := f.Type.Size()
						bit := f.Offset*8 + uint64(f.BitOffset)
						unit := bit / 8 / size * size
						field["offset"] = unit
						field["type"] = map[string]any{"kind": "bitfield", "bit_length": f.BitSize, "bit_position": bit - unit*8, "type": ref(f.Type)}
					}
					if fn == "" {
						fn = fmt.Sprintf("unnamed_field_%d", n)
						n++
						field["anonymous"] = true
					}
					fields[fn] = field
				}
			}
			return map[string]any{"kind": u.Kind().String(), "name": name}
		case KindForward:
			return map[string]any{"kind": "struct", "name": u.name}
		}
		return map[string]any{"kind": "function"}
	}
	for _, name := range []string{"task", "flex", "packed", "hlist_head"} {
		typ, err := types.Type(name)
		require.NoError(t, err)
		ref(typ)
	}
	symbols := map[string]any{"tasks": map[string]any{"address": 4096, "type": map[string]any{"kind": "struct", "name": "task"}},
		"nothing": map[string]any{"address": 1}}
	data, err := json.Marshal(map[string]any{"metadata": map[string]any{"format": "6.2.0"},
		"user_types": users, "enums": enums, "base_types": bases, "symbols": symbols})
	require.NoError(t, err)
	return data
}

// An i386 kernel has pointers and longs of 4 bytes, and 8-byte members at
// multiples of 4. The answers are read from the object file, as nothing here can
// be sure to run it.
func TestLayouts32(t *testing.T) {
	t.Parallel()
	const source = `
typedef unsigned long long u64;
struct list_head { struct list_head *next, *prev; };
struct t { char c; u64 wide; long l; void *p; struct list_head node; struct t *parent; unsigned b : 3; u64 last; };
extern unsigned long jiffies;
struct t t;
const unsigned answers[] __attribute__((section(".answers"), used)) = {
	sizeof(struct t), __builtin_offsetof(struct t, wide), __builtin_offsetof(struct t, l),
	__builtin_offsetof(struct t, p), __builtin_offsetof(struct t, node.prev),
	__builtin_offsetof(struct t, parent), __builtin_offsetof(struct t, last) };
`
	dir := t.TempDir()
	obj, btf := filepath.Join(dir, "t.o"), filepath.Join(dir, "t.btf")
	cmd := exec.Command(tool(t, "gcc"), "-m32", "-march=i686", "-ffreestanding", "-g", "-c", "-x", "c", "-o", obj, "-")
	cmd.Stdin = strings.NewReader(source)
	if msg, err := cmd.CombinedOutput(); err != nil {
		lack(t, "gcc makes no i386 code: %s", msg)
	}
	f, err := elf.Open(obj)
	require.NoError(t, err)
	defer f.Close()
	raw, err := f.Section(".answers").Data()
	require.NoError(t, err)
	answers := make([]uint64, len(raw)/4)
	for i := range answers {
		answers[i] = uint64(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	check := func(t *testing.T, types *Types, err error) {
		require.NoError(t, err)
		assert.EqualValues(t, 4, types.PointerSize())
		size, err := types.Sizeof("t")
		require.NoError(t, err)
		got := []uint64{size}
		for _, m := range []string{"wide", "l", "p", "node.prev", "parent", "last"} {
			f, err := types.Offset("t." + m)
			require.NoError(t, err)
			got = append(got, f.Offset)
		}
		assert.Equal(t, answers, got)
		p, err := types.Offset("t.parent")
		require.NoError(t, err)
		assert.EqualValues(t, 4, p.Size)
	}
	t.Run("DWARF", func(t *testing.T) {
		types, err := ParseFile(obj)
		check(t, types, err)
	})
	t.Run("BTF", func(t *testing.T) {
		msg, err := exec.Command(tool(t, "pahole"), "--btf_encode_detached="+btf, obj).CombinedOutput()
		require.NoError(t, err, "%s", msg)
		types, err := ParseFile(btf)
		check(t, types, err)
	})
}
