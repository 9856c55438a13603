package x86

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// requireLab fails instead of skipping where the environment is meant to be complete.
func requireLab(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("VMPROBES_REQUIRE_LAB") == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

type lengthResult struct {
	insns     int // compared
	bad       int // objdump's "(bad)": nothing to compare
	prefixes  int // lines on which objdump prints lone prefixes
	fwait     int // FWAIT that objdump glues to the x87 instruction after it
	pieces    int // ".byte": objdump stops at symbols and section ends
	pfxVEX    int // 66, F2, F3 or REX before VEX, EVEX or XOP, which raises #UD (SDM 2A §2.3.2 to §2.3.4)
	mismatch  int
	noSteps   int // CanStep refuses
	emulates  int
	nops      int
	printMiss int // String fell back to hexadecimal
}

// prefixOnly reports whether b is nothing but prefixes; objdump prints these on
// their own line when it finds no instruction after them.
func prefixOnly(b []byte) bool {
	for _, c := range b {
		switch {
		case c&0xf0 == 0x40, c == 0x66, c == 0x67, c == 0xf0, c == 0xf2, c == 0xf3,
			c == 0x26, c == 0x2e, c == 0x36, c == 0x3e, c == 0x64, c == 0x65:
		default:
			return false
		}
	}
	return true
}

// prefixedVEX reports whether b is a VEX, EVEX or XOP instruction with a prefix
// that must not be there. objdump decodes it, processors do not.
func prefixedVEX(b []byte) bool {
	for i, c := range b {
		if prefixOnly(b[i : i+1]) {
			continue
		}
		if c != 0xc4 && c != 0xc5 && c != 0x62 && c != 0x8f {
			return false
		}
		for _, p := range b[:i] {
			if p&0xf0 == 0x40 || p == 0x66 || p == 0xf0 || p == 0xf2 || p == 0xf3 {
				return true
			}
		}
		return false
	}
	return false
}

// compareLengths disassembles a file with objdump and decodes each
// instruction's bytes, followed by other bytes, with Decode.
//
// objdump is told to take Intel's side where processors disagree, which is
// about 66 before near branches.
func compareLengths(t *testing.T, path string, options ...string) (lengthResult, error) {
	var res lengthResult
	args := append([]string{"-d", "-w", "-z", "-M", "intel64"}, options...)
	cmd := exec.Command("objdump", append(args, path)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return res, err
	}
	if err := cmd.Start(); err != nil {
		return res, err
	}
	sc := bufio.NewScanner(bufio.NewReaderSize(out, 1<<20))
	sc.Buffer(nil, 1<<20)
	var code [32]byte
	for sc.Scan() {
		// "ffffffff81000000:\t48 8d 25 51 3f 60 01 \tlea    0x..."
		line := sc.Bytes()
		if len(line) == 0 || line[0] != ' ' && !isHex(line[0]) {
			continue
		}
		_, rest, ok := bytes.Cut(line, []byte(":\t"))
		if !ok {
			continue
		}
		hexBytes, text, ok := bytes.Cut(rest, []byte("\t"))
		if !ok {
			// A line of prefixes only has no text with some versions.
			text = nil
		}
		n := 0
		for f := range bytes.FieldsSeq(hexBytes) {
			if len(f) != 2 || n == MaxLen+1 {
				n = -1
				break
			}
			if _, err := hex.Decode(code[n:n+1], f); err != nil {
				n = -1
				break
			}
			n++
		}
		if n <= 0 {
			continue
		}
		if bytes.Contains(text, []byte("(bad)")) {
			res.bad++
			continue
		}
		if bytes.Contains(text, []byte(".byte")) {
			res.pieces++
			continue
		}
		if prefixOnly(code[:n]) {
			res.prefixes++
			continue
		}
		for i := n; i < len(code); i++ {
			code[i] = 0x90
		}
		res.insns++
		in, err := Decode(code[:])
		if err == nil && in.Len < n && in.is(0, 0x9b) {
			res.fwait++
			continue
		}
		if errors.Is(err, ErrInvalid) && prefixedVEX(code[:n]) {
			res.pfxVEX++
			continue
		}
		if err != nil || in.Len != n {
			res.mismatch++
			if res.mismatch <= 10 {
				t.Errorf("%s: % x (%s): objdump %d, Decode %d, %v", path, code[:n], text, n, in.Len, err)
			}
			continue
		}
		if res.insns%64 == 0 { // what a prefix of an instruction must give
			for k := range n {
				if _, err := Decode(code[:k]); !errors.Is(err, ErrTruncated) {
					t.Errorf("% x cut to %d: %v", code[:n], k, err)
				}
			}
		}
		if in.CanEmulate() {
			res.emulates++
		}
		if in.IsNop() {
			res.nops++
		}
		if in.unsteppable() != "" {
			res.noSteps++
		}
		if res.insns%1024 == 0 && strings.HasPrefix(in.String(), "(") {
			res.printMiss++
		}
	}
	if err := sc.Err(); err != nil {
		return res, err
	}
	return res, cmd.Wait()
}

// TestLengthsRandom compares lengths with objdump's over random bytes, biased
// towards the rarer opcode maps and encodings.
func TestLengthsRandom(t *testing.T) {
	if _, err := exec.LookPath("objdump"); err != nil {
		requireLab(t, "no objdump (Debian package binutils): %v", err)
	}
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 3))
	rnd := func() byte { return byte(rng.Uint32()) }
	size := 1 << 20
	if testing.Short() {
		size >>= 4
	}
	var code []byte
	for len(code) < size {
		code = append(code, randPrefixes(rng)...)
		switch rng.IntN(8) {
		case 0:
			code = append(code, 0x0f)
		case 1:
			code = append(code, 0x0f, 0x38)
		case 2:
			code = append(code, 0x0f, 0x3a)
		case 3:
			code = append(code, 0x90, 0xc4, rnd()&0xe0|byte(1+rng.IntN(3)), rnd())
		case 4:
			code = append(code, 0x90, 0x62, rnd()&0xf0|byte(1+rng.IntN(3)), rnd()|4, rnd())
		case 5:
			code = append(code, 0x90, 0x8f, rnd()&0xe0|byte(8+rng.IntN(3)), rnd())
		}
		for range 2 + rng.IntN(10) {
			code = append(code, rnd())
		}
		code = append(code, bytes.Repeat([]byte{0x90}, MaxLen)...) // back in step
	}
	path := filepath.Join(t.TempDir(), "random")
	if err := os.WriteFile(path, code, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := compareLengths(t, path, "-D", "-b", "binary", "-m", "i386:x86-64")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("seed %d: %+v", seed, r)
	if r.insns < size/8 {
		t.Error("too little was compared")
	}
}

// TestLengthsAllOpcodes compares lengths with objdump's over every opcode of
// every map in each encoding, with the prefixes that select instructions, all
// opcode extensions and the kinds of ModRM operand.
func TestLengthsAllOpcodes(t *testing.T) {
	if _, err := exec.LookPath("objdump"); err != nil {
		requireLab(t, "no objdump (Debian package binutils): %v", err)
	}
	if testing.Short() {
		t.Skip("long")
	}
	pad := bytes.Repeat([]byte{0x90}, MaxLen) // operand bytes, and back in step
	modrms := []byte{0xc1, 0x05, 0x44, 0x84, 0x04, 0x03}
	var code []byte
	add := func(parts ...[]byte) {
		for _, p := range parts {
			code = append(code, p...)
		}
		code = append(code, pad...)
	}
	prefixes := []string{"", "\x66", "\xf2", "\xf3", "\x48", "\x66\x48", "\xf2\x48", "\xf3\x48", "\x67"}
	for op := range 256 {
		for _, m := range modrms {
			for ext := range byte(8) {
				tail := []byte{byte(op), m | ext<<3, 0x25}
				for _, esc := range []string{"", "\x0f", "\x0f\x38", "\x0f\x3a"} {
					if esc == "\x0f" && (op == 0x38 || op == 0x3a) || len(esc) == 2 && ext != 0 {
						continue
					}
					for _, p := range prefixes {
						add([]byte(p), []byte(esc), tail)
					}
				}
			}
			tail := []byte{byte(op), m, 0x25}
			for pp := range byte(16) { // W, L, pp
				w, l := pp>>3<<7, pp>>2&1
				for omap := range byte(3) {
					add([]byte{0xc4, 0xe1 + omap, w | 0x78 | l<<2 | pp&3}, tail)
					add([]byte{0xc4, 0xe1 + omap, w | 0x30 | l<<2 | pp&3}, tail)
					add([]byte{0x62, 0xf1 + omap, w | 0x7c | pp&3, 0x08 | l<<6}, tail)
					add([]byte{0x62, 0xf1 + omap, w | 0x34 | pp&3, 0x09 | l<<5}, tail)
					add([]byte{0x8f, 0xe8 + omap, w | 0x78 | l<<2 | pp&3}, tail)
				}
				add([]byte{0xc5, 0xf8 | l<<2 | pp&3}, tail)
			}
		}
	}
	path := filepath.Join(t.TempDir(), "opcodes")
	if err := os.WriteFile(path, code, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := compareLengths(t, path, "-D", "-b", "binary", "-m", "i386:x86-64")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
}

func isHex(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' }

func isAMD64(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return f.Machine == elf.EM_X86_64
}

// TestLengthsObjdump compares instruction lengths with objdump's over real
// binaries: some by default, all of /usr/bin and the libraries with
// VMPROBES_TEST_X86_ALL=1, and the kernels in VMPROBES_TEST_VMLINUX, which is
// a list as PATH is.
func TestLengthsObjdump(t *testing.T) {
	if _, err := exec.LookPath("objdump"); err != nil {
		requireLab(t, "no objdump (Debian package binutils): %v", err)
	}
	var files []string
	all := os.Getenv("VMPROBES_TEST_X86_ALL") == "1"
	for _, pattern := range []string{"/usr/bin/*", "/usr/sbin/*", "/usr/lib/x86_64-linux-gnu/*.so*"} {
		names, _ := filepath.Glob(pattern)
		files = append(files, names...)
	}
	seen := map[string]bool{}
	var real []string
	for _, f := range files {
		f, err := filepath.EvalSymlinks(f)
		if err != nil || seen[f] {
			continue
		}
		seen[f] = true
		if fi, err := os.Stat(f); err != nil || !fi.Mode().IsRegular() || !isAMD64(f) {
			continue
		}
		real = append(real, f)
	}
	sort.Strings(real)
	if !all {
		const most = 12
		var some []string
		for i := range min(most, len(real)) {
			f := real[i*len(real)/most]
			if fi, err := os.Stat(f); err == nil && fi.Size() < 3<<20 {
				some = append(some, f)
			}
		}
		real = some
	}
	if runtime.GOARCH == "amd64" && runtime.GOOS == "linux" {
		if exe, err := os.Executable(); err == nil {
			real = append(real, exe)
		}
	}
	real = append(real, filepath.SplitList(os.Getenv("VMPROBES_TEST_VMLINUX"))...)
	if len(real) == 0 {
		requireLab(t, "no amd64 ELF files here")
	}
	if testing.Short() {
		real = real[:1]
	}

	var mu sync.Mutex
	var total lengthResult
	var wg sync.WaitGroup
	sem := make(chan struct{}, runtime.GOMAXPROCS(0))
	for _, f := range real {
		wg.Go(func() {
			sem <- struct{}{}
			defer func() { <-sem }()
			r, err := compareLengths(t, f)
			if err != nil {
				t.Errorf("%s: %v", f, err)
			}
			mu.Lock()
			defer mu.Unlock()
			if r.insns > 1_000_000 || r.mismatch != 0 {
				t.Logf("%s: %+v", f, r)
			}
			total.insns += r.insns
			total.bad += r.bad
			total.prefixes += r.prefixes
			total.fwait += r.fwait
			total.pieces += r.pieces
			total.pfxVEX += r.pfxVEX
			total.mismatch += r.mismatch
			total.noSteps += r.noSteps
			total.emulates += r.emulates
			total.nops += r.nops
			total.printMiss += r.printMiss
		})
	}
	wg.Wait()
	t.Logf("%d files: %+v", len(real), total)
	if total.insns == 0 {
		t.Error("nothing compared")
	}
}

// xenCPUID is the beginning of xen_cpuid in Debian's 6.1 kernel, with the UD2,
// "xen" and CPUID at prefixedCPUID.
const (
	xenCPUID = "e82b3e0500" + "4989f8" + "4989c9" + "4889d7" + "458b10" + "4183fa05" + "742a" + "53" +
		"4489d0" + "8b0a" + "0f0b78656e0fa2" + "418900" + "31c0" + "4183fa0b" + "0f95c0" + "891e"
	prefixedCPUID = 0x1d
)

// TestEmulatePrefix: the boundaries in code with an emulate prefix are those that
// objdump finds with a NOP in its place, except the one behind it. Nothing
// executes a copy of it.
func TestEmulatePrefix(t *testing.T) {
	code, err := hex.DecodeString(xenCPUID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("objdump"); err != nil {
		requireLab(t, "no objdump (Debian package binutils): %v", err)
	}
	path := filepath.Join(t.TempDir(), "nop")
	nop := append([]byte(nil), code...)
	copy(nop[prefixedCPUID:], "\x0f\x1f\x44\x00\x00")
	if err := os.WriteFile(path, nop, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("objdump", "-D", "-w", "-z", "-b", "binary", "-m", "i386:x86-64", path)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	starts := map[uint64]bool{}
	for line := range strings.Lines(string(out)) {
		if addr, _, ok := strings.Cut(line, ":\t"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(addr), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			starts[n] = true
		}
	}
	const cpuid = prefixedCPUID + 5
	if len(starts) < 15 || !starts[prefixedCPUID] || !starts[cpuid] || !starts[cpuid+2] {
		t.Fatalf("objdump's starts: %v", starts)
	}
	delete(starts, cpuid)
	for _, by := range []string{"xen", "kvm"} {
		copy(code[prefixedCPUID+2:], by)
		for off := range uint64(len(code)) {
			err := FindBoundary(code, kernText, kernText+off)
			if (err == nil) != starts[off] {
				t.Errorf("%s: +%#x: %v", by, off, err)
			}
			if err != nil && off > prefixedCPUID && off < cpuid+2 && !strings.Contains(err.Error(), "7-byte instruction at 0xffffffff8100001d") {
				t.Error(err)
			}
		}
		in, err := Decode(code[prefixedCPUID:])
		if err != nil {
			t.Fatal(err)
		}
		if in.CanEmulate() || !errors.Is(in.CanStep(), ErrNotSteppable) {
			t.Errorf("%s can be executed", &in)
		}
		if _, err := in.Relocate(kernText, kernText+64); !errors.Is(err, ErrNotRelocatable) {
			t.Errorf("%s can be copied: %v", &in, err)
		}
	}
	// UD2 and other letters, as behind Linux' WARN, are what they look like.
	copy(code[prefixedCPUID+2:], "xep")
	if err := FindBoundary(code, kernText, kernText+prefixedCPUID+2); err != nil {
		t.Error(err)
	}
	// What follows the prefix is cut, or is no instruction.
	for _, tail := range []string{"", "0f", "06"} {
		cut, _ := hex.DecodeString("0f0b78656e" + tail)
		if err := FindBoundary(append(cut, 0x0f), kernText, kernText+uint64(len(cut))); !errors.Is(err, ErrNotBoundary) {
			t.Errorf("% x: %v", cut, err)
		}
	}
}
