package x86

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pageMem is the data region as Emulate sees it.
type pageMem struct {
	data []byte
	// the access that failed last
	badAddr uint64
	badLen  int
}

func (p *pageMem) at(addr uint64, n int) ([]byte, error) {
	if !inRegion(addr, n, oracleData) {
		p.badAddr, p.badLen = addr, n
		return nil, errUnmapped
	}
	return p.data[addr-oracleData:][:n], nil
}

func (p *pageMem) ReadVirt(addr uint64, b []byte) error {
	s, err := p.at(addr, len(b))
	copy(b, s)
	return err
}

func (p *pageMem) WriteVirt(addr uint64, b []byte) error {
	d, err := p.at(addr, len(b))
	copy(d, b)
	return err
}

const settableFlags = arithFlags | FlagDF

func randWord(rng *rand.Rand) uint64 {
	switch rng.IntN(8) {
	case 0:
		return rng.Uint64N(4) - 2 // around 0
	case 1:
		return 1<<(8<<rng.IntN(3)) - 2 + rng.Uint64N(4) // around a width
	case 2:
		return 1<<(8<<rng.IntN(4)-1) - 2 + rng.Uint64N(4) // around a sign
	case 3:
		return uint64(int64(int8(rng.Uint32())))
	case 4:
		return oracleData + rng.Uint64N(oracleSize)
	}
	return rng.Uint64()
}

func randRegs(rng *rand.Rand, base *Regs) Regs {
	r := *base
	for i := range uint8(16) {
		*r.gpr(i) = randWord(rng)
	}
	r.SP = oracleData + rng.Uint64N(oracleSize)&^7
	if rng.IntN(4) == 0 {
		r.BP = oracleData + rng.Uint64N(oracleSize)
	}
	r.FSBase = oracleData + rng.Uint64N(oracleSize)
	r.GSBase = rng.Uint64() >> 17
	r.Flags = base.Flags&^settableFlags | rng.Uint64()&settableFlags
	if rng.IntN(16) == 0 {
		r.Flags |= FlagRF
	}
	if rng.IntN(16) == 0 {
		r.Flags |= FlagAC
	}
	return r
}

// randInsn makes an instruction of an opcode with random operands.
func randInsn(rng *rand.Rand, omap, op uint8) (Insn, error) {
	b := randPrefixes(rng)
	if omap > 0 {
		b = append(b, 0x0f)
	}
	b = append(b, op)
	for range MaxLen {
		b = append(b, byte(rng.Uint32()))
	}
	return Decode(b)
}

// aim changes registers or the displacement so that a memory operand is in the
// data region. It uses the package's own address computation: if that is
// wrong the processor goes elsewhere, and the comparison fails.
func aim(rng *rand.Rand, in *Insn, r *Regs) {
	want := oracleData + rng.Uint64N(oracleSize-16)
	if rng.IntN(4) == 0 {
		want = oracleData + pageSize - rng.Uint64N(10) // at the page boundary
	}
	if in.form&hasMoffs != 0 {
		e := emulation{in: *in, old: *r}
		d := want - e.linear(0)
		if in.dispLen == 4 {
			binary.LittleEndian.PutUint32(in.b[in.dispOff:], uint32(d))
		} else {
			binary.LittleEndian.PutUint64(in.b[in.dispOff:], d)
		}
		return
	}
	if !in.modrmMem() {
		return
	}
	for range 4 {
		e := emulation{in: *in, old: *r}
		delta := want - e.linear(e.effective())
		base, hasBase := in.rm(), true
		if in.form&hasSIB != 0 {
			base = in.sib&7 | in.rex<<3&8
			hasBase = in.sib&7 != 5 || in.mod() != 0
		} else if in.form&ripRel != 0 {
			hasBase = false
		}
		switch {
		case hasBase:
			*r.gpr(base) += delta
		case in.seg == 0x64 && rng.IntN(2) == 0:
			r.FSBase += delta
			if r.FSBase>>47 != 0 {
				r.FSBase = oracleData
			}
		default:
			binary.LittleEndian.PutUint32(in.b[in.dispOff:], uint32(in.disp()+delta))
		}
	}
}

func formName(in *Insn) string {
	s := fmt.Sprintf("%02x", in.op)
	if in.omap == 1 {
		s = "0f " + s
	}
	if in.omap == 0 {
		switch in.op {
		case 0x80, 0x81, 0x83, 0xc0, 0xc1, 0xd0, 0xd1, 0xf6, 0xf7, 0xfe, 0xff:
			s += fmt.Sprintf(" /%d", in.ext())
		}
	}
	if in.modrmMem() {
		s += " m"
	}
	return s
}

// undefinedFlags are the status flags the manual leaves undefined after an
// instruction: AF of logical operations and of shifts, OF of shifts and
// rotations by more than 1 (SDM 1 appendix A). Differences there are counted
// and logged, and are no failures, as another processor may differ.
func undefinedFlags(in *Insn) uint64 {
	p := in.plan()
	switch p.act {
	case actTest:
		return FlagAF
	case actALU:
		if p.sub == aluAnd || p.sub == aluOr || p.sub == aluXor {
			return FlagAF
		}
	case actShift:
		n := in.shiftCount(p)
		var f uint64
		if n > 1 {
			f |= FlagOF
		}
		if n > 0 && p.sub >= 4 {
			f |= FlagAF
		}
		return f
	}
	return 0
}

func instances(def int) int {
	if n, err := strconv.Atoi(os.Getenv("VMPROBES_TEST_X86_INSTANCES")); err == nil {
		return n
	}
	return def
}

func fillData(rng *rand.Rand, data []byte) {
	for i := 0; i+8 <= len(data); i += 8 {
		v := randWord(rng)
		if rng.IntN(2) == 0 {
			v = rng.Uint64() >> 17 // canonical, for branches through memory
		}
		binary.LittleEndian.PutUint64(data[i:], v)
	}
}

// TestEmulateProcessor executes random instances of every opcode that is
// emulated with Emulate and with the processor and compares all registers,
// flags and memory. Where Emulate fails with an unmapped or non-canonical
// address the processor must fault.
func TestEmulateProcessor(t *testing.T) {
	tr := startTracee(t)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	base := tr.get()
	perOpcode := instances(300)

	real := make([]byte, oracleSize)
	mem := &pageMem{data: make([]byte, oracleSize)}
	done := map[string]int{}
	undef := map[string]int{}
	var executed, faults, refused, unknown int
	failures := 0

	for omap := range uint8(2) {
		for opInt := range 256 {
			op := uint8(opInt)
			fillData(rng, mem.data)
			tr.write(oracleData, mem.data)
			for got, tries := 0, 0; got < perOpcode && tries < 40*perOpcode; tries++ {
				in, err := randInsn(rng, omap, op)
				if err != nil || in.omap != omap || in.op != op || in.enc != encLegacy {
					continue
				}
				if !in.CanEmulate() {
					unknown++
					continue
				}
				r := randRegs(rng, &base)
				if in.omap == 0 && in.op == 0xff && !in.modrmMem() && rng.IntN(2) == 0 {
					*r.gpr(in.rm()) >>= 17 // a canonical target
				}
				r.IP = oracleCode + 64 + rng.Uint64N(pageSize)
				if rng.IntN(8) != 0 {
					aim(rng, &in, &r)
				}
				if d, err := Decode(in.Bytes()); err != nil || d != in {
					t.Fatalf("% x: %v, not the same after aiming", in.Bytes(), err)
				}

				want := r
				err = in.Emulate(&want, mem)
				if err != nil && want != r {
					t.Fatalf("% x: registers changed with error %v", in.Bytes(), err)
				}
				if errors.Is(err, errUnmapped) && (tr.mapped(mem.badAddr, mem.badLen)) {
					continue // something of the child's own
				}
				mustFault := errors.Is(err, errUnmapped) || errors.Is(err, errCanonical)
				if err != nil && !mustFault {
					refused++
					continue
				}
				tr.write(r.IP, in.Bytes())
				tr.set(&r)
				sig := tr.stepRaw()
				got++
				executed++
				name := formName(&in)
				if mustFault {
					faults++
					if sig != unix.SIGSEGV && sig != unix.SIGBUS {
						failures++
						t.Errorf("% x %s: Emulate said %v, processor %v\nbefore %+v", in.Bytes(), &in, err, sig, r)
					}
					// Nothing else than what a faulting call leaves may have changed.
					if err := tr.ReadVirt(oracleData, real); err != nil {
						t.Fatal(err)
					}
					seen := bytes.Clone(mem.data)
					withoutReturn(&in, &r, real, seen)
					if !bytes.Equal(real, seen) {
						failures++
						t.Errorf("% x %s: it faulted, and memory has changed\nbefore %+v", in.Bytes(), &in, r)
					}
					copy(mem.data, real)
					continue
				}
				done[name]++
				have := tr.get()
				if err := tr.ReadVirt(oracleData, real); err != nil {
					t.Fatal(err)
				}
				u := undefinedFlags(&in)
				if (have.Flags^want.Flags)&u != 0 {
					undef[fmt.Sprintf("%s: %#x", name, (have.Flags^want.Flags)&u)]++
					want.Flags = want.Flags&^u | have.Flags&u
				}
				if sig != unix.SIGTRAP || have != want || !bytes.Equal(real, mem.data) {
					failures++
					t.Errorf("% x %s (seed %d): %v\nbefore  %+v\nEmulate %+v\nCPU     %+v\nmemory equal: %v",
						in.Bytes(), &in, seed, sig, r, want, have, bytes.Equal(real, mem.data))
					copy(mem.data, real)
				}
				if failures > 10 {
					t.Fatal("too many failures")
				}
			}
		}
	}
	t.Logf("%d instances executed of %d forms (%d of them faulted as they should), %d refused for their registers, %d encodings not emulated",
		executed, len(done), faults, refused, unknown)
	few := []string{}
	for _, n := range slices.Sorted(maps.Keys(done)) {
		if done[n] < 10 {
			few = append(few, fmt.Sprintf("%s: %d", n, done[n]))
		}
	}
	t.Logf("forms: %s", strings.Join(slices.Sorted(maps.Keys(done)), ", "))
	t.Logf("forms with few instances: %v", few)
	t.Logf("undefined flags that differ on this processor: %v", undef)
}

// TestRelocateProcessor steps random instructions in place and as relocated
// copies and compares what FinishStep makes of both.
// withoutReturn makes two copies of the data after a fault the same where an indirect
// call may have pushed its return address: Intel's processors push it before they find
// that the target isn't canonical, and leave it there, AMD's don't.
func withoutReturn(in *Insn, before *Regs, a, b []byte) {
	if !in.isIndirectCall() {
		return
	}
	for sp := before.SP - 8; sp < before.SP; sp++ {
		if i := sp - oracleData; i < uint64(len(a)) {
			b[i] = a[i]
		}
	}
}

func TestRelocateProcessor(t *testing.T) {
	tr := startTracee(t)
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 2))
	base := tr.get()
	perOpcode := instances(60)
	data := make([]byte, oracleSize)
	first, second := make([]byte, oracleSize), make([]byte, oracleSize)
	var executed, faults, ripRelative, emulated, repeating, lost int
	forms := map[string]int{}
	failures := 0

	for omap := range uint8(2) {
		for opInt := range 256 {
			op := uint8(opInt)
			if !relocateTestable(omap, op) {
				continue
			}
			fillData(rng, data)
			for got, tries := 0, 0; got < perOpcode && tries < 20*perOpcode; tries++ {
				in, err := randInsn(rng, omap, op)
				if err != nil || in.omap != omap || in.op != op || in.enc != encLegacy {
					continue
				}
				if in.pfx&pfxLock != 0 || in.omap == 0 && in.op == 0x8f && in.form&ripRel != 0 {
					continue
				}
				if in.omap == 1 && in.op&0xe7 == 0xa3 && in.modrmMem() {
					continue // bit strings: far away from the address
				}
				r := randRegs(rng, &base)
				r.Flags &^= FlagAC
				if in.isString() {
					r.SI = oracleData + rng.Uint64N(oracleSize)
					r.DI = oracleData + rng.Uint64N(oracleSize)
				}
				if in.omap == 0 && in.op == 0xff && !in.modrmMem() {
					*r.gpr(in.rm()) >>= 17
				}
				from := oracleCode + 64 + rng.Uint64N(pageSize/2)
				to := oracleCode + pageSize + 64 + rng.Uint64N(pageSize/2)
				r.IP = from
				aim(rng, &in, &r)
				code, err := in.Relocate(from, to)
				if err != nil {
					if errors.Is(err, ErrNotRelocatable) {
						continue
					}
					t.Fatalf("% x: %v", in.Bytes(), err)
				}
				run := func(at uint64, code, mem []byte) (Regs, unix.Signal, error) {
					tr.write(oracleData, data)
					tr.write(at, code)
					start := r
					start.IP = at
					tr.set(&start)
					sig := tr.stepRaw()
					after := tr.get()
					var err error
					if sig == unix.SIGTRAP {
						err = in.FinishStep(&after, from, at, tr, &r)
					}
					if e := tr.ReadVirt(oracleData, mem); e != nil {
						t.Fatal(e)
					}
					return after, sig, err
				}
				a, sigA, errA := run(from, in.Bytes(), first)
				b, sigB, errB := run(to, code, second)
				got++
				executed++
				if sigA == unix.SIGTRAP {
					forms[formName(&in)]++
				}
				if sigA != unix.SIGTRAP && sigA == sigB {
					faults++
					if b.IP == to {
						b.IP = from
					}
				}
				if errors.Is(errA, ErrStepLost) && errors.Is(errB, ErrStepLost) {
					lost++
				}
				if in.RIPRelative() {
					ripRelative++
				}
				if in.Repeats() && a.IP == from {
					repeating++
				}
				if in.op == 0x9c && in.omap == 0 && sigA == unix.SIGTRAP {
					image := binary.LittleEndian.Uint16(first[a.SP-oracleData:])
					if uint64(image)&FlagTF != 0 || uint64(image)&FlagIF == 0 {
						t.Errorf("% x: pushed flags %#x", in.Bytes(), image)
					}
				}
				if sigA != unix.SIGTRAP {
					withoutReturn(&in, &r, first, second)
				}
				ok := sigA == sigB && a == b && errA == nil && errB == nil && bytes.Equal(first, second)
				// The third opinion, where there is one.
				if ok && sigA == unix.SIGTRAP && in.CanEmulate() {
					want := r
					mem := &pageMem{data: bytes.Clone(data)}
					if in.Emulate(&want, mem) == nil {
						emulated++
						u := undefinedFlags(&in)
						want.Flags = want.Flags&^u | a.Flags&u
						if want.Flags |= a.Flags & FlagRF; want != a || !bytes.Equal(mem.data, first) {
							ok = false
						}
					}
				}
				if !ok {
					failures++
					t.Errorf("% x %s as % x (seed %d): %v %v, %v %v, memory equal %v\nbefore %+v\nin place %+v\nmoved    %+v",
						in.Bytes(), &in, code, seed, sigA, errA, sigB, errB, bytes.Equal(first, second), r, a, b)
				}
				if failures > 10 {
					t.Fatal("too many failures")
				}
			}
		}
	}
	t.Logf("%d pairs of steps of %d forms: %d faulted alike, %d RIP-relative, %d repeated strings not done, %d also like Emulate, %d lost",
		executed, len(forms), faults, ripRelative, repeating, emulated, lost)
}

// relocateTestable leaves out what depends on more than the registers and
// memory the test sets: x87 (whose last-instruction pointer is state), vector
// registers, segment loads, random numbers, clocks, and state saving.
func relocateTestable(omap, op uint8) bool {
	if omap == 0 {
		switch {
		case op >= 0xd8 && op <= 0xdf, op == 0x8e, op == 0x9b:
			return false
		}
		return true
	}
	switch {
	case op >= 0x18 && op <= 0x1f, op >= 0x40 && op <= 0x4f, op >= 0x90 && op <= 0x9f:
		return true
	case op >= 0xa3 && op <= 0xa5, op >= 0xab && op <= 0xad, op == 0xaf:
		return true
	case op >= 0xb0 && op <= 0xb1, op == 0xb3, op >= 0xb6 && op <= 0xc1, op >= 0xc8 && op <= 0xcf:
		return op != 0xb9
	}
	return false
}
