package ktype

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/dwarf"
	"debug/elf"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/ulikunitz/xz"
)

// rawType is a BTF record: name, info and size or type, then what follows.
func rawType(name, kind, vlen int, sizeType uint32, more ...uint32) []uint32 {
	return append([]uint32{uint32(name), uint32(kind)<<24 | uint32(vlen), sizeType}, more...)
}

// blob makes BTF of records and strings.
func blob(strs string, recs ...[]uint32) []byte {
	var types bytes.Buffer
	for _, r := range recs {
		binary.Write(&types, binary.LittleEndian, r)
	}
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, []uint32{1<<16 | btfMagic, btfHeaderLen, 0, uint32(types.Len()), uint32(types.Len()), uint32(len(strs))})
	b.Write(types.Bytes())
	b.WriteString(strs)
	return b.Bytes()
}

func fromBTF(data []byte) (*Types, error) { return FromBTF(bytes.NewReader(data), int64(len(data))) }

// What a compiler doesn't make, but a guest may.
func TestHostileBTF(t *testing.T) {
	t.Parallel()
	const strs = "\x00s\x00m\x00n\x00"
	const s, m, n = 1, 3, 5
	intType := rawType(n, btfInt, 0, 4, 32)
	for name, c := range map[string]struct {
		data []byte
		path string
		want error
	}{
		"empty":             {nil, "s.m", ErrFormat},
		"short header":      {[]byte{0x9f, 0xeb, 1, 0}, "s.m", ErrFormat},
		"big-endian":        {[]byte{0xeb, 0x9f, 1, 0, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, "s.m", ErrFormat},
		"cut":               {blob(strs, intType, rawType(s, btfStruct, 9, 4, m, 1, 0)), "s.m", ErrFormat},
		"unknown kind":      {blob(strs, rawType(s, 31, 0, 4)), "s.m", ErrFormat},
		"kind 0":            {blob(strs, rawType(s, 0, 0, 4)), "s.m", ErrFormat},
		"type out of range": {blob(strs, rawType(s, btfStruct, 1, 4, m, 99, 0)), "s.m", ErrFormat},
		"name out of range": {blob(strs, intType, rawType(s, btfStruct, 1, 4, 999, 1, 0)), "s.m", ErrFormat},
		"no NUL":            {blob(strs+"x", intType, rawType(s, btfStruct, 1, 4, m, 1, 0)), "s.m", ErrFormat},
		"long name":         {blob(strs+strings.Repeat("x", maxName+1)+"\x00", intType, rawType(s, btfStruct, 1, 4, m, 1, 0)), "s.m", ErrFormat},
		"beyond the struct": {blob(strs, intType, rawType(s, btfStruct, 1, 4, m, 1, 8)), "s.m", ErrFormat},
		"contains itself":   {blob(strs, rawType(s, btfStruct, 1, 4, m, 1, 0)), "s.m.m.m.m.m.n", ErrNoField},
		"anonymous itself":  {blob(strs, rawType(s, btfStruct, 1, 4, 0, 1, 0)), "s.m", ErrFormat},
		"typedef circle":    {blob(strs, rawType(s, btfTypedef, 0, 2), rawType(n, btfTypedef, 0, 1)), "s.m", ErrKind},
		"pointer circle":    {blob(strs, rawType(0, btfPointer, 0, 1), rawType(s, btfStruct, 1, 8, m, 1, 0)), "s.m[0][0][0].x", ErrKind},
		"huge array":        {blob(strs, intType, rawType(0, btfArray, 0, 0, 1, 1, 1<<31), rawType(0, btfArray, 0, 0, 2, 1, 1<<31), rawType(s, btfStruct, 1, 4, m, 3, 0)), "s.m", ErrFormat},
		"array circle":      {blob(strs, intType, rawType(0, btfArray, 0, 0, 2, 1, 1), rawType(s, btfStruct, 1, 4, m, 2, 0)), "s.m", ErrFormat},
		"tag of nothing":    {blob(strs, intType, rawType(s, btfStruct, 1, 4, m, 1, 0), rawType(n, btfDeclTag, 0, 2, 77)), "s.m", ErrFormat},
		"member is void":    {blob(strs, rawType(s, btfStruct, 1, 4, m, 0, 0)), "s.m.x", ErrKind},
		"member is func":    {blob(strs, rawType(0, btfFuncProto, 0, 0), rawType(s, btfStruct, 1, 4, m, 1, 0)), "s.m.x", ErrKind},
		"wide bit-field":    {blob(strs, intType, rawType(s, 1<<7|btfStruct, 1, 64, m, 1, 200<<24)), "s.m", ErrFormat},
		"odd bit":           {blob(strs, intType, rawType(s, btfStruct, 1, 64, m, 1, 3)), "s.m", ErrFormat},
		"int of 255 bytes":  {blob(strs, rawType(n, btfInt, 0, 255, 255), rawType(s, btfStruct, 1, 4, m, 1, 0)), "s.m", ErrFormat},
	} {
		types, err := fromBTF(c.data)
		if err == nil {
			_, err = types.Offset(c.path)
			types.Type("s")
			types.Print(io.Discard, "s")
			types.At(&fixed{}, "s", 8).Field("m").Uint()
		}
		assert.ErrorIs(t, err, c.want, name)
	}
	_, err := FromBTF(bytes.NewReader(nil), maxBTF+1)
	assert.ErrorIs(t, err, ErrFormat)
	_, err = FromBTF(bytes.NewReader(nil), -1)
	assert.ErrorIs(t, err, ErrFormat)
}

const btfPointer = 2

// Package btf would use a stack of 5 KB for each of these, until Go ends the
// program.
func TestHostileDepth(t *testing.T) {
	t.Parallel()
	chain := func(n int) []byte {
		recs := [][]uint32{rawType(1, btfStruct, 1, 8, 1, 2, 0)}
		for i := range n {
			recs = append(recs, rawType(0, btfPointer, 0, uint32(i+3)))
		}
		return blob("\x00s\x00", append(recs, rawType(1, btfInt, 0, 4, 32))...)
	}
	types, err := fromBTF(chain(maxInflate - 10))
	require.NoError(t, err)
	_, err = types.Offset("s.s")
	require.NoError(t, err)
	types, err = fromBTF(chain(500_000))
	require.NoError(t, err)
	_, err = types.Offset("s.s")
	require.ErrorIs(t, err, ErrFormat)
	_, err = types.Offset("s.s")
	require.ErrorIs(t, err, ErrFormat, "and it stays so")

	// Modules whose types are refused leave no trace in what is counted of the
	// kernel's.
	str := len(types.src.(*btfSource).sheet.strings)
	for id := uint32(2); id < 500_000; id += maxInflate - 100 {
		with, err := types.WithModule("m", blob("m\x00", rawType(str, btfStruct, 1, 8, uint32(str), id, 0)))
		require.NoError(t, err)
		assert.Equal(t, id+maxInflate > 500_000, with.HasField("m.m"))
	}
	_, err = types.Offset("s.s")
	require.ErrorIs(t, err, ErrFormat)
}

// Names are copied for every member, so that 12 bytes can take 2 KB.
func TestHostileNames(t *testing.T) {
	t.Parallel()
	strs := "\x00s\x00" + strings.Repeat("x", maxName-1) + "\x00"
	const vlen = maxNames/maxName + 1000
	var members []uint32
	for range vlen {
		members = append(members, 3, 1, 0)
	}
	types, err := fromBTF(blob(strs, rawType(1, btfInt, 0, 4, 32), rawType(1, btfStruct, vlen, 4, members...)))
	require.NoError(t, err)
	_, err = types.Offset("s.m")
	assert.ErrorContains(t, err, "bytes of names")
}

// Anonymous members of anonymous members double at each level.
func TestHostileAnonymous(t *testing.T) {
	t.Parallel()
	var recs [][]uint32
	recs = append(recs, rawType(1, btfInt, 0, 4, 32))
	for i := range 30 {
		id := uint32(i + 1)
		name := 0
		if i == 29 {
			name = 1
		}
		recs = append(recs, rawType(name, btfUnion, 2, 4, 0, id, 0, 0, id, 0))
	}
	types, err := fromBTF(blob("\x00s\x00", recs...))
	require.NoError(t, err)
	_, err = types.Offset("s.nothing")
	assert.ErrorIs(t, err, ErrFormat)
	assert.ErrorIs(t, types.Print(io.Discard, "s"), ErrFormat)

	// Functions whose parameters are functions grow in the same way.
	recs = [][]uint32{rawType(1, btfInt, 0, 4, 32)}
	for i := range 30 {
		id := uint32(i + 1)
		recs = append(recs, rawType(0, btfFuncProto, 3, 0, 0, id, 0, id, 0, id))
	}
	recs = append(recs, rawType(1, btfFunc, 0, 31), rawType(1, btfStruct, 1, 8, 1, 33, 0), rawType(0, btfPointer, 0, 31))
	types, err = fromBTF(blob("\x00s\x00", recs...))
	require.NoError(t, err)
	p, err := types.Prototype("s")
	require.NoError(t, err)
	assert.Less(t, len(p.String()), 100*maxDecl)
	require.NoError(t, types.Print(io.Discard, "s"))
}

// buildBTF makes BTF without a compiler, by package btf.
func buildBTF(t testing.TB) []byte {
	t.Helper()
	char := &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}
	u32 := &btf.Int{Name: "unsigned int", Size: 4}
	s32 := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	boolean := &btf.Int{Name: "_Bool", Size: 1, Encoding: btf.Bool}
	list := &btf.Struct{Name: "list_head", Size: 16}
	list.Members = []btf.Member{{Name: "next", Type: &btf.Pointer{Target: list}}, {Name: "prev", Type: &btf.Pointer{Target: list}, Offset: 64}}
	kind := &btf.Enum{Name: "kind", Size: 4, Signed: true, Values: []btf.EnumValue{{Name: "ONE", Value: 1}, {Name: "LESS", Value: ^uint64(0)}}}
	task := &btf.Struct{Name: "task", Size: 80}
	task.Members = []btf.Member{
		{Name: "pid", Type: &btf.Const{Type: s32}},
		{Type: &btf.Union{Size: 4, Members: []btf.Member{{Name: "a", Type: u32}, {Name: "kind", Type: kind}}}, Offset: 32},
		{Name: "comm", Type: &btf.Array{Index: u32, Type: char, Nelems: 16}, Offset: 64},
		{Name: "b1", Type: u32, Offset: 192, BitfieldSize: 3},
		{Name: "b2", Type: s32, Offset: 195, BitfieldSize: 20},
		{Name: "parent", Type: &btf.Pointer{Target: task}, Offset: 256},
		{Name: "node", Type: list, Offset: 320},
		{Name: "on", Type: &btf.Typedef{Name: "bool", Type: boolean}, Offset: 448},
		{Name: "name", Type: &btf.Pointer{Target: &btf.TypeTag{Value: "user", Type: &btf.Const{Type: char}}}, Offset: 512},
		{Name: "fwd", Type: &btf.Pointer{Target: &btf.Fwd{Name: "list_head"}}, Offset: 576},
	}
	proto := &btf.FuncProto{Return: s32, Params: []btf.FuncParam{{Name: "t", Type: &btf.Pointer{Target: task}}, {Name: "k", Type: kind},
		{Name: "on", Type: boolean}, {Name: "name", Type: &btf.Pointer{Target: &btf.Const{Type: char}}},
		{Name: "cb", Type: &btf.Pointer{Target: &btf.FuncProto{Return: (*btf.Void)(nil), Params: []btf.FuncParam{{Type: &btf.Pointer{Target: (*btf.Void)(nil)}}}}}},
		{Type: (*btf.Void)(nil)}}}
	fn := &btf.Func{Name: "do_it", Type: proto, Linkage: btf.GlobalFunc}
	other := &btf.Struct{Name: "twice", Size: 4, Members: []btf.Member{{Name: "same", Type: u32}}}
	second := &btf.Struct{Name: "twice", Size: 8, Members: []btf.Member{{Name: "same", Type: u32}, {Name: "only", Type: u32, Offset: 32}}}
	third := &btf.Struct{Name: "flavor___v2", Size: 4, Members: []btf.Member{{Name: "x", Type: u32}}}
	v := &btf.Var{Name: "current", Type: &btf.Pointer{Target: task}, Linkage: btf.GlobalVar}
	long := &btf.Int{Name: "long unsigned int", Size: 8}
	b, err := btf.NewBuilder([]btf.Type{task, fn, other, second, third, v, long}, nil)
	require.NoError(t, err)
	data, err := b.Marshal(nil, nil)
	require.NoError(t, err)
	return data
}

func TestBTF(t *testing.T) {
	t.Parallel()
	types, err := fromBTF(buildBTF(t))
	require.NoError(t, err)
	assert.Equal(t, "BTF", types.Source())
	for path, want := range map[string]Field{
		"task.pid": {Offset: 0, Size: 4}, "task.a": {Offset: 4, Size: 4}, "task.kind": {Offset: 4, Size: 4},
		"task.comm": {Offset: 8, Size: 16}, "task.comm[3]": {Offset: 11, Size: 1}, "task.b1": {Offset: 24, Size: 1, BitSize: 3},
		"task.b2": {Offset: 24, Size: 3, BitOffset: 3, BitSize: 20}, "struct task.node.prev": {Offset: 48, Size: 8},
		"twice.same": {Offset: 0, Size: 4}, "twice.only": {Offset: 4, Size: 4}, "flavor___v2.x": {Offset: 0, Size: 4}, "task": {Size: 80},
		"enum kind": {Size: 4}, "bool": {Size: 1},
	} {
		f, err := types.Offset(path)
		require.NoError(t, err)
		assert.True(t, want.same(f), "%s: %+v", path, f)
	}
	for path, want := range map[string]error{
		"nope": ErrNoType, "flavor.x": ErrNoType, "task.nope": ErrNoField, "twice": ErrAmbiguous, "union task": ErrNoType,
		"twice.nope": ErrNoField, "task.parent.pid": ErrPointer, "task.pid.x": ErrKind, "task..pid": ErrPath, "task.comm[": ErrPath,
		"task.comm[x]": ErrPath, "task.comm[-1]": ErrPath, "task.comm[4294967296]": ErrPath, "task.comm]": ErrPath, "": ErrNoType, ".x": ErrNoType,
		"xfs:task.pid": ErrNoType, "task.comm[16]": ErrRange, "task." + strings.Repeat("parent.", 40) + "pid": ErrPath,
		"task." + strings.Repeat("x", 2000): ErrPath,
	} {
		_, err := types.Offset(path)
		assert.ErrorIs(t, err, want, path)
		assert.Less(t, len(fmt.Sprint(err)), 1000)
	}
	_, err = types.Sizeof("twice")
	assert.ErrorIs(t, err, ErrAmbiguous)
	_, err = types.Offset("task.com")
	assert.ErrorContains(t, err, "(near: comm)")
	_, err = types.Offset("tasks.comm")
	assert.ErrorContains(t, err, "(near: task)")
	assert.True(t, types.HasField("task.fwd.next.prev"), "a declaration finds its definition")

	p, err := types.Prototype("do_it")
	require.NoError(t, err)
	assert.Equal(t, "int do_it(struct task *t, enum kind k, _Bool on, const char *name, void (*cb)(void *), ...)", p.String())
	assert.True(t, p.Variadic)
	require.Len(t, p.Params, 5)
	assert.Equal(t, "LESS", p.Params[1].Format(0xdead_ffffffff))
	assert.Equal(t, "7", p.Params[1].Format(7))
	assert.Equal(t, "true", p.Params[2].Format(0x100_00000001))
	assert.Equal(t, "NULL", p.Params[0].Format(0))
	assert.Equal(t, "0xffff888000001000", p.Params[0].Format(0xffff888000001000))
	assert.True(t, p.Params[3].Type.IsString())
	assert.False(t, p.Params[0].Type.IsString())
	assert.Equal(t, "-2", p.Return.Format(0xfffffffe))
	_, err = types.Prototype("nope")
	assert.ErrorIs(t, err, ErrNoType)
	v, err := types.Variable("current")
	require.NoError(t, err)
	assert.Equal(t, "struct task *", v.String())
	_, err = types.Enum("task")
	assert.ErrorIs(t, err, ErrKind)

	var b strings.Builder
	require.NoError(t, types.Print(&b, "task"))
	want := `struct task {
	const int pid;                               /*     0     4 */
	union {
		unsigned int a;                              /*     4     4 */
		enum kind kind;                              /*     4     4 */
	}; /*     4     4 */
	char comm[16];                               /*     8    16 */
	unsigned int b1:3;                           /*    24:0     1 */
	int b2:20;                                   /*    24:3     3 */
	struct task *parent;                         /*    32     8 */
	struct list_head node;                       /*    40    16 */
	bool on;                                     /*    56     1 */
	const char *name;                            /*    64     8 */
	struct list_head *fwd;                       /*    72     8 */
}; /* size: 80 */
`
	assert.Equal(t, want, b.String())
}

// Split BTF, by the kernel's rules: IDs and string offsets go on after the base.
func TestModules(t *testing.T) {
	t.Parallel()
	base := buildBTF(t)
	types, err := fromBTF(base)
	require.NoError(t, err)
	sheet := types.src.(*btfSource).sheet
	var task uint32
	for id := range sheet.named("task", []int{btfStruct}) {
		task = id
	}
	next, str := sheet.end(), len(sheet.strings)
	mod := blob("priv\x00t\x00", rawType(str, btfStruct, 1, 8, uint32(str)+5, next+1, 0), rawType(0, btfPointer, 0, task))
	with, err := types.WithModule("mod", mod)
	require.NoError(t, err)
	assert.True(t, with.HasField("priv.t.comm"))
	assert.True(t, with.HasField("mod:priv.t.comm"))
	assert.True(t, with.HasField("task.comm"))
	assert.False(t, with.HasField("mod:task.comm"))
	assert.False(t, types.HasField("priv.t"), "the kernel's own are as before")
	_, err = types.WithModule("mod", mod[:40])
	assert.ErrorIs(t, err, ErrFormat)
	_, err = types.WithModule("mod", make([]byte, maxBTF+1))
	assert.ErrorIs(t, err, ErrFormat)
	given, err := New("x", 8)
	require.NoError(t, err)
	_, err = given.WithModule("mod", mod)
	assert.Error(t, err)
}

// Run with -race: decoding is lazy, and shared between a kernel and its modules.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	types, err := fromBTF(buildBTF(t))
	require.NoError(t, err)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for _, path := range []string{"task.parent.parent.node.next.prev", "task.kind", "twice.same", "list_head.next"} {
				assert.True(t, types.HasField(path))
			}
			sheet := types.src.(*btfSource).sheet
			mod := blob("p\x00", rawType(len(sheet.strings), btfStruct, 1, 8, uint32(len(sheet.strings)), 1, 0))
			with, err := types.WithModule("m", mod)
			assert.NoError(t, err)
			with.HasField("p.p")
			types.Prototype("do_it")
			var d struct {
				Pid int `ktype:"pid"`
			}
			assert.NoError(t, types.Decode(&fixed{}, "task", 0, &d))
		})
	}
	wg.Wait()
}

// Several types of a name do no harm where they are the same.
func TestDuplicates(t *testing.T) {
	t.Parallel()
	twin := rawType(3, btfStruct, 2, 8, 1, 1, 0, 5, 1, 32)
	types, err := fromBTF(blob("\x00a\x00t\x00b\x00", rawType(1, btfInt, 0, 4, 32), twin, twin))
	require.NoError(t, err)
	f, err := types.Offset("t.b")
	require.NoError(t, err)
	assert.EqualValues(t, 4, f.Offset)
	size, err := types.Sizeof("t")
	require.NoError(t, err)
	assert.EqualValues(t, 8, size)

	moved := rawType(3, btfStruct, 2, 8, 1, 1, 0, 5, 1, 0)
	types, err = fromBTF(blob("\x00a\x00t\x00b\x00", rawType(1, btfInt, 0, 4, 32), twin, moved))
	require.NoError(t, err)
	assert.True(t, types.HasField("t.a"), "the same in both")
	_, err = types.Offset("t.b")
	assert.ErrorIs(t, err, ErrAmbiguous)

	many := [][]uint32{rawType(1, btfInt, 0, 4, 32)}
	for range maxSameName + 1 {
		many = append(many, twin)
	}
	types, err = fromBTF(blob("\x00a\x00t\x00b\x00", many...))
	require.NoError(t, err)
	_, err = types.Offset("t.b")
	assert.ErrorIs(t, err, ErrFormat)
	assert.True(t, types.HasField("a"), "that is no reason to refuse the others")
}

func TestNew(t *testing.T) {
	t.Parallel()
	types, err := New("inferred", 8,
		Struct{"task_struct", 0, []StructField{{"tasks", 0x890, "struct list_head"}, {"pid", 0x970, "int"}, {"comm", 0xba0, "char[16]"},
			{"real_parent", 0x980, "task_struct *"}, {"mm", 0x8e0, "struct mm_struct*"}, {"grid", 0, "u16 [2][ 3 ]"}, {"pp", 8, "void * *"}}},
		Struct{"list_head", 16, []StructField{{"next", 0, "list_head *"}, {"prev", 8, "list_head *"}}})
	require.NoError(t, err)
	assert.Equal(t, "inferred", types.Source())
	for path, want := range map[string][2]uint64{"task_struct.comm": {0xba0, 16}, "task_struct": {0, 0xbb0}, "task_struct.tasks.prev": {0x898, 8},
		"task_struct.grid[1][2]": {10, 2}, "u64": {0, 8}} {
		f, err := types.Offset(path)
		require.NoError(t, err)
		assert.Equal(t, want, [2]uint64{f.Offset, f.Size}, path)
	}
	assert.True(t, types.HasField("task_struct.real_parent.real_parent.pid"))
	_, err = types.Offset("task_struct.mm.pgd")
	assert.ErrorIs(t, err, ErrNoType)
	assert.Equal(t, "void **", types.must(t, "task_struct.pp").Type.String())
	for name, st := range map[string]Struct{
		"no name": {}, "name": {Name: "a b"}, "type": {"s", 0, []StructField{{"f", 0, "what ever"}}}, "beyond": {"s", 4, []StructField{{"f", 4, "int"}}},
		"offset": {"s", 0, []StructField{{"f", 1 << 62, "int"}}}, "array": {"s", 0, []StructField{{"f", 0, "int[x]"}}},
		"brackets": {"s", 0, []StructField{{"f", 0, "int]3["}}}, "huge": {"s", 0, []StructField{{"f", 0, "u64[4000000000][4000000000]"}}},
		"unknown": {"s", 0, []StructField{{"f", 0, "struct other"}}}, "field": {"s", 0, []StructField{{"", 0, "int"}}}, "size": {"s", 1 << 63, nil},
	} {
		_, err := New("x", 8, st)
		assert.Error(t, err, name)
	}
	_, err = New("x", 5)
	assert.ErrorIs(t, err, ErrFormat)
	_, err = New("x", 8, Struct{Name: "a"}, Struct{Name: "a"})
	assert.ErrorIs(t, err, ErrFormat)
}

func TestParseFile(t *testing.T) {
	t.Parallel()
	raw := buildBTF(t)
	isf := []byte(`{"metadata":{},"base_types":{"pointer":{"size":8,"kind":"int","endian":"little"},"int":{"size":4,"signed":true,"kind":"int"}},
		"user_types":{"task":{"kind":"struct","size":8,"fields":{"pid":{"offset":4,"type":{"kind":"base","name":"int"}}}}},"enums":{},"symbols":{}}`)
	pack := func(data []byte, make func(io.Writer) (io.WriteCloser, error)) []byte {
		var b bytes.Buffer
		w, err := make(&b)
		require.NoError(t, err)
		_, err = w.Write(data)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		return b.Bytes()
	}
	gz := func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }
	xzw := func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }
	zst := func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }
	var archive bytes.Buffer
	tw := tar.NewWriter(&archive)
	require.NoError(t, tw.WriteHeader(&tar.Header{Name: "dir", Typeflag: tar.TypeDir}))
	require.NoError(t, tw.WriteHeader(&tar.Header{Name: "5.4.btf", Size: int64(len(raw)), Typeflag: tar.TypeReg}))
	_, err := tw.Write(raw)
	require.NoError(t, err)
	require.NoError(t, tw.Close())

	// A file with task.pid, packed by bzip2, for which Go has no packer.
	isfBzip2, err := base64.StdEncoding.DecodeString("QlpoOTFBWSZTWcobvFYAAILbgCAAEARn0AAAv6/eejAAtMGppoelT01NPTJGgYRiJ5FAANABoNBKCT0oz1QeoANGm1IweHuO5grBFVV2ZkaBimIrQgISgJLgACSgaQpeiQWqYvil52QKrB6JZLXJEZIZuc4YVff3oKwH3eQDH0umvlv7uITiemFIEYvXiO56sp1AkAaUBw44thew8hGrIPPOqOQb8TKXoZFuGwHoxbV7ulFvM+rRgdRtsVSEqaKAsKiqaN/F3JFOFCQyhu8VgA==")
	require.NoError(t, err)

	dir := t.TempDir()
	try := func(data []byte) (*Types, error) {
		file := filepath.Join(dir, "file")
		require.NoError(t, os.WriteFile(file, data, 0o600))
		return ParseFile(file)
	}
	for name, c := range map[string]struct {
		data   []byte
		source string
	}{
		"btf": {raw, "BTF"}, "btf.gz": {pack(raw, gz), "BTF"}, "btf.xz": {pack(raw, xzw), "BTF"}, "btf.zst": {pack(raw, zst), "BTF"},
		"btf.tar.xz": {pack(archive.Bytes(), xzw), "BTF"}, "btf.tar": {archive.Bytes(), "BTF"},
		"json": {isf, "ISF"}, "json.gz": {pack(isf, gz), "ISF"}, "json.xz": {pack(isf, xzw), "ISF"}, "json.zst": {pack(isf, zst), "ISF"}, "json.bz2": {isfBzip2, "ISF"},
	} {
		types, err := try(c.data)
		require.NoError(t, err, name)
		assert.Equal(t, c.source, types.Source())
		assert.True(t, types.HasField("task.pid"))
	}
	for name, data := range map[string][]byte{
		"empty": nil, "text": []byte("ffffffff81000000 T _text\n"), "vmlinuz": []byte("MZ\x90\x00"), "elf": []byte("\x7fELF\x02"),
		"cut gz": pack(raw, gz)[:100], "cut xz": pack(raw, xzw)[:100], "cut zst": pack(raw, zst)[:50], "cut json": isf[:100],
		"no types": []byte("{}"), "array": []byte("[]"), "wrong": []byte(`{"user_types": 3}`), "cut tar": archive.Bytes()[:1200],
		"tar of tar": append(append([]byte{}, archive.Bytes()[:512]...), archive.Bytes()...),
		"pointers":   []byte(`{"user_types":{"a":{}},"base_types":{"pointer":{"size":3}}}`),
	} {
		_, err := try(data)
		if name == "tar of tar" {
			continue // whatever it is, it ends
		}
		assert.ErrorIs(t, err, ErrFormat, name)
		assert.ErrorContains(t, err, filepath.Join(dir, "file"), name)
	}
	_, err = ParseFile(filepath.Join(dir, "none"))
	assert.ErrorIs(t, err, os.ErrNotExist)
	_, err = ParseFile(dir)
	assert.Error(t, err)

	// A bomb.
	_, _, err = unpack(bytes.NewReader([]byte{0x1f, 0x8b}), 10)
	assert.ErrorIs(t, err, ErrFormat)
	r, free, err := unpack(bytes.NewReader(pack(make([]byte, 1<<16), gz)), 1000)
	require.NoError(t, err)
	defer free()
	n, err := io.Copy(io.Discard, r)
	assert.ErrorIs(t, err, ErrFormat)
	assert.LessOrEqual(t, n, int64(1001))
}

// ISF files that lack something: the rest can be used, and the error names what is
// lacking.
func TestISFLacks(t *testing.T) {
	t.Parallel()
	types, err := FromISF(strings.NewReader(`{"user_types": {"task_struct": {"size": 9000, "kind": "struct", "fields": {
		"pid": {"type": {"kind": "base", "name": "int"}, "offset": 2464},
		"all": {"type": {"kind": "array", "count": 2, "subtype": {"kind": "base", "name": "int"}}, "offset": 2472},
		"bit": {"type": {"kind": "bitfield", "bit_position": 1, "bit_length": 2, "type": {"kind": "base", "name": "int"}}, "offset": 2480},
		"state": {"type": {"kind": "enum", "name": "states"}, "offset": 2484},
		"ref": {"type": {"kind": "reference"}, "offset": 2488},
		"to": {"type": {"kind": "pointer", "subtype": {"kind": "base", "name": "int"}}, "offset": 0},
		"self": {"type": {"kind": "pointer", "subtype": {"kind": "struct", "name": "task_struct"}}, "offset": 8}}}}}`))
	require.NoError(t, err)
	f, err := types.Offset("task_struct.self")
	require.NoError(t, err)
	assert.EqualValues(t, 8, f.Offset)
	assert.True(t, types.HasField("task_struct.to"))
	for field, why := range map[string]string{
		"pid": `base type "int" is not among`, "all": `base type "int" is not among`, "all[1]": `base type "int" is not among`,
		"bit": `base type "int" is not among`, "state": `enum "states" is not among`, "ref": `type of kind "reference"`, "to[1]": `base type "int" is not among`,
	} {
		_, err := types.At(&fixed{}, "task_struct", 0).Field(field).Uint()
		require.ErrorIs(t, err, ErrFormat, field)
		assert.ErrorContains(t, err, why, field)
	}
	use(types)
}

func TestDistance(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"", "ab", 2}, {"kitten", "sitting", 3}, {"comm", "com", 1}, {"flaw", "lawn", 2}} {
		assert.Equal(t, c.want, distance(c.a, c.b))
		assert.Equal(t, c.want, distance(c.b, c.a))
	}
}

// Damaged debug information: whatever the bytes are, there is an end, an error or
// an answer.
func TestHostileDWARF(t *testing.T) {
	t.Parallel()
	for _, flags := range [][]string{{"-gdwarf-3"}, {"-gdwarf-5"}, {"-gdwarf-5", "-fdebug-types-section"}, {"-gdwarf-4", "-fdebug-types-section"}} {
		data, err := os.ReadFile(compile(t, flags...))
		require.NoError(t, err)
		f, err := elf.NewFile(bytes.NewReader(data))
		require.NoError(t, err)
		rnd := rand.New(rand.NewPCG(1, 2))
		good := 0
		for range 300 {
			bad := bytes.Clone(data)
			for range 1 + rnd.IntN(8) {
				sec := f.Section([]string{".debug_info", ".debug_abbrev"}[rnd.IntN(2)])
				bad[sec.Offset+rnd.Uint64N(sec.Size)] = byte(rnd.UintN(256))
			}
			types, err := FromELF(bytes.NewReader(bad))
			if err != nil {
				continue
			}
			use(types)
			if types.HasField("task.parent.comm") {
				good++
			}
		}
		assert.Positive(t, good)
	}
}

// The types of a file with split DWARF are elsewhere: that is said.
func TestSplitDWARF(t *testing.T) {
	t.Parallel()
	for _, flags := range [][]string{{"-gdwarf-4", "-gsplit-dwarf"}, {"-gdwarf-5", "-gsplit-dwarf"}} {
		file := compile(t, flags...)
		types, err := ParseFile(file)
		require.NoError(t, err)
		_, err = types.Offset("task.pid")
		require.ErrorIs(t, err, ErrFormat)
		assert.ErrorContains(t, err, "whose DWARF is split")
		dwo, err := filepath.Glob(filepath.Join(filepath.Dir(file), "*.dwo"))
		require.NoError(t, err)
		require.Len(t, dwo, 1)
		_, err = ParseFile(dwo[0])
		require.ErrorIs(t, err, ErrFormat)
		assert.ErrorContains(t, err, "split DWARF")
	}
}

func FuzzTypeUnits(f *testing.F) {
	f.Add([]byte("\x16\x00\x00\x00\x05\x00\x02\x08\x00\x00\x00\x00sigsigsi\x18\x00\x00\x00\x01\x02"), []byte("\x15\x00\x00\x00\x04\x00\x00\x00\x00\x00\x08sigsigsi\x17\x00\x00\x00\x01\x02"))
	f.Fuzz(func(t *testing.T, info, types []byte) {
		all, sigs := signatures(bytes.Clone(info), types)
		if len(all) != len(info)+len(types) {
			t.Fatalf("%d bytes", len(all))
		}
		for _, off := range sigs {
			if int(off) >= len(all) {
				t.Fatalf("offset %#x", off)
			}
		}
	})
}

// Entries in entries in entries, which Reader.SkipChildren would follow with one
// stack frame each.
func TestHostileNesting(t *testing.T) {
	t.Parallel()
	const deep = 8 << 20
	// Abbreviations: 1 is a unit with children, 2 a structure with children.
	abbrev := []byte{1, 0x11, 1, 0, 0, 2, 0x13, 1, 0, 0, 0}
	info := binary.LittleEndian.AppendUint32(nil, 2+4+1+1+deep)
	info = append(info, 4, 0, 0, 0, 0, 0, 8, 1)
	info = append(info, bytes.Repeat([]byte{2}, deep)...)
	d, err := dwarf.New(abbrev, nil, nil, info, nil, nil, nil, nil)
	require.NoError(t, err)
	s := &dwarfSource{d: d, ptr: 8, scan: d.Reader(), index: make(map[dwarfKey]dwarf.Offset), nodes: make(map[dwarf.Offset]*Type)}
	found, err := s.find("struct", "task")
	assert.Empty(t, found)
	t.Log(err) // an error or the end, but not of the program
}
