package kerneltext

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/x86"
	"github.com/vmprobes/vmprobes/linux"
)

// sym is a symbol of a small kernel.
type sym struct {
	name string
	addr uint64
}

const base uint64 = 0xffffffff81000000

// smallKernel makes an ELF file of a kernel of little text, with tables behind it.
func smallKernel(text, tables []byte, syms []sym) []byte {
	le := binary.LittleEndian
	note := []byte("\x04\x00\x00\x00\x04\x00\x00\x00\x03\x00\x00\x00GNU\x00\xab\xcd\xef\x01")
	body := append(bytes.Clone(text), tables...)
	strs, tab := []byte{0}, make([]byte, 24)
	for _, s := range syms {
		var e [24]byte
		le.PutUint32(e[:], uint32(len(strs)))
		e[4] = 1<<4 | 2 // a global function
		le.PutUint16(e[6:], 1)
		le.PutUint64(e[8:], s.addr)
		tab = append(tab, e[:]...)
		strs = append(append(strs, s.name...), 0)
	}
	names := []byte("\x00.text\x00.symtab\x00.strtab\x00.shstrtab\x00")
	const head, prog, sect = 64, 56, 64
	at := uint64(head + 2*prog)
	off := func(b []byte) (o uint64) { o = at; at += uint64(len(b)); return o }
	bodyAt, noteAt, tabAt, strsAt, namesAt := off(body), off(note), off(tab), off(strs), off(names)
	b := []byte(elf.ELFMAG + "\x02\x01\x01" + "\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	b = le.AppendUint16(b, uint16(elf.ET_EXEC))
	b = le.AppendUint16(b, uint16(elf.EM_X86_64))
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{base, head, at} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{head, prog, 2, sect, 5, 4} {
		b = le.AppendUint16(b, v)
	}
	for _, p := range []struct {
		typ          elf.ProgType
		off, addr, n uint64
	}{{elf.PT_LOAD, bodyAt, base, uint64(len(body))}, {elf.PT_NOTE, noteAt, 0, uint64(len(note))}} {
		b = le.AppendUint32(b, uint32(p.typ))
		b = le.AppendUint32(b, 5)
		for _, v := range []uint64{p.off, p.addr, p.addr, p.n, p.n, 4} {
			b = le.AppendUint64(b, v)
		}
	}
	for _, x := range [][]byte{body, note, tab, strs, names} {
		b = append(b, x...)
	}
	for _, s := range []struct {
		name, typ, link uint32
		addr, off, n    uint64
		entry           uint64
	}{
		{}, {1, uint32(elf.SHT_PROGBITS), 0, base, bodyAt, uint64(len(body)), 0}, {7, uint32(elf.SHT_SYMTAB), 3, 0, tabAt, uint64(len(tab)), 24},
		{15, uint32(elf.SHT_STRTAB), 0, 0, strsAt, uint64(len(strs)), 0}, {23, uint32(elf.SHT_STRTAB), 0, 0, namesAt, uint64(len(names)), 0},
	} {
		b = le.AppendUint32(b, s.name)
		b = le.AppendUint32(b, s.typ)
		flags := uint64(0)
		if s.addr != 0 {
			flags = uint64(elf.SHF_ALLOC | elf.SHF_EXECINSTR)
		}
		for _, v := range []uint64{flags, s.addr, s.off, s.n} {
			b = le.AppendUint64(b, v)
		}
		b = le.AppendUint32(b, s.link)
		b = le.AppendUint32(b, 0)
		b = le.AppendUint64(b, 1)
		b = le.AppendUint64(b, s.entry)
	}
	return b
}

// small is a kernel of three functions, with a jump label in the second.
func small() (text, tables []byte) {
	text = slices.Concat(
		[]byte{0xe8, 0x20, 0, 0, 0, 0x55, 0x48, 0x89, 0xe5, 0x48, 0xc7, 0xc0, 0x10, 0, 0, 0x81, 0x5d, 0xc3}, // first: call, push, mov, mov $base+0x10, pop, ret
		bytes.Repeat([]byte{0xcc}, 14),
		[]byte{0x0f, 0x1f, 0x44, 0, 0, 0x31, 0xc0, 0xeb, 0x02, 0xff, 0xc0, 0xc3}, // second: a jump label's NOP, xor, jmp, inc, ret
		bytes.Repeat([]byte{0xcc}, 20),
		bytes.Repeat([]byte{0xcc}, 128), // dead
		[]byte{0xc3},
	)
	tables = make([]byte, tablesSize)
	at := base + uint64(len(text))
	le := binary.LittleEndian
	second := base + 32
	le.PutUint32(tables, uint32(second-at))           // jump_entry: code
	le.PutUint32(tables[4:], uint32(second+9-(at+4))) // target
	le.PutUint64(tables[16:], base)                   // mcount_loc
	return text, tables
}

// Sizes of the tables of a small kernel.
const (
	jumpsSize, mcountSize, callsSize, altsSize, paraSize, relSize = 16, 8, 8, 24, 16, 8

	tablesSize = jumpsSize + mcountSize + callsSize + altsSize + paraSize + 3*relSize
)

// linked makes the file of a kernel with such a text and tables. They are empty in small,
// but for the first two.
func linked(text, tables []byte) []byte {
	at := base + uint64(len(text))
	syms := []sym{{"_text", base}, {"_stext", base}, {"first", base}, {"second", base + 32}, {"last", at - 1}, {"_etext", at}}
	for _, t := range []struct {
		start, stop string
		n           uint64
	}{
		{"__start___jump_table", "__stop___jump_table", jumpsSize}, {"__start_mcount_loc", "__stop_mcount_loc", mcountSize},
		{"__start_static_call_sites", "__stop_static_call_sites", callsSize}, {"__alt_instructions", "__alt_instructions_end", altsSize},
		{"__parainstructions", "__parainstructions_end", paraSize}, {"__retpoline_sites", "__retpoline_sites_end", relSize},
		{"__return_sites", "__return_sites_end", relSize}, {"__smp_locks", "__smp_locks_end", relSize},
	} {
		syms = append(syms, sym{t.start, at}, sym{t.stop, at + t.n})
		at += t.n
	}
	return smallKernel(text, tables, append(syms, sym{"_end", at}))
}

// TestSmall goes through what an int3 can be.
func TestSmall(t *testing.T) {
	text, tables := small()
	f, err := Read(bytes.NewReader(linked(text, tables)))
	require.NoError(t, err)
	assert.Equal(t, "abcdef01", f.BuildID())
	require.Equal(t, text, f.at(f.text))
	const slide = 0x1e000000
	running := bytes.Clone(text)
	copy(running, "\x0f\x1f\x44\x00\x00")                                            // ftrace has changed it
	binary.LittleEndian.PutUint32(running[12:], uint32((base+0x10+slide)&(1<<32-1))) // relocated
	r := f.compare(slide, running, linux.Int3s{})
	assert.Empty(t, r.Breaks)
	assert.Empty(t, r.Unclear)
	assert.Empty(t, r.Copies)
	for name, c := range map[string]struct {
		off    int
		change map[int]byte // besides
		own    bool
		insn   string // of the breakpoint
		why    string // it is unclear
	}{
		"a function's NOP":          {off: 0, insn: "\x0f\x1f\x44\x00\x00"},
		"one byte":                  {off: 5, insn: "\x55"},
		"several":                   {off: 6, insn: "\x48\x89\xe5"},
		"with an address":           {off: 9, insn: string(running[9:16])},
		"the address is another":    {off: 9, change: map[int]byte{13: 1}, why: "another one than the file's"},
		"another is beside it":      {off: 6, change: map[int]byte{0: 0xcc}, insn: "\x48\x89\xe5"},
		"one byte, others beside":   {off: 5, change: map[int]byte{6: 0x49}, why: "the code around it"},
		"code behind it changed":    {off: 32 + 5, change: map[int]byte{32 + 7: 0x75}, why: "the code around it"},
		"a jump label":              {off: 32, insn: "\x0f\x1f\x44\x00\x00"},
		"a jump label that jumps":   {off: 32, change: map[int]byte{33: 4, 34: 0, 35: 0}, insn: "\xe9\x04\x00\x00\x00"},
		"a jump label to elsewhere": {off: 32, change: map[int]byte{33: 5, 34: 0, 35: 0}, why: "the kernel rewrites"},
		"its own":                   {off: 6, own: true},
		"inside an instruction":     {off: 7, why: "inside an instruction"},
		"the last":                  {off: len(text) - 1, why: "the code around it"},
	} {
		now := bytes.Clone(running)
		for o, c := range c.change {
			now[o] = c
		}
		now[c.off] = int3
		addr := base + slide + uint64(c.off)
		own := linux.Int3s{}
		if c.own {
			own.Addrs = []uint64{addr}
		}
		r := f.compare(slide, now, own)
		i := slices.IndexFunc(r.Breaks, func(b Break) bool { return b.Addr == addr })
		u := slices.IndexFunc(r.Unclear, func(p Place) bool { return p.Addr == addr })
		switch {
		case c.own:
			assert.Equal(t, []uint64{addr}, r.Own, name)
			assert.Empty(t, r.Breaks, name)
		case c.why != "":
			if assert.GreaterOrEqual(t, u, 0, name) {
				assert.Contains(t, r.Unclear[u].Why, c.why, name)
			}
			assert.Less(t, i, 0, name)
		default:
			if assert.GreaterOrEqual(t, i, 0, "%s: %+v", name, r) {
				assert.Equal(t, []byte(c.insn), r.Breaks[i].Insn, name)
			}
			assert.Less(t, u, 0, name)
		}
	}
	// What may be rewritten at this moment isn't known.
	now := bytes.Clone(running)
	now[32] = int3
	r = f.compare(slide, now, linux.Int3s{Rewriting: linux.ErrBadKernel})
	assert.Empty(t, r.Breaks)
	require.Len(t, r.Unclear, 1)
	assert.Contains(t, r.Unclear[0].Why, "may be rewriting")

	// A copy of an instruction in dead code.
	now = bytes.Clone(running)
	copy(now[32+12+20+64:], "\x48\x89\xe5\xcc\xe9\x00\x00\x00\x00")
	r = f.compare(slide, now, linux.Int3s{})
	assert.Empty(t, r.Breaks)
	require.Len(t, r.Copies, 1)
	assert.Equal(t, base+slide+uint64(32+12+20+64), r.Copies[0].Addr)
	assert.Equal(t, "48 89 e5 cc e9 00 00 00 00", r.Copies[0].Why)
}

// FuzzCompare: whatever the guest has in its text, and the file in its tables, what is
// taken for a breakpoint is an int3 that the file doesn't have, on an instruction whose
// other bytes are in the guest.
func FuzzCompare(f *testing.F) {
	text, tables := small()
	f.Add(text, tables, text, uint32(0), uint32(0))
	now := bytes.Clone(text)
	now[6], now[32] = int3, int3
	f.Add(text, tables, now, uint32(0), uint32(6))
	f.Add(text, tables, bytes.Repeat([]byte{int3}, len(text)), uint32(1<<21), uint32(0))
	f.Fuzz(func(t *testing.T, text, tables, mem []byte, slide, own uint32) {
		if len(text) < 33 || len(text) > 1<<14 {
			return
		}
		all := make([]byte, tablesSize)
		copy(all, tables)
		k, err := Read(bytes.NewReader(linked(text, all)))
		if err != nil {
			if allZero(text) {
				return
			}
			t.Fatal(err)
		}
		orig := k.at(k.text)
		full := make([]byte, len(orig))
		copy(full, mem)
		r := k.compare(uint64(slide), full, linux.Int3s{Addrs: []uint64{k.text.start + uint64(slide) + uint64(own)}})
		for _, b := range r.Breaks {
			off := b.Addr - uint64(slide) - k.text.start
			if full[off] != int3 || orig[off] == int3 || uint64(own) == off {
				t.Fatalf("%#x is no breakpoint", b.Addr)
			}
			if len(b.Insn) == 0 || b.Insn[0] == int3 || !bytes.Equal(b.Insn[1:], full[off+1:off+uint64(len(b.Insn))]) {
				t.Fatalf("% x isn't what is at %#x", b.Insn, b.Addr)
			}
			if in, err := x86.Decode(b.Insn); err != nil || in.Len != len(b.Insn) {
				t.Fatalf("% x: %v", b.Insn, err)
			}
		}
		if len(r.Breaks)+len(r.Unclear) > 2*maxPlaces || len(r.Copies) > maxPlaces {
			t.Fatal("the lists have no bound")
		}
	})
}
