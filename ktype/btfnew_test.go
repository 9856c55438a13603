package ktype

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// newBlob is blob with the header of Linux 7.1: entries of the layout table, by kind.
func newBlob(layout map[int][2]byte, strs string, recs ...[]uint32) []byte {
	old := blob(strs, recs...)
	rest := old[btfHeaderLen:]
	b := bytes.Clone(old[:btfHeaderLen])
	binary.LittleEndian.PutUint32(b[4:], btfLayoutLen)
	last := 0
	for k := range layout {
		last = max(last, k)
	}
	table := make([]byte, kindLayoutLen*(last+1))
	for k, e := range layout {
		table[kindLayoutLen*k], table[kindLayoutLen*k+1] = e[0], e[1]
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(rest)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(table)))
	return append(append(b, rest...), table...)
}

// BTF as Linux 7.1 and later may have it.
func TestNewBTF(t *testing.T) {
	t.Parallel()
	const strs = "\x00int\x00task\x00pid\x00odd\x00big\x00E\x00"
	const nInt, nTask, nPid, nOdd, nBig, nE = 1, 5, 10, 14, 18, 22
	i32 := rawType(nInt, btfInt, 0, 4, 1<<24|32)
	task := rawType(nTask, btfStruct, 2, 12, nPid, 1, 0, nOdd, 2, 64)
	odd := func(kind, vlen int, more ...uint32) []uint32 { return rawType(nOdd, kind, vlen, 0, more...) }
	for name, c := range map[string]struct {
		data []byte
		err  string
	}{
		"layout":               {newBlob(map[int][2]byte{19: {0, 12}}, strs, i32, i32, task), ""},
		"unknown kind":         {newBlob(map[int][2]byte{20: {4, 0}}, strs, i32, odd(20, 0, 7), task), ""},
		"with elements":        {newBlob(map[int][2]byte{21: {4, 8}}, strs, i32, odd(21, 2, 7, 1, 2, 3, 4), task), ""},
		"7 bits of kind":       {newBlob(map[int][2]byte{100: {0, 0}}, strs, i32, odd(100, 0), task), ""},
		"no layout":            {blob(strs, i32, odd(20, 0), task), "BTF kind 20 is not known"},
		"another layout":       {newBlob(map[int][2]byte{20: {0, 0}}, strs, i32, odd(21, 0), task), "BTF kind 21 is not known"},
		"layout of too little": {newBlob(map[int][2]byte{21: {0, 0}}, strs, i32, odd(21, 0, 1), task), "BTF"},
		"too many elements":    {newBlob(map[int][2]byte{21: {255, 255}}, strs, i32, odd(21, 1<<24-1), task), "damaged type 2"},
	} {
		types, err := fromBTF(c.data)
		if err == nil {
			_, err = types.Offset("task.pid")
		}
		if c.err != "" {
			require.ErrorIs(t, err, ErrFormat, name)
			assert.ErrorContains(t, err, c.err, name)
			continue
		}
		require.NoError(t, err, name)
		if name != "layout" {
			_, err = types.Offset("task.odd")
			require.ErrorIs(t, err, ErrNoType, "%s: what it is isn't known", name)
		}
		assert.True(t, types.IsBTF(c.data), name)
		use(types)
	}
	cut := newBlob(map[int][2]byte{20: {0, 0}}, strs, i32)
	_, err := fromBTF(cut[:len(cut)-1])
	require.ErrorIs(t, err, ErrFormat)

	// An enum of more constants than 16 bits count.
	const many = 1<<16 + 1
	var values []uint32
	for i := range uint32(many) {
		values = append(values, nE, i-1)
	}
	for _, signed := range []uint32{0, 1} {
		e := rawType(nBig, btfEnum, many, 4, values...)
		e[1] |= signed << 31
		types, err := fromBTF(newBlob(nil, strs, i32, e, rawType(nTask, btfStruct, 1, 4, nPid, 2, 0)))
		require.NoError(t, err)
		big, err := types.Enum("big")
		require.NoError(t, err)
		all := big.Values()
		require.Len(t, all, many)
		first := int64(-1)
		if signed == 0 {
			first = 1<<32 - 1
		}
		assert.Equal(t, []EnumValue{{"E", first}, {"E", 0}, {"E", 1<<16 - 1}}, []EnumValue{all[0], all[1], all[many-1]})
		f, err := types.Offset("task.pid")
		require.NoError(t, err)
		assert.EqualValues(t, 4, f.Size)
	}

	// A struct of so many members isn't known; others are.
	members := make([]uint32, 3*many)
	types, err := fromBTF(newBlob(nil, strs, i32, i32, task, rawType(nBig, btfStruct, many, 4, members...)))
	require.NoError(t, err)
	assert.True(t, types.HasField("task.pid"))
	assert.False(t, types.HasField("big.pid"))
}

// elfOf makes an ELF file of sections.
func elfOf(sections ...any) []byte {
	names, data := "\x00", []byte{}
	type sec struct{ name, off, size int }
	var all []sec
	for i := 0; i < len(sections); i += 2 {
		b := sections[i+1].([]byte)
		all = append(all, sec{len(names), 64 + len(data), len(b)})
		names += sections[i].(string) + "\x00"
		data = append(data, b...)
	}
	all = append(all, sec{0, 64 + len(data), len(names)})
	data = append(data, names...)
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Shoff: uint64(64 + len(data)), Ehsize: 64,
		Shentsize: 64, Shnum: uint16(len(all) + 1), Shstrndx: uint16(len(all))}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	_ = binary.Write(&b, binary.LittleEndian, h)
	b.Write(data)
	_ = binary.Write(&b, binary.LittleEndian, elf.Section64{})
	for i, s := range all {
		typ := elf.SHT_PROGBITS
		if i == len(all)-1 {
			typ = elf.SHT_STRTAB
		}
		_ = binary.Write(&b, binary.LittleEndian, elf.Section64{Name: uint32(s.name), Type: uint32(typ), Off: uint64(s.off), Size: uint64(s.size), Addralign: 1})
	}
	return b.Bytes()
}

// A module that was built apart from the kernel: its types refer to a base of their own
// (.BTF.base), as pahole's distilled_base makes it.
func TestModuleBase(t *testing.T) {
	t.Parallel()
	// The kernel: char, int, struct list_head, struct task_struct, a function.
	kernel, err := fromBTF(blob("\x00char\x00int\x00list_head\x00next\x00prev\x00task_struct\x00pid\x00",
		rawType(1, btfInt, 0, 1, 8), rawType(6, btfInt, 0, 4, 1<<24|32),
		rawType(0, btfPointer, 0, 4), rawType(10, btfStruct, 2, 16, 20, 3, 0, 25, 3, 64),
		rawType(30, btfStruct, 1, 64, 42, 2, 128)))
	require.NoError(t, err)
	// The base: int, struct list_head of 16 bytes, a declaration of struct task_struct.
	const distilledStrs = "\x00int\x00list_head\x00task_struct\x00"
	base := func(size uint32, name int) []byte {
		return blob(distilledStrs, rawType(1, btfInt, 0, 4, 1<<24|32), rawType(5, btfStruct, 0, size), rawType(name, btfFwd, 0, 0))
	}
	// struct my_state { int magic; struct list_head list; struct task_struct *owner; };
	// int my_fn(struct my_state *s);
	at := len(distilledStrs)
	const strs = "\x00my_state\x00magic\x00list\x00owner\x00s\x00my_fn\x00"
	split := blob(strs,
		rawType(0, btfPointer, 0, 3), // 4
		rawType(at+1, btfStruct, 3, 40, uint32(at+10), 1, 0, uint32(at+16), 2, 64, uint32(at+21), 4, 192), // 5
		rawType(0, btfPointer, 0, 5),                                       // 6
		rawType(0, btfFuncProto, 1, 1, uint32(at+27), 6),                   // 7
		rawType(at+29, btfFunc, 0, 7), rawType(0, btfArray, 0, 0, 5, 1, 3)) // 8, 9
	file := func(distilled []byte) *bytes.Reader {
		return bytes.NewReader(elfOf(".text", []byte{0x90}, ".BTF", split, ".BTF.base", distilled))
	}
	types, err := kernel.WithModuleFile("m", file(base(16, 15)))
	require.NoError(t, err)
	for path, want := range map[string]uint64{"my_state.magic": 0, "m:my_state.list.prev": 16, "my_state.owner": 24} {
		f, err := types.Offset(path)
		require.NoError(t, err, path)
		assert.Equal(t, want, f.Offset, path)
	}
	text, err := types.Prototype("m:my_fn")
	require.NoError(t, err)
	assert.Equal(t, "int my_fn(struct my_state *s)", text.String())
	f := types.At(&fixed{}, "my_state", 0).Field("owner").Deref()
	assert.NotErrorIs(t, f.Err(), ErrNoType)
	require.True(t, types.HasField("my_state.owner.pid"), "the kernel's struct, by a pointer to one that was only declared")

	_, err = kernel.WithModuleFile("m", file(base(24, 15)))
	require.ErrorIs(t, err, ErrFormat)
	assert.ErrorContains(t, err, `built with a "list_head" of 24 bytes, and the kernel's has 16`)
	_, err = kernel.WithModuleFile("m", file(blob("\x00nope\x00", rawType(1, btfStruct, 0, 8))))
	require.ErrorIs(t, err, ErrFormat)
	assert.ErrorContains(t, err, `built with a "nope", which the kernel doesn't have`)
	_, err = kernel.WithModuleFile("m", bytes.NewReader(elfOf(".text", []byte{0x90})))
	require.ErrorIs(t, err, ErrFormat)
	_, err = kernel.WithModule("m", split)
	require.ErrorIs(t, err, ErrFormat, "without its base")
	assert.ErrorContains(t, err, ".BTF.base")

	// Damaged ones.
	for i := range len(split) {
		bad := bytes.Clone(split)
		bad[i] ^= 0xff
		types, err := kernel.WithModuleFile("m", bytes.NewReader(elfOf(".BTF", bad, ".BTF.base", base(16, 15))))
		if err == nil {
			use(types)
		}
	}
	good := base(16, 15)
	for i := range len(good) {
		bad := bytes.Clone(good)
		bad[i] ^= 0xff
		if types, err := kernel.WithModuleFile(fmt.Sprint(i), bytes.NewReader(elfOf(".BTF", split, ".BTF.base", bad))); err == nil {
			use(types)
		}
	}
}

func FuzzModuleBase(f *testing.F) {
	f.Add(blob("\x00int\x00", rawType(1, btfInt, 0, 4, 32)), blob("\x00s\x00m\x00", rawType(6, btfStruct, 1, 4, 8, 1, 0)))
	kernel, err := fromBTF(blob("\x00int\x00s\x00", rawType(1, btfInt, 0, 4, 32), rawType(5, btfStruct, 0, 8)))
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, base, split []byte) {
		types, err := kernel.WithModuleFile("m", bytes.NewReader(elfOf(".BTF", split, ".BTF.base", base)))
		if err == nil {
			use(types)
		}
	})
}
