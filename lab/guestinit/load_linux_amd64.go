package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"
)

// The load opens target.
const (
	target     = "/lab-probe-target"
	targetText = "opened by the lab\n"
)

// batch is how many calls are made between two looks at the stop flag.
const batch = 32

// guest is the state of the load.
type guest struct {
	cpus       []*worker
	hasYMM     bool
	badAtStart int

	stopFlag atomic.Bool
	busyJobs sync.WaitGroup
	running  atomic.Int64

	rounds    atomic.Uint64 // of the background checkers
	ymmBad    atomic.Uint64 // found by them
	memBad    atomic.Uint64
	openBad   atomic.Uint64 // found by the openers
	openFails atomic.Uint64

	storm storm
}

// worker is a thread bound to one CPU.
type worker struct {
	cpu    int
	thread int
	jobs   chan func()
	made   atomic.Uint64
}

func newGuest(cpus int) *guest {
	g := &guest{hasYMM: cpu.X86.HasAVX}
	if err := os.WriteFile(target, []byte(targetText), 0o644); err != nil {
		say("ERR %v", err)
	}
	for i := range cpus {
		g.addWorker(i)
	}
	return g
}

func (g *guest) addWorker(cpu int) {
	w := &worker{cpu: cpu, jobs: make(chan func())}
	g.cpus = append(g.cpus, w)
	ready := make(chan struct{})
	go func() {
		bind(w.cpu)
		w.thread = unix.Gettid()
		close(ready)
		for job := range w.jobs {
			job()
		}
	}()
	<-ready
}

// online brings a CPU up and gives it a worker. It must be the next one.
func (g *guest) online(cpu uint64) (string, error) {
	if cpu != uint64(len(g.cpus)) {
		return "", fmt.Errorf("online: the next CPU is %d", len(g.cpus))
	}
	file := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", cpu)
	if err := os.WriteFile(file, []byte("1"), 0o644); err != nil {
		return "", err
	}
	g.addWorker(int(cpu))
	return fmt.Sprintf("online cpus=%d", len(g.cpus)), nil
}

// threads names the threads that make the load.
func (g *guest) threads() string {
	var reply strings.Builder
	reply.WriteString("threads")
	for _, w := range g.cpus {
		reply.WriteString(fmt.Sprintf(" cpu%d=%d", w.cpu, w.thread))
	}
	return reply.String()
}

// startCheckers starts what runs beside the load. The garbage collector must
// be off by then: it could not stop a loop that lives in assembly.
func (g *guest) startCheckers() {
	for i := range g.cpus {
		if g.hasYMM {
			go g.checkYMM(i)
		}
	}
	go g.checkMemory()
}

// bind keeps the calling goroutine on its thread and the thread on one CPU.
// The thread gets no SIGURG: the runtime sends it in quick succession to a
// thread that spends its time in assembly, in the hope to interrupt it, and
// each one ends a sleep.
func bind(n int) {
	runtime.LockOSThread()
	var urgent unix.Sigset_t
	urgent.Val[0] = 1 << (unix.SIGURG - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &urgent, nil); err != nil {
		say("ERR block SIGURG: %v", err)
	}
	var set unix.CPUSet
	set.Set(n)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		say("ERR bind to cpu %d: %v", n, err)
	}
}

// pattern returns 32 bytes that differ for each seed.
func pattern(seed int) *[32]byte {
	var p [32]byte
	for i := range p {
		p[i] = byte(0xa5 ^ (i*37 + seed*11))
	}
	return &p
}

// checkYMM keeps ymm registers live on one CPU, for a part of the time only so
// that the load gets the rest.
func (g *guest) checkYMM(n int) {
	bind(n)
	p, pause := pattern(n), [2]int64{0, 50_000_000}
	for {
		if ymmLoop(p, 50_000, &pause) != 0 {
			g.ymmBad.Add(1)
		}
		g.rounds.Add(1)
	}
}

// checkMemory compares two halves of a buffer whose content is known.
func (g *guest) checkMemory() {
	want := make([]byte, 256<<10)
	for i := range want {
		want[i] = byte(i*7 + i>>8)
	}
	have := bytes.Clone(want)
	for {
		time.Sleep(100 * time.Millisecond)
		if !bytes.Equal(want, have) {
			g.memBad.Add(1)
			copy(have, want)
		}
		g.rounds.Add(1)
	}
}

// run makes up to n calls on the calling thread; n < 0 means until stopped. It rests
// so many times as long as each call took.
func (g *guest) run(w *worker, n int64, until time.Time, rest uint64) {
	path := append([]byte(target), 0)
	var p *[32]byte
	if g.hasYMM {
		p = pattern(100 + w.cpu)
	}
	for n != 0 && (n > 0 || !g.stopFlag.Load()) && (until.IsZero() || time.Now().Before(until)) {
		count := int64(batch)
		if rest > 0 {
			count = 1
		}
		if n > 0 {
			count = min(count, n)
			n -= count
		}
		began := time.Now()
		made, failed, bad := openLoop(&path[0], uint64(count), p)
		w.made.Add(made)
		if failed != 0 {
			g.openFails.Add(failed)
		}
		if bad != 0 {
			g.openBad.Add(bad)
		}
		if rest > 0 {
			time.Sleep(time.Duration(rest) * time.Since(began))
		}
	}
}

// warmUp runs everything once, so that nothing is set up later.
func (g *guest) warmUp() {
	_, _ = g.open(100, "all")
	for _, w := range g.cpus {
		w.made.Store(0)
	}
}

// workers returns the workers a command names.
func (g *guest) workers(which string) ([]*worker, error) {
	switch which {
	case "all":
		return g.cpus, nil
	case "":
		return g.cpus[:1], nil
	}
	n, err := strconv.Atoi(which)
	if err != nil || n < 0 || n >= len(g.cpus) {
		return nil, fmt.Errorf("no cpu %q: there are %d", which, len(g.cpus))
	}
	return g.cpus[n : n+1], nil
}

func (g *guest) open(n uint64, which string) (string, error) {
	if g.running.Load() != 0 {
		return "", fmt.Errorf("open: busy is still running")
	}
	workers, err := g.workers(which)
	if err != nil {
		return "", err
	}
	before := make([]uint64, len(g.cpus))
	for i, w := range g.cpus {
		before[i] = w.made.Load()
	}
	failed, bad := g.openFails.Load(), g.openBad.Load()
	bgBad, memBad := g.ymmBad.Load(), g.memBad.Load()

	var wg sync.WaitGroup
	for _, w := range workers {
		wg.Add(1)
		w.jobs <- func() {
			defer wg.Done()
			g.run(w, int64(n), time.Time{}, 0)
		}
	}
	wg.Wait()

	if failed = g.openFails.Load() - failed; failed != 0 {
		return "", fmt.Errorf("open: %d of the calls failed", failed)
	}
	var total uint64
	var each strings.Builder
	for i, w := range g.cpus {
		made := w.made.Load() - before[i]
		total += made
		fmt.Fprintf(&each, " cpu%d=%d", i, made)
	}
	return fmt.Sprintf("open total=%d%s ymm=%s mem=%s", total, each.String(),
		g.ymm(g.openBad.Load()-bad+g.ymmBad.Load()-bgBad), mem(g.memBad.Load()-memBad)), nil
}

func (g *guest) ymm(bad uint64) string {
	switch {
	case !g.hasYMM:
		return "none"
	case bad == 0:
		return "ok"
	}
	return fmt.Sprintf("BAD:%d", bad)
}

func mem(bad uint64) string {
	if bad == 0 {
		return "ok"
	}
	return fmt.Sprintf("BAD:%d", bad)
}

func (g *guest) busy(d time.Duration, which, resting string) (string, error) {
	if g.running.Load() != 0 {
		return "", fmt.Errorf("busy: running already")
	}
	var rest uint64
	if resting != "" {
		var err error
		if rest, err = strconv.ParseUint(resting, 10, 16); err != nil {
			return "", fmt.Errorf("busy: how long to rest: %w", err)
		}
	}
	workers, err := g.workers(which)
	if err != nil {
		return "", err
	}
	var until time.Time
	if d > 0 {
		until = time.Now().Add(d)
	}
	g.stopFlag.Store(false)
	for _, w := range workers {
		g.busyJobs.Add(1)
		g.running.Add(1)
		w.jobs <- func() {
			defer g.busyJobs.Done()
			defer g.running.Add(-1)
			g.run(w, -1, until, rest)
		}
	}
	return fmt.Sprintf("busy cpus=%d", len(workers)), nil
}

func (g *guest) stop() (string, error) {
	g.stopFlag.Store(true)
	g.busyJobs.Wait()
	return "stop " + g.totals(), nil
}

func (g *guest) totals() string {
	var total uint64
	var each strings.Builder
	for i, w := range g.cpus {
		made := w.made.Load()
		total += made
		fmt.Fprintf(&each, " cpu%d=%d", i, made)
	}
	return fmt.Sprintf("running=%d total=%d%s failed=%d ymm=%s mem=%s", g.running.Load(), total, each.String(),
		g.openFails.Load(), g.ymm(g.openBad.Load()+g.ymmBad.Load()), mem(g.memBad.Load()))
}

func (g *guest) check() string {
	return fmt.Sprintf("check rounds=%d ymm=%s mem=%s", g.rounds.Load(), g.ymm(g.openBad.Load()+g.ymmBad.Load()), mem(g.memBad.Load()))
}

func openPath(path string) (string, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil || path == "" {
		return "", fmt.Errorf("openpath: want a path")
	}
	fd, errno := openat(name)
	if errno != 0 {
		return fmt.Sprintf("openpath calls=1 failed errno=%d", errno), nil
	}
	_ = unix.Close(fd)
	return "openpath calls=1 opened", nil
}

// openat opens a file to read it.
func openat(path *byte) (fd int, errno unix.Errno) {
	at := unix.AT_FDCWD
	r, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(at), uintptr(unsafe.Pointer(path)), unix.O_RDONLY, 0, 0, 0)
	return int(r), errno
}
