package x86

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
)

func mustDecode(t testing.TB, s string) Insn {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	in, err := Decode(b)
	if err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	if in.Len != len(b) {
		t.Fatalf("%s: length %d", s, in.Len)
	}
	return in
}

// flatMem is a little memory at an address; it counts and can fail.
type flatMem struct {
	base   uint64
	data   []byte
	err    error // of writes
	writes int
}

var errFlat = errors.New("outside of memory")

func (m *flatMem) at(addr uint64, n int) []byte {
	if off := addr - m.base; addr >= m.base && off <= uint64(len(m.data)) && uint64(n) <= uint64(len(m.data))-off {
		return m.data[off:][:n]
	}
	return nil
}

func (m *flatMem) ReadVirt(addr uint64, b []byte) error {
	d := m.at(addr, len(b))
	if d == nil {
		return errFlat
	}
	copy(b, d)
	return nil
}

func (m *flatMem) WriteVirt(addr uint64, b []byte) error {
	d := m.at(addr, len(b))
	if d == nil {
		return errFlat
	}
	if m.err != nil {
		return m.err
	}
	m.writes++
	copy(d, b)
	return nil
}

const (
	kernText  = 0xffffffff81000000
	kernStack = 0xffffc90000004000
)

func kernelRegs() Regs {
	return Regs{IP: kernText, SP: kernStack - 0x100, CS: 0x10, SS: 0x18, Flags: 2 | FlagIF}
}

func kernelStack() *flatMem {
	return &flatMem{base: kernStack - 0x1000, data: make([]byte, 0x1000)}
}

func TestDecodeErrors(t *testing.T) {
	for _, tc := range []struct {
		name, code string
		want       error
	}{
		{"empty", "", ErrTruncated},
		{"prefix only", "66", ErrTruncated},
		{"no modrm", "48 89", ErrTruncated},
		{"half a displacement", "48 8b 05 01 02", ErrTruncated},
		{"fourteen prefixes", strings.Repeat("66", 14), ErrTruncated},
		{"fifteen prefixes", strings.Repeat("66", 15) + "90", ErrInvalid},
		{"sixteen bytes", strings.Repeat("66", 9) + "48 81 05 00000000 000000", ErrInvalid},
		{"push es", "06", ErrInvalid},
		{"far call", "9a 00000000 0000", ErrInvalid},
		{"lea of a register", "8d c0", ErrInvalid},
		{"rex before vex", "48 c5 f8 77", ErrInvalid},
		{"66 before vex", "66 c5 f8 77", ErrInvalid},
		{"vex map 0", "c4 e0 78 77", ErrInvalid},
		{"evex without its fixed bit", "62 f1 78 48 10 c0", ErrInvalid},
		{"ff /7", "ff ff", ErrInvalid},
		{"rex2", "d5 00 90", ErrInvalid},
	} {
		b, err := hex.DecodeString(strings.ReplaceAll(tc.code, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		in, err := Decode(b)
		if !errors.Is(err, tc.want) || in != (Insn{}) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}

func TestPredicates(t *testing.T) {
	const (
		nop = 1 << iota
		int3
		emul
		rip
		mem
		rep
		noStep
		noMove
	)
	for _, tc := range []struct {
		code string
		want int
	}{
		{"90", nop | emul},
		{"66 90", nop | emul},
		{"f3 90", nop | emul},
		{"41 90", emul}, // xchg r8, rax
		{"f3 41 90", 0},
		{"0f 1f 00", nop | emul},
		{"0f 1f 44 00 00", nop | emul},
		{"66 0f 1f 00", nop | emul},
		{"66 2e 0f 1f 84 00 00000000", nop | emul},
		{"f3 0f 1e fa", nop | emul},
		{"f3 0f 1e fb", nop | emul},
		{"f3 48 0f 1e c8", 0}, // rdsspq rax
		{"cc", int3 | mem | noStep | noMove},
		{"cd 80", mem | noStep | noMove},
		{"55", emul | mem},
		{"c3", emul | mem},
		{"e8 00000000", emul | mem | noMove},
		{"66 e8 00000000", mem | noStep | noMove},
		{"eb fe", emul | noMove},
		{"74 00", emul | noMove},
		{"e3 00", emul | noMove},
		{"48 8b 05 00000000", emul | rip | mem},
		{"48 8d 05 00000000", emul | rip},
		{"65 48 8b 04 25 28000000", emul | mem},
		{"48 01 07", mem},
		{"f0 48 01 07", mem},
		{"f3 48 a5", mem | rep},
		{"a5", mem},
		{"f3 a6", mem | rep},
		{"9c", mem},
		{"9d", mem},
		{"fa", 0},
		{"fb", noStep | noMove},
		{"f4", noStep | noMove},
		{"0f 05", noStep | noMove},
		{"0f 34", noStep | noMove},
		{"48 0f 07", noStep | noMove},
		{"48 cf", mem | noStep | noMove},
		{"8e d0", noStep | noMove},
		{"8e d8", 0},
		{"0f b2 07", mem | noStep | noMove},
		{"0f 22 d8", noStep | noMove},
		{"0f 20 d8", 0},
		{"0f 23 f8", noStep | noMove},
		{"0f 30", noStep | noMove},
		{"0f a2", noStep | noMove},
		{"0f 01 c1", noStep | noMove},
		{"0f 01 d9", noStep | noMove},
		{"0f 01 17", mem | noStep | noMove},
		{"0f 01 cb", 0},
		{"0f 01 ca", 0},
		{"0f 01 f8", noStep | noMove},
		{"0f 01 e8", 0},
		{"0f 0b", noStep | noMove},
		{"c7 f8 00000000", noStep | noMove},
		{"f1", mem | noStep | noMove},
		{"ff 2f", mem | noStep | noMove},
		{"ff d0", emul | mem},
		{"ff e0", emul},
		{"c5 f8 77", 0},
		{"62 f1 7c 48 10 05 00000000", rip | mem},
		{"0f 31", 0},
		{"d7", mem},
		{"f7 f9", 0},
		{"48 0f cf", emul},
	} {
		in := mustDecode(t, tc.code)
		got := 0
		for i, b := range []bool{
			in.IsNop(), in.IsInt3(), in.CanEmulate(), in.RIPRelative(),
			in.MemoryOperand(), in.Repeats(), in.CanStep() != nil,
		} {
			if b {
				got |= 1 << i
			}
		}
		_, err := in.Relocate(kernText, kernText+0x1000)
		if err != nil {
			got |= noMove
			if !errors.Is(err, ErrNotRelocatable) {
				t.Errorf("%s: %v", tc.code, err)
			}
		}
		if got != tc.want {
			t.Errorf("%s %s: %09b, want %09b", tc.code, &in, got, tc.want)
		}
		if err := in.CanStep(); err != nil && !errors.Is(err, ErrNotSteppable) {
			t.Errorf("%s: %v", tc.code, err)
		}
	}
}

func TestString(t *testing.T) {
	for code, want := range map[string]string{
		"f3 0f 1e fa":       "endbr64",
		"55":                "push %rbp",
		"0f 1f 44 00 00":    "nop (0f1f440000)",
		"0f 01 ca":          "(0f01ca)", // unknown to x86asm
		"c5 f8 77":          "vzeroupper",
		"48 89 e5":          "mov %rsp,%rbp",
		"48 8b 05 10000000": "mov 0x10(%rip),%rax",
	} {
		in := mustDecode(t, code)
		if got := in.String(); got != want {
			t.Errorf("%s: %q, want %q", code, got, want)
		}
	}
	if got := (&Insn{}).String(); got != "(none)" {
		t.Error(got)
	}
}

func TestZeroInsn(t *testing.T) {
	var in Insn
	r := kernelRegs()
	if in.IsNop() || in.IsInt3() || in.CanEmulate() || in.Repeats() || in.MemoryOperand() {
		t.Error("the zero Insn is something")
	}
	if err := in.Emulate(&r, nil); !errors.Is(err, ErrNotEmulated) {
		t.Error(err)
	}
	if err := in.CanStep(); !errors.Is(err, ErrNotSteppable) {
		t.Error(err)
	}
	if _, err := in.Relocate(1, 2); !errors.Is(err, ErrNotRelocatable) {
		t.Error(err)
	}
	if err := in.FinishStep(&r, 1, 2, nil, &r); !errors.Is(err, ErrStepLost) {
		t.Error(err)
	}
}

// The kernel-mode rules, which the processor oracle cannot reach.
func TestEmulateKernel(t *testing.T) {
	t.Run("push", func(t *testing.T) {
		in, r, m := mustDecode(t, "55"), kernelRegs(), kernelStack()
		r.BP = 0x1122334455667788
		if err := in.Emulate(&r, m); err != nil {
			t.Fatal(err)
		}
		if r.IP != kernText+1 || r.SP != kernStack-0x108 || binary.LittleEndian.Uint64(m.at(r.SP, 8)) != r.BP {
			t.Errorf("%+v", r)
		}
	})
	for _, tc := range []struct {
		name, code string
		set        func(r *Regs)
		want       error
	}{
		{"user address with AC clear", "48 8b 07", func(r *Regs) { r.DI = 0x1000 }, errSMAP},
		{"user address with AC set", "48 8b 07", func(r *Regs) { r.DI, r.Flags = 0x1000, r.Flags|FlagAC }, errFlat},
		{"user mode and kernel address", "48 8b 07",
			func(r *Regs) { r.CS, r.IP, r.DI = 0x33, 0x401000, kernStack-0x100 }, errPriv},
		{"PV kernel in ring 3", "48 8b 07", func(r *Regs) { r.CS, r.DI = 0xe033, kernStack-0x100 }, nil},
		{"not canonical", "48 8b 07", func(r *Regs) { r.DI = 1 << 60 }, errCanonical},
		{"wraps", "48 8b 07", func(r *Regs) { r.DI = ^uint64(0) }, errCanonical},
		{"jump out of canonical space", "ff e0", func(r *Regs) { r.AX = 1 << 47 }, errCanonical},
		{"call out of canonical space", "ff d0", func(r *Regs) { r.AX = 1 << 47 }, errCanonical},
		{"store across a page", "48 89 07", func(r *Regs) { r.DI = kernStack - 4 }, errPage},
		{"unmapped stack", "50", func(r *Regs) { r.SP = kernText }, errFlat},
		{"locked", "f0 48 01 07", nil, ErrNotEmulated},
		{"add to memory", "48 01 07", nil, ErrNotEmulated},
		{"out", "ee", nil, ErrNotEmulated},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in, r, m := mustDecode(t, tc.code), kernelRegs(), kernelStack()
			if tc.set != nil {
				tc.set(&r)
			}
			before, data := r, bytes.Clone(m.data)
			err := in.Emulate(&r, m)
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if err != nil && (r != before || !bytes.Equal(data, m.data)) {
				t.Error("changed with an error")
			}
		})
	}
	t.Run("failing write", func(t *testing.T) {
		for _, code := range []string{"55", "e8 00000000", "ff d0", "6a 01", "ff 34 24", "48 89 04 24", "0f 94 04 24"} {
			in, r, m := mustDecode(t, code), kernelRegs(), kernelStack()
			m.err = errors.New("read-only")
			before := r
			if err := in.Emulate(&r, m); !errors.Is(err, m.err) || r != before {
				t.Errorf("%s: %v", code, err)
			}
		}
	})
	t.Run("no memory", func(t *testing.T) {
		in, r := mustDecode(t, "55"), kernelRegs()
		before := r
		if err := in.Emulate(&r, nil); err == nil || r != before {
			t.Error(err)
		}
		in = mustDecode(t, "f3 0f 1e fa")
		if err := in.Emulate(&r, nil); err != nil || r.IP != before.IP+4 {
			t.Error(err)
		}
	})
}

func TestFinishStepFlags(t *testing.T) {
	const to = kernText + 0x200000
	for _, tc := range []struct {
		name, code    string
		before, after uint64 // flags before; after the step
		want          uint64
	}{
		{"IF comes back", "48 01 c0", FlagIF, FlagTF | FlagCF, FlagIF | FlagCF},
		{"IF was off", "48 01 c0", 0, FlagTF | FlagZF, FlagZF},
		{"the guest's own TF", "48 01 c0", FlagIF | FlagTF, FlagTF, FlagIF | FlagTF},
		{"cli", "fa", FlagIF, FlagTF, 0},
		{"popf sets IF", "9d", 0, FlagIF | FlagSF, FlagIF | FlagSF},
		{"popf clears IF", "9d", FlagIF, FlagSF, FlagSF},
		{"popf sets TF", "9d", FlagIF, FlagTF, FlagTF},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := mustDecode(t, tc.code)
			before := kernelRegs()
			before.Flags = 2 | tc.before
			after := before
			after.IP = to + uint64(in.Len)
			after.Flags = 2 | tc.after
			if err := in.FinishStep(&after, kernText, to, nil, &before); err != nil {
				t.Fatal(err)
			}
			if after.Flags != 2|tc.want || after.IP != kernText+uint64(in.Len) {
				t.Errorf("flags %#x, want %#x; IP %#x", after.Flags, 2|tc.want, after.IP)
			}
		})
	}
	t.Run("popf in ring 3 keeps IF", func(t *testing.T) {
		in := mustDecode(t, "9d")
		before := kernelRegs()
		before.CS = 0x33
		after := before
		after.IP, after.Flags = to+1, 2
		if err := in.FinishStep(&after, kernText, to, nil, &before); err != nil || after.Flags != 2|FlagIF {
			t.Errorf("%#x, %v", after.Flags, err)
		}
	})
	t.Run("pushf", func(t *testing.T) {
		for _, flags := range []uint64{0, FlagIF, FlagTF, FlagIF | FlagTF} {
			in, m := mustDecode(t, "9c"), kernelStack()
			before := kernelRegs()
			before.Flags = 2 | FlagCF | flags
			after := before
			after.SP -= 8
			after.IP, after.Flags = to+1, 2|FlagCF|FlagTF
			binary.LittleEndian.PutUint64(m.at(after.SP, 8), after.Flags)
			if err := in.FinishStep(&after, kernText, to, m, &before); err != nil {
				t.Fatal(err)
			}
			if got := binary.LittleEndian.Uint64(m.at(after.SP, 8)); got != before.Flags || after.Flags != before.Flags {
				t.Errorf("pushed %#x, flags %#x, want %#x", got, after.Flags, before.Flags)
			}
		}
	})
}

func TestFinishStepLost(t *testing.T) {
	const to, handler = kernText + 0x200000, kernText + 0xa00000
	for _, code := range []string{"48 01 c0", "9c", "ff d0", "ff e0", "c3", "c2 0800", "f3 a4"} {
		in, m := mustDecode(t, code), kernelStack()
		before := kernelRegs()
		after := before
		after.SP -= 48 // an exception frame with an error code
		after.IP, after.Flags = handler, 2
		want := after
		if err := in.FinishStep(&after, kernText, to, m, &before); !errors.Is(err, ErrStepLost) || after != want || m.writes != 0 {
			t.Errorf("%s: %v", code, err)
		}
	}
	// In place, a relative branch can end in two places.
	in := mustDecode(t, "74 10")
	for ip, ok := range map[uint64]bool{kernText + 2: true, kernText + 0x12: true, kernText + 0x11: false, kernText: false} {
		before := kernelRegs()
		after := before
		after.IP = ip
		err := in.FinishStep(&after, kernText, kernText, nil, &before)
		if (err == nil) != ok || after.IP != ip {
			t.Errorf("%#x: %v", ip, err)
		}
	}
	// A return address that is not the copy's.
	in, m := mustDecode(t, "ff d0"), kernelStack()
	before := kernelRegs()
	after := before
	after.SP -= 8
	after.IP = handler
	if err := in.FinishStep(&after, kernText, to, m, &before); !errors.Is(err, ErrStepLost) {
		t.Error(err)
	}
}

func TestRelocateRange(t *testing.T) {
	const text = 0x7f00_1234_5000
	in := mustDecode(t, "48 8b 05 10000000")
	code, err := in.Relocate(text, text+0x1000)
	if err != nil || binary.LittleEndian.Uint32(code[3:]) != 0xfffff010 {
		t.Errorf("% x, %v", code, err)
	}
	if !bytes.Equal(in.Bytes()[3:], []byte{0x10, 0, 0, 0}) {
		t.Error("Relocate changed the instruction")
	}
	for _, to := range []uint64{text - 1<<32, text + 0x11 + 1<<31, text + 0x10 - 1<<31, 0x1000} {
		if _, err := in.Relocate(text, to); !errors.Is(err, ErrRange) {
			t.Errorf("%#x: %v", to, err)
		}
	}
	for _, to := range []uint64{text + 0x10 + 1<<31, text + 0x11 - 1<<31, text} {
		if _, err := in.Relocate(text, to); err != nil {
			t.Errorf("%#x: %v", to, err)
		}
	}
	// EIP-relative addresses wrap at 4 GiB.
	in = mustDecode(t, "67 8b 05 10000000")
	code, err = in.Relocate(0x1_0000_0000, 0x7f00_0000_0000)
	if err != nil || binary.LittleEndian.Uint32(code[3:]) != 0x10 {
		t.Errorf("% x, %v", code, err)
	}
}

func TestFindBoundary(t *testing.T) {
	// endbr64; push %rbp; mov %rsp,%rbp; call; ret; then nonsense
	code, _ := hex.DecodeString("f30f1efa554889e5e800000000c306")
	const start = kernText
	for off, want := range map[uint64]string{
		0: "", 4: "", 5: "", 8: "", 13: "", 14: "",
		1: "1 bytes into the 4-byte instruction at 0xffffffff81000000", 6: "at 0xffffffff81000005", 12: "at 0xffffffff81000008",
		15: "outside", ^uint64(0): "outside",
	} {
		err := FindBoundary(code, start, start+off)
		if want == "" {
			if err != nil {
				t.Errorf("+%d: %v", off, err)
			}
			continue
		}
		if !errors.Is(err, ErrNotBoundary) || !strings.Contains(err.Error(), want) {
			t.Errorf("+%d: %v, want %q", off, err, want)
		}
	}
	if err := FindBoundary([]byte{0x06, 0x90}, start, start+1); !errors.Is(err, ErrNotBoundary) || !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
}

// randPrefixes gives the prefixes of a random instruction, REX last.
func randPrefixes(rng *rand.Rand) []byte {
	var b []byte
	if rng.IntN(4) == 0 {
		b = append(b, 0x66)
	}
	if rng.IntN(8) == 0 {
		b = append(b, 0x67)
	}
	if rng.IntN(6) == 0 {
		b = append(b, []byte{0x64, 0x65, 0x2e, 0x3e}[rng.IntN(4)])
	}
	if rng.IntN(12) == 0 {
		b = append(b, []byte{0xf2, 0xf3}[rng.IntN(2)])
	}
	if rng.IntN(2) == 0 {
		b = append(b, 0x40|byte(rng.IntN(16)))
	}
	return b
}

func fuzzSeeds(f *testing.F) {
	for _, s := range []string{
		"90", "f30f1efa", "0f1f440000", "55", "e811223344", "488b0511223344", "654889042528000000",
		"48b81122334455667788", "a01122334455667788", "c8100001", "66f7c01122", "f7c011223344", "c4e2f9f7c1",
		"62f17c48100511223344", "8fe878c2ec0e", "f20f78c10102", "66666666666666666666666666666690", "67a111223344",
	} {
		b, _ := hex.DecodeString(s)
		f.Add(b)
	}
}

// FuzzDecode checks that lengths are within bounds, that an instruction decodes
// from its own bytes alone and from no fewer, and that nothing panics.
func FuzzDecode(f *testing.F) {
	fuzzSeeds(f)
	f.Fuzz(func(t *testing.T, code []byte) {
		in, err := Decode(code)
		if err != nil {
			if !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrInvalid) || in != (Insn{}) {
				t.Fatal(err)
			}
			if errors.Is(err, ErrTruncated) && len(code) >= MaxLen {
				t.Fatal("truncated with enough bytes")
			}
			return
		}
		if in.Len < 1 || in.Len > MaxLen || !bytes.Equal(in.Bytes(), code[:in.Len]) {
			t.Fatalf("length %d", in.Len)
		}
		if int(in.immOff)+int(in.immLen) > in.Len || int(in.dispOff)+int(in.dispLen) > in.Len || int(in.opOff) >= in.Len {
			t.Fatalf("%+v", in)
		}
		for k := range in.Len {
			if _, err := Decode(code[:k]); !errors.Is(err, ErrTruncated) {
				t.Fatalf("% x cut to %d: %v", in.Bytes(), k, err)
			}
		}
		if again, err := Decode(code[:in.Len]); err != nil || again != in {
			t.Fatalf("% x depends on what follows: %v", in.Bytes(), err)
		}
		_ = in.String()
		_ = in.MemoryOperand()
		if in.IsNop() && !in.CanEmulate() && in.pfx&(pfxF2F3|pfxTwoSegs|pfxDeadREX) == 0 {
			t.Fatal("a NOP that is not emulated")
		}
		moved, err := in.Relocate(kernText, kernText+0x12345)
		if err == nil {
			if d, err := Decode(moved); err != nil || d.Len != in.Len || d.op != in.op {
				t.Fatalf("% x relocated to % x: %v", in.Bytes(), moved, err)
			}
		}
	})
}

// FuzzEmulate checks that Emulate and FinishStep neither panic nor change
// anything when they fail, and that memory sees one write at most.
func FuzzEmulate(f *testing.F) {
	for _, s := range []string{"55", "c3", "488b07", "488907", "ff10", "e811223344", "48c1e003", "480fb60424"} {
		b, _ := hex.DecodeString(s)
		f.Add(b, uint64(kernStack-0x100), uint64(kernStack-0x80), uint64(2), true)
	}
	f.Fuzz(func(t *testing.T, code []byte, sp, any, flags uint64, fail bool) {
		in, err := Decode(code)
		if err != nil {
			return
		}
		r := Regs{IP: kernText, SP: sp, Flags: flags, CS: any & 3, AX: any, BX: any, CX: any, DX: any, SI: any, DI: any, BP: any,
			R8: any, R9: any, R10: any, R11: any, R12: any, R13: any, R14: any, R15: any}
		m := kernelStack()
		for i := range m.data {
			m.data[i] = byte(i * 7)
		}
		if fail {
			m.err = errFlat
		}
		before, data := r, bytes.Clone(m.data)
		if err := in.Emulate(&r, m); err != nil {
			if r != before || !bytes.Equal(m.data, data) || m.writes != 0 {
				t.Fatalf("% x changed something: %v", in.Bytes(), err)
			}
		} else if !in.CanEmulate() || m.writes > 1 {
			t.Fatalf("% x: CanEmulate %v, %d writes", in.Bytes(), in.CanEmulate(), m.writes)
		} else if !canonical(r.IP) && canonical(r.IP-uint64(in.Len)) {
			t.Fatalf("% x: IP %#x", in.Bytes(), r.IP)
		}
		r, data = before, bytes.Clone(m.data)
		r.IP += uint64(in.Len)
		after := r
		if err := in.FinishStep(&r, kernText-64, kernText, m, &before); err != nil && (r != after || !bytes.Equal(m.data, data)) {
			t.Fatalf("% x: FinishStep changed something: %v", in.Bytes(), err)
		}
	})
}

func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("sync.Pool allocates under the race detector")
	}
	m := kernelStack()
	codes := []string{"f30f1efa", "55", "48 8b 04 24", "48 89 04 24", "e8 00000000", "48 01 c0", "c3", "ff d0"}
	for _, code := range codes {
		in := mustDecode(t, code)
		b := bytes.Clone(in.Bytes())
		base := kernelRegs()
		if n := testing.AllocsPerRun(100, func() {
			in, _ := Decode(b)
			r := base
			_ = in.Emulate(&r, m)
		}); n != 0 {
			t.Errorf("%s: %v allocations", code, n)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, code := range map[string]string{
		"endbr64": "f30f1efa", "push": "55", "mov-rip": "488b0511223344", "movabs": "48b81122334455667788", "evex": "62f17c48100511223344",
	} {
		c, _ := hex.DecodeString(code)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Decode(c); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkEmulate(b *testing.B) {
	for name, code := range map[string]string{
		"endbr64": "f30f1efa", "push": "55", "load": "488b0424", "store": "48890424", "call": "e800000000", "add": "4801c0",
	} {
		in := mustDecode(b, code)
		b.Run(name, func(b *testing.B) {
			m, base := kernelStack(), kernelRegs()
			b.ReportAllocs()
			for b.Loop() {
				r := base
				if err := in.Emulate(&r, m); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
