package linux_test

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
)

// jump returns a direct jump, or call, of 5 bytes.
func jump(op byte, from, to uint64) []byte {
	return binary.LittleEndian.AppendUint32([]byte{op}, uint32(to-from-5))
}

// returning makes code of a synthetic kernel's functions from 600 on, which end in NOPs
// where nothing else is said, and so lead to the next.
func returning() *kerneltest.Synthetic {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	fn, thunk := kerneltest.Fn, s.Sym["__x86_return_thunk"]
	for i, b := range map[uint64][]byte{
		600: {0xc3},
		601: jump(0xe9, fn(601), fn(600)),
		602: {0x74, 0x02, 0xc3, 0x90, 0xc2, 0x08, 0x00},
		603: {0x74, 0x02, 0xff, 0xe0, 0xc3},
		604: jump(0xe8, fn(604), fn(600)), // doesn't come back
		605: {0x0f, 0x0b, 0xf3, 0xc3},     // a warning
		606: {0x0f, 0x0b, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc},
		607: {0x90, 0xeb, 0xfd},
		608: append(jump(0xe8, fn(608), fn(600)), 0xcc, 0x90, 0xc3), // a probe of the guest's own
		609: {0x31, 0xc0},                                           // leads to the next
		610: {0xc3},
		611: {0x90, 0x74, 0xfd, 0xc3},
		612: jump(0xe9, fn(612), thunk),
		613: append(append([]byte{0x0f, 0x84}, jump(0, fn(613)+1, thunk)[1:]...), 0xc3), // JE
		614: jump(0xe9, fn(614), s.Sym["__x86_indirect_thunk_rax"]),
		615: jump(0xe9, fn(615), fn(604)),
		616: {0x48, 0xcf, 0xc3}, // IRET
		617: {0x0f, 0x07},       // SYSRET
		618: jump(0xe9, fn(618), kerneltest.SyntheticText+0x40000000),
		619: {0xe8, 0x01, 0, 0, 0, 0xcc, 0x48, 0x83, 0xc4, 0x08, 0xc3}, // for the return stack buffer
		620: {0xff, 0xd0, 0xc3},
		621: {0xff, 0x10}, // the same, which doesn't come back
		622: {0x0f, 0x0b, 'x', 'e', 'n', 0x0f, 0xa2, 0xc3},
		623: jump(0xe9, fn(623), fn(200)),
		624: {0x06},                         // no instruction
		625: {0xe3, 0x01, 0xc3, 0xc3},       // JRCXZ
		626: {0xc7, 0xf8, 0, 0, 0, 0},       // XBEGIN
		627: {0xf4, 0xeb, 0xfd},             // HLT, for ever
		628: {0xcc, 0x1f, 0x44, 0, 0, 0xc3}, // a probe of the guest's own
		629: jump(0xe9, fn(629), s.Sym["text demo"]+0x10),
		630: jump(0xe9, fn(630), s.Sym["__pi___x86_indirect_thunk_rbx"]),
		200: {0xc3},
		310: append(jump(0xe8, fn(310), fn(600)), 0xc3),
	} {
		copy(s.Bytes(fn(i)), b)
	}
	// What is behind jump labels, and where they lead.
	for _, at := range []uint64{fn(300) + 5, fn(300) + 15, fn(301) + 2, fn(301) + 15, fn(311) + 6} {
		s.Bytes(at)[0] = 0xc3
	}
	demo := s.Sym["text demo"]
	copy(s.Bytes(demo), jump(0xe9, demo, fn(602)))
	s.Bytes(demo + 0x10)[0] = 0xc3
	return s
}

func TestExits(t *testing.T) {
	s := returning()
	k := discover(t, s)
	fn, demo := kerneltest.Fn, s.Sym["text demo"]
	at := func(a ...uint64) []uint64 { return a }
	for _, c := range []struct {
		fn        uint64
		at, tails []uint64
		err       error
		why       string
		open      bool
	}{
		{fn(600), at(fn(600)), nil, nil, "", false},
		{fn(601), at(fn(600)), at(fn(600)), nil, "", false},
		{fn(602), at(fn(602)+2, fn(602)+4), nil, nil, "", false},
		{fn(603), at(fn(603) + 4), nil, linux.ErrNoExits, `("fn_0603"+0x2): an indirect jump`, true},
		{fn(604), nil, nil, linux.ErrNeverReturns, "", false},
		{fn(605), at(fn(605) + 2), nil, nil, "", false},
		{fn(606), nil, nil, linux.ErrNeverReturns, "", false},
		{fn(607), nil, at(fn(607)), linux.ErrNeverReturns, "", false},
		{fn(608), nil, nil, linux.ErrNoExits, `("fn_0608"+0x5): an int3 is there`, true},
		{fn(609), at(fn(610)), at(fn(610)), nil, "", false},
		{fn(611), at(fn(611) + 3), at(fn(611)), nil, "", false},
		{fn(612), at(fn(612)), nil, nil, "", false},
		{fn(613), at(fn(613) + 6), nil, linux.ErrNoExits, `a jump to "__x86_return_thunk"`, true},
		{fn(614), nil, nil, linux.ErrNoExits, `a jump to "__x86_indirect_thunk_rax"`, true},
		{fn(615), nil, at(fn(604)), linux.ErrNeverReturns, "", false},
		{fn(616), at(fn(616) + 2), nil, linux.ErrNoExits, "an IRET", true},
		{fn(617), nil, nil, linux.ErrNoExits, "user mode", true},
		{fn(618), nil, nil, linux.ErrNoExits, "in no function", true},
		{fn(619), at(fn(619) + 10), nil, nil, "", false},
		{fn(620), at(fn(620) + 2), nil, nil, "", false},
		{fn(621), nil, nil, linux.ErrNeverReturns, "", false},
		{fn(622), at(fn(622) + 7), nil, nil, "", false},
		{fn(623), at(fn(200)), at(fn(200)), linux.ErrNoExits, "kprobe blacklist", false},
		{fn(624), nil, nil, linux.ErrNoExits, "invalid instruction", true},
		{fn(625), at(fn(625)+2, fn(625)+3), nil, nil, "", false},
		{fn(627), nil, at(fn(627)), linux.ErrNeverReturns, "", false},
		{fn(628), nil, nil, linux.ErrNoExits, "an int3 is there", true},
		{fn(629), nil, nil, linux.ErrNoExits, "in no function", true},
		{fn(630), nil, nil, linux.ErrNoExits, `a jump to "__pi___x86_indirect_thunk_rbx"`, true},
		{fn(300), at(fn(300)+5, fn(300)+15), nil, nil, "", false},
		{fn(301), at(fn(301)+2, fn(301)+15), nil, nil, "", false},
		{fn(310), at(fn(310) + 5), nil, nil, "", false},
		{fn(311), at(fn(311) + 6), nil, linux.ErrNoExits, "a static call", true},
		{demo, at(fn(602)+2, fn(602)+4), at(fn(602)), nil, "", false},
		{demo + 0x10, at(demo + 0x10), nil, nil, "", false},
		{fn(600) + 1, nil, nil, linux.ErrNotEntry, `behind that of "fn_0600"`, true},
		{1, nil, nil, linux.ErrNotEntry, "no symbol", true},
	} {
		e, err := k.Exits(c.fn)
		require.ErrorIs(t, err, c.err, "%#x", c.fn)
		if c.err != nil {
			require.ErrorContains(t, err, c.why)
			requirePrintable(t, err.Error())
		}
		assert.Equal(t, linux.Exits{At: c.at, Tails: c.tails, Open: c.open}, e, "%#x", c.fn)
	}
	_, err := k.Exits(fn(626))
	require.ErrorContains(t, err, "a branch whose way isn't known")

	// Whatever the jump label is now, and who calls what now.
	copy(s.Bytes(fn(300)), jump(0xe9, fn(300), fn(300)+15))
	e, err := k.Exits(fn(300))
	require.NoError(t, err)
	assert.Equal(t, at(fn(300)+5, fn(300)+15), e.At)
	copy(s.Bytes(fn(310)), []byte{0x0f, 0x1f, 0x44, 0, 0})
	_, err = k.Exits(fn(310))
	require.NoError(t, err)
	copy(s.Bytes(fn(310)), jump(0xe9, fn(310), fn(600)))
	_, err = k.Exits(fn(310))
	require.ErrorIs(t, err, linux.ErrNoExits)
	copy(s.Bytes(fn(310)), []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc})
	_, err = k.Exits(fn(310))
	require.ErrorContains(t, err, "a static call")

	// The caller's own breakpoint isn't the guest's.
	k.SetOverlay(func(addr uint64, b []byte) {
		if off := fn(628) - addr; off < uint64(len(b)) {
			b[off] = 0x0f
		}
	})
	e, err = k.Exits(fn(628))
	require.NoError(t, err)
	assert.Equal(t, at(fn(628)+5), e.At)
}

// TestExitsBounds has code that never ends.
func TestExitsBounds(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	fn := kerneltest.Fn
	for i := range uint64(1000) { // each ends in a jump to two others
		b := s.Bytes(fn(1000 + i))
		copy(b, append([]byte{0x0f, 0x84}, jump(0, fn(1000+i)+1, fn(1000+(i*7+1)%1000))[1:]...))
		copy(b[6:], jump(0xe9, fn(1000+i)+6, fn(1000+(i*11+3)%1000)))
	}
	_, err := k.Exits(fn(1000))
	require.ErrorIs(t, err, linux.ErrNoExits)
	assert.ErrorContains(t, err, "more than 32 others")

	// 15 exits a function.
	for i := range uint64(3) {
		for j := range uint64(7) {
			copy(s.Bytes(fn(2100+i) + 2*j)[:2], []byte{0x74, 0x00})
		}
		copy(s.Bytes(fn(2100+i)), []byte{0x74, 1, 0xc3, 0x74, 1, 0xc3, 0x74, 1, 0xc3, 0x74, 1, 0xc3, 0x74, 1, 0xc3, 0x90})
	}
	s.Bytes(fn(2103))[0] = 0xc3
	e, err := k.Exits(fn(2100))
	require.NoError(t, err)
	assert.Len(t, e.At, 16)
	for i := uint64(3); i < 8; i++ {
		copy(s.Bytes(fn(2100+i)), s.Bytes(fn(2100))[:16])
	}
	e, err = k.Exits(fn(2100))
	require.ErrorIs(t, err, linux.ErrNoExits)
	assert.ErrorContains(t, err, "more than 32 exits")
	assert.Len(t, e.At, 32)
	assert.True(t, e.Open)

	// A function of 64 KiB, by its symbol, of the shortest instructions: it is entry
	// code, int3 and what is behind it.
	assert.Less(t, allocated(func() {
		for i := range uint64(100) {
			_, _ = k.Exits(fn(1000 + i))
		}
		_, err = k.Exits(s.Sym["__entry_text_end"])
	}), uint64(64<<20))
	require.Error(t, err)

	// Nothing is known of what the kernel rewrites.
	k = discover(t, kerneltest.NewSynthetic(kerneltest.Layout{NoData: true}))
	_, err = k.Exits(fn(1))
	require.ErrorIs(t, err, linux.ErrNoExits)
}

// TestExitsCallAtTheEnd: what stands behind the last instruction of a function isn't looked at as
// its own.
func TestExitsCallAtTheEnd(t *testing.T) {
	s := returning()
	fn := kerneltest.Fn(631)
	copy(s.Bytes(fn+11), jump(0xe8, fn+11, fn+1))
	k := discover(t, s)
	assert.NotPanics(t, func() { _, _ = k.Exits(fn) })
	x, err := k.Exits(kerneltest.Fn(1 << 20)) // no function
	require.ErrorIs(t, err, linux.ErrNotEntry)
	assert.True(t, x.Open, "what isn't known may be")
}
