package kernels

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/internal/qemutest"
	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
)

var (
	page  = flag.String("write", "", "write the table to this file")
	which = flag.String("kernels", ".", "kernels to run: a regular expression for their releases")
	each  = flag.Int("each", 0, "how many kernels of each family to run; 0: all")
	total = flag.Duration("for", 0, "begin no kernel after this time")
	again = flag.Bool("again", false, "run kernels again that were exact when this program ran them")
)

// perKernel bounds the time that one kernel takes, a boot on a busy machine included.
const perKernel = 10 * time.Minute

// labEnv names the lab's program, which fetches the kernels.
const labEnv = "VMPROBES_LAB"

// TestKernels runs one kernel after the other.
func TestKernels(t *testing.T) {
	lab := os.Getenv(labEnv)
	if lab == "" {
		t.Skip(labEnv + " is not set: make test-kernels runs this, for hours")
	}
	t.Setenv(kerneltest.RequireEnv, "1") // here QEMU must be there
	pattern, err := regexp.Compile(*which)
	require.NoError(t, err)
	out, err := exec.CommandContext(t.Context(), lab, "kernels").Output()
	require.NoError(t, err)
	var list List
	require.NoError(t, json.Unmarshal(out, &list))
	agents := map[string]string{"amd64": buildAgent(t, "amd64"), "i386": buildAgent(t, "386")}
	kept := newStore(t, agents["amd64"], agents["i386"])
	qemu := version(t)
	var chosen []Package
	ran := map[string]int{} // by family
	for _, p := range Order(list.Packages) {
		switch {
		case !pattern.MatchString(p.Release):
		case !*again && kept.exact(p):
			ran[p.Family()]++
		default:
			chosen = append(chosen, p)
		}
	}
	t.Logf("%d kernels can be had; %d are to be run; results are kept in %s", len(list.Packages), len(chosen), kept.dir)
	began := time.Now()
	var ahead <-chan fetched // the next kernel, while this one runs
	var aheadOf string
	for i, p := range chosen {
		if *total != 0 && time.Since(began) > *total {
			t.Logf("the time is over: %d kernels are left", len(chosen)-i)
			break
		}
		if *each > 0 && ran[p.Family()] >= *each {
			continue
		}
		if ahead == nil || aheadOf != p.Release {
			ahead = fetch(t.Context(), lab, p)
		}
		got := <-ahead
		ahead = nil
		if got.err == nil {
			ran[p.Family()]++
		}
		if n := slices.IndexFunc(chosen[i+1:], func(p Package) bool { return *each == 0 || ran[p.Family()] < *each }); n >= 0 {
			aheadOf = chosen[i+1+n].Release
			ahead = fetch(t.Context(), lab, chosen[i+1+n])
		}
		t.Run(p.Release, func(t *testing.T) {
			r := Result{Package: p, Day: time.Now().UTC().Format(time.DateOnly), QEMU: qemu, Cells: map[string]string{}}
			began := time.Now()
			defer func() {
				r.Seconds = int(time.Since(began).Seconds())
				for i, w := range r.Wrong {
					r.Wrong[i] = paths.ReplaceAllString(w, "…")
				}
				if t.Failed() && len(r.Wrong) == 0 {
					r.Wrong = append(r.Wrong, "the comparison came to no end")
				}
				kept.put(t, r)
				kept.write(t, list)
				t.Logf("%s in %d s", r.row(), r.Seconds)
			}()
			if got.err != nil {
				r.Unfetched = "the mirror lists it and can't deliver it"
				t.Logf("%s: %v", r.Unfetched, got.err)
				return
			}
			run(t, &r, got.archive, agents[p.Arch])
			for _, w := range r.Wrong {
				t.Error(w)
			}
		})
	}
	kept.write(t, list)
}

// paths matches those of a run's own files, which mean nothing later.
var paths = regexp.MustCompile(`/(?:tmp|dev/shm)/[^\s:]+`)

// version returns that of QEMU.
func version(t *testing.T) string {
	out, err := exec.CommandContext(t.Context(), qemutest.Binary(t), "--version").Output()
	require.NoError(t, err)
	v := regexp.MustCompile(`version ([0-9.]+[0-9])`).FindStringSubmatch(string(out))
	require.NotNil(t, v, "%s", out)
	return v[1]
}

type fetched struct {
	archive string
	err     error
}

// fetch fetches a kernel, while the one before it runs.
func fetch(ctx context.Context, lab string, p Package) <-chan fetched {
	c := make(chan fetched, 1)
	go func() {
		cmd := exec.CommandContext(ctx, lab, "kernels", "--get", p.Release)
		var said bytes.Buffer
		cmd.Stderr = &said
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, said.String())
		}
		c <- fetched{strings.TrimSpace(string(out)), err}
	}()
	return c
}

// store keeps the last result of each kernel.
type store struct {
	dir     string
	program string // sum of what runs: this program, with all that is tested, and the agents
}

func newStore(t *testing.T, programs ...string) *store {
	base := os.Getenv("VMPROBES_CACHE")
	if base == "" {
		dir, err := os.UserCacheDir()
		require.NoError(t, err)
		base = filepath.Join(dir, "vmprobes")
	}
	own, err := os.Executable()
	require.NoError(t, err)
	sum := sha256.New()
	for _, p := range append(programs, own) {
		b, err := os.ReadFile(p)
		require.NoError(t, err)
		sum.Write(b)
	}
	s := &store{filepath.Join(base, "kernels"), fmt.Sprintf("%x", sum.Sum(nil))[:12]}
	require.NoError(t, os.MkdirAll(s.dir, 0o755))
	return s
}

func (s *store) file(p Package) string {
	return filepath.Join(s.dir, fmt.Sprintf("%s_%s.json", p.Release, p.Version))
}

// exact reports whether this program has run a kernel, and all that was read of it is right.
func (s *store) exact(p Package) bool {
	var r Result
	b, err := os.ReadFile(s.file(p))
	return err == nil && json.Unmarshal(b, &r) == nil && r.Program == s.program && r.Unfetched == "" && len(r.Wrong) == 0
}

// put keeps a result. That a kernel can't be had now is no reason to forget what it was.
func (s *store) put(t *testing.T, r Result) {
	r.Program = s.program
	if _, err := os.Stat(s.file(r.Package)); err == nil && r.Unfetched != "" {
		return
	}
	b, err := json.MarshalIndent(r, "", "  ")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.file(r.Package), b, 0o644))
}

// write writes the table, of all that is kept.
func (s *store) write(t *testing.T, list List) {
	if *page == "" {
		return
	}
	files, err := filepath.Glob(filepath.Join(s.dir, "*.json"))
	require.NoError(t, err)
	var results []Result
	for _, f := range files {
		b, err := os.ReadFile(f)
		require.NoError(t, err)
		var r Result
		require.NoError(t, json.Unmarshal(b, &r), f)
		r.Earlier = r.Program != s.program
		results = append(results, r)
	}
	require.NoError(t, os.WriteFile(*page, []byte(Table(list, results)), 0o644))
}

func buildAgent(t *testing.T, arch string) string {
	file := filepath.Join(t.TempDir(), "agent")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", file, "github.com/vmprobes/vmprobes/lab/kernels/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return file
}

// run boots a kernel and compares.
func run(t *testing.T, r *Result, archive, agent string) {
	ctx, cancel := context.WithTimeout(t.Context(), perKernel)
	defer cancel()
	g := start(t, r.Package, archive, agent)
	defer context.AfterFunc(ctx, g.Kill)()
	before := g.say(t, "all")
	require.Equal(t, r.HasModules(), len(before.modules(true)) > 0, "whether the guest has modules")

	live := open(ctx, t, r, "live", "qemu:"+g.GDB, before, before)
	file := filepath.Join(t.TempDir(), "memory")
	g.HMP("stop")
	g.HMP("dump-guest-memory " + file)
	g.HMP("cont")
	after := g.say(t, "processes")
	for _, o := range live { // the guest ran on: what it has said since is as true
		o.diff(before, after)
	}
	image := open(ctx, t, r, "image", "file:"+file, before, after)
	require.NoError(t, os.Remove(file))
	for _, a := range Aspects[:len(Aspects)-1] {
		r.Cells[a] = r.join(a, live[a], image[a])
	}
	if !r.HasModules() && r.Cells["modules"] == "0" && r.Cells["module symbols"] == "0" {
		r.Cells["modules"], r.Cells["module symbols"] = NotTried, NotTried
	}
	if r.Arch == "amd64" {
		r.hits(ctx, t, g)
	}
}

// memoryMB is the guests'.
const memoryMB = 512

type guest struct{ *qemutest.Linux }

func start(t *testing.T, p Package, archive, agent string) *guest {
	dir := t.TempDir()
	f, err := os.Open(archive)
	require.NoError(t, err)
	defer f.Close()
	file := func(name string) []byte {
		r, err := cpio.Open(f, "lab/kernels/"+p.Release+"/"+name)
		require.NoError(t, err)
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		return b
	}
	program, err := os.ReadFile(agent)
	require.NoError(t, err)
	var initrd bytes.Buffer
	w := cpio.NewWriter(&initrd)
	require.NoError(t, errors.Join(w.Bytes("init", 0o755, program), w.Bytes("probed", 0o644, nil), w.Close()))
	initrd.Write(file("modules.cpio")) // one archive may follow another
	c := qemutest.Config{
		Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd"), MB: memoryMB,
		Append: "console=ttyS0 quiet no_timer_check panic=-1",
	}
	if p.Flavour() == "686" {
		c.QEMU = "qemu-system-i386"
	}
	require.NoError(t, os.WriteFile(c.Kernel, file("vmlinuz"), 0o600))
	require.NoError(t, os.WriteFile(c.Initrd, initrd.Bytes(), 0o600))
	g := &guest{qemutest.BootLinux(t, c, perKernel/2)}
	require.Equal(t, p.Release, g.Ready)
	return g
}

// A saying is what a guest's /proc has, by file.
type saying map[string][]byte

func (g *guest) say(t *testing.T, what string) saying {
	for tries := 1; ; tries++ {
		reply, runs, err := g.DoLines("say " + what)
		require.NoError(t, err)
		var data []byte
		for _, run := range runs {
			var frame, n uint64
			_, err := fmt.Sscanf(run, "%x %x", &frame, &n)
			require.NoError(t, err, run)
			require.LessOrEqual(t, (frame+n)*4096, uint64(memoryMB)<<20)
			data = append(data, g.Bytes(frame*4096, n*4096)...)
		}
		var size int
		var sum string
		_, err = fmt.Sscanf(reply, "say bytes=%d sha256=%s", &size, &sum)
		require.NoError(t, err, reply)
		require.LessOrEqual(t, size, len(data))
		if data = data[:size]; fmt.Sprintf("%x", sha256.Sum256(data)) == sum {
			return untar(t, data)
		}
		require.Less(t, tries, 3, "its memory isn't where it says") // the kernel may move a page
	}
}

func untar(t *testing.T, data []byte) saying {
	s := saying{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return s
		}
		require.NoError(t, err)
		s[h.Name], err = io.ReadAll(r)
		require.NoError(t, err)
	}
}

// An outcome is how one aspect compared.
type outcome struct {
	aspect  string
	got     []string
	want    func(saying) []string
	unknown bool
	err     error
	missing []string // said, and not read
	extra   []string // read, and not said
}

// diff compares with what the guest said before and after: what it said twice was there
// all the while, and what it said once may have been.
func (o *outcome) diff(before, after saying) {
	o.missing, o.extra = nil, nil
	if o.unknown || o.err != nil {
		return
	}
	count := func(list []string) map[string]int {
		m := map[string]int{}
		for _, s := range list {
			m[s]++
		}
		return m
	}
	first, got := count(o.want(before)), count(o.got)
	second := first
	if after != nil {
		second = count(o.want(after))
	}
	for s, n := range first {
		if n = min(n, second[s]); got[s] < n {
			o.missing = append(o.missing, s)
		}
	}
	for s, n := range got {
		if n > max(first[s], second[s]) {
			o.extra = append(o.extra, s)
		}
	}
}

// join makes the cell of an aspect, and tells what is wrong.
func (r *Result) join(aspect string, live, image *outcome) string {
	if live == nil || image == nil {
		return Differs // the kernel wasn't found, which was told
	}
	wrong := false
	for what, o := range map[string]*outcome{"live": live, "image": image} {
		tell := func(format string, args ...any) {
			wrong = true
			r.Wrong = append(r.Wrong, fmt.Sprintf("%s, %s: %s", aspect, what, fmt.Sprintf(format, args...)))
		}
		if o.err != nil {
			tell("%v", o.err)
		}
		if n := len(o.missing) + len(o.extra); n > 0 {
			slices.Sort(o.missing)
			slices.Sort(o.extra)
			tell("%d said but not read %.300q, %d read but not said %.300q", len(o.missing), o.missing[:min(3, len(o.missing))], len(o.extra), o.extra[:min(3, len(o.extra))])
		}
	}
	slices.Sort(r.Wrong)
	switch {
	case wrong, live.unknown != image.unknown:
		return Differs
	case live.unknown:
		return NotKnown
	}
	return strconv.Itoa(min(len(live.got), len(image.got)))
}

// open reads all there is of a guest.
func open(ctx context.Context, t *testing.T, r *Result, what, name string, before, after saying) map[string]*outcome {
	g, err := target.Open(ctx, name)
	if err != nil {
		r.Wrong = append(r.Wrong, fmt.Sprintf("%s: open: %v", what, err))
		return nil
	}
	defer g.Close()
	k, err := linux.Discover(ctx, g, nil)
	if err != nil {
		r.Wrong = append(r.Wrong, fmt.Sprintf("%s: discover: %v", what, err))
		return nil
	}
	all := read(k, r.Arch)
	for _, o := range all {
		o.diff(before, after)
	}
	for _, step := range k.Explain() {
		t.Logf("%s: %v", what, step)
	}
	return all
}

// lacks reports whether an error says that the kernel doesn't have what it takes.
func lacks(err error) bool {
	return errors.Is(err, ktype.ErrNoField) || errors.Is(err, ktype.ErrNoType) || errors.Is(err, sysmap.ErrNotFound) ||
		errors.Is(err, linux.ErrNoTypes)
}

// read reads each aspect.
func read(k *linux.Kernel, arch string) map[string]*outcome {
	all := map[string]*outcome{}
	add := func(aspect string, want func(saying) []string) *outcome {
		o := &outcome{aspect: aspect, want: want}
		all[aspect] = o
		return o
	}
	fail := func(o *outcome, err error) bool {
		if err != nil && arch == "i386" && lacks(err) {
			o.unknown = true
		} else if err != nil && o.err == nil {
			o.err = err
		}
		return err != nil
	}

	o := add("symbols", func(s saying) []string { return s.symbols(false) })
	for s := range k.Symbols().All() {
		o.got = append(o.got, symbol(s))
	}
	o = add("module symbols", func(s saying) []string { return s.symbols(true) })
	if syms, err := k.ModuleSymbols(); !fail(o, err) {
		for _, s := range syms {
			o.got = append(o.got, symbol(s))
		}
	}
	types, err := k.Types()
	inferred := err == nil && types.Source() == "inferred"
	o = add("modules", func(s saying) []string { return s.modules(!inferred) })
	if mods, err := k.Modules(); !fail(o, err) {
		for _, m := range mods {
			o.got = append(o.got, module(m.Name, m.Size, m.State.String(), m.Base, !inferred))
		}
	}
	o = add("processes", func(s saying) []string { return s.processes(!inferred) })
	tasks, err := k.Processes(false)
	fail(o, err)
	for _, p := range tasks {
		o.got = append(o.got, process(p.TGID, p.Comm, p.PPID, p.UID, p.GID, p.Exited, !inferred))
	}
	o = add("threads", saying.threads)
	for _, p := range tasks {
		threads, err := k.Threads(p)
		if fail(o, err) {
			continue
		}
		for _, th := range threads {
			o.got = append(o.got, fmt.Sprintf("%d/%d %q", th.TGID, th.PID, th.Comm))
		}
	}
	o = add("command lines", saying.cmdlines)
	for _, p := range tasks {
		if args, err := k.Cmdline(p); !fail(o, err) && args != nil {
			o.got = append(o.got, fmt.Sprintf("%d %q", p.TGID, args))
		}
	}
	o = add("layout", saying.layouts)
	for _, p := range tasks {
		l, err := k.Layout(p)
		if p.MM == 0 && errors.Is(err, linux.ErrNoMemory) {
			continue
		}
		if !fail(o, err) {
			o.got = append(o.got, fmt.Sprint(p.TGID, " ", l.StartCode, l.EndCode, l.StartStack, l.StartData, l.EndData, l.StartBrk, l.ArgStart, l.ArgEnd, l.EnvStart, l.EnvEnd))
		}
	}
	return all
}

func symbol(s sysmap.Symbol) string {
	return fmt.Sprintf("%x %c %s %s", s.Addr, s.Type, s.Name, s.Module)
}

// symbols are the lines of /proc/kallsyms, without those of what isn't a module: BPF
// programs and what the kernel makes for its own tracing.
func (s saying) symbols(modules bool) []string {
	m, err := sysmap.Parse(bytes.NewReader(s["kallsyms"]))
	if err != nil {
		return []string{err.Error()}
	}
	var out []string
	for sym := range m.All() {
		if sym.Module == "bpf" || strings.HasPrefix(sym.Module, "__builtin__") || modules != (sym.Module != "") {
			continue
		}
		out = append(out, symbol(sym))
	}
	return out
}

// module is one, with what only a kernel with types tells if all.
func module(name string, size uint64, state string, base uint64, all bool) string {
	if !all {
		return name
	}
	return fmt.Sprintf("%s, %d bytes, %s at %#x", name, size, state, base)
}

func (s saying) modules(all bool) []string {
	var out []string
	for line := range strings.Lines(string(s["modules"])) {
		f := strings.Fields(line) // name size users dependents state address
		size, err := strconv.ParseUint(f[1], 0, 64)
		base, berr := strconv.ParseUint(f[5], 0, 64)
		if err = errors.Join(err, berr); err != nil {
			return []string{err.Error()}
		}
		out = append(out, module(f[0], size, f[4], base, all))
	}
	return out
}

// worker matches a kernel worker to whose name /proc adds what it works at.
var worker = regexp.MustCompile(`^(kworker/u?[0-9]+:[0-9]+[A-Z]?)[-+].*`)

// comm is a thread's name in memory. /proc shows the whole one of a kernel thread, and
// what a worker does.
func (s saying) comm(dir string) string {
	c := strings.TrimSuffix(string(s[dir+"/comm"]), "\n")
	c = worker.ReplaceAllString(c, "$1")
	return c[:min(15, len(c))]
}

// tasks calls f with the folder of each thread, and its status.
func (s saying) tasks(f func(dir string, status map[string][]string)) {
	for file, b := range s {
		dir, ok := strings.CutSuffix(file, "/status")
		if !ok {
			continue
		}
		status := map[string][]string{}
		for line := range strings.Lines(string(b)) {
			name, value, _ := strings.Cut(line, ":")
			status[name] = strings.Fields(value)
		}
		f(dir, status)
	}
}

func number(words []string, i int) int {
	if i >= len(words) {
		return -1
	}
	n, err := strconv.Atoi(words[i])
	if err != nil {
		return -1
	}
	return n
}

// process is one, with what only a kernel with types tells if all.
func process(tgid int, comm string, ppid int, uid, gid uint32, zombie, all bool) string {
	if !all {
		return fmt.Sprintf("%d %q of %d", tgid, comm, ppid)
	}
	return fmt.Sprintf("%d %q of %d, user %d, group %d, zombie %v", tgid, comm, ppid, uid, gid, zombie)
}

func (s saying) processes(all bool) []string {
	var out []string
	s.tasks(func(dir string, st map[string][]string) {
		if tgid := number(st["Tgid"], 0); tgid == number(st["Pid"], 0) {
			dead := len(st["State"]) > 0 && strings.Contains("ZX", st["State"][0])
			out = append(out, process(tgid, s.comm(dir), number(st["PPid"], 0), uint32(number(st["Uid"], 1)), uint32(number(st["Gid"], 1)), dead, all))
		}
	})
	return out
}

func (s saying) threads() []string {
	var out []string
	s.tasks(func(dir string, st map[string][]string) {
		out = append(out, fmt.Sprintf("%d/%d %q", number(st["Tgid"], 0), number(st["Pid"], 0), s.comm(dir)))
	})
	return out
}

func (s saying) cmdlines() []string {
	var out []string
	for file, b := range s {
		if pid, ok := strings.CutSuffix(file, "/cmdline"); ok && len(b) > 0 {
			out = append(out, fmt.Sprintf("%s %q", pid, strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")))
		}
	}
	return out
}

func (s saying) layouts() []string {
	var out []string
	for file, b := range s {
		pid, ok := strings.CutSuffix(file, "/stat")
		if !ok {
			continue
		}
		// A name may have brackets in it. Fields are numbered as in proc(5).
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		field := func(n int) string { return f[n-3] }
		if len(f) < 49 || field(26) == "0" {
			continue // it has no memory of its own
		}
		out = append(out, pid+" "+strings.Join([]string{field(26), field(27), field(28), field(45), field(46), field(47), field(48), field(49), field(50), field(51)}, " "))
	}
	return out
}

// hits has the guest call two functions that are probed.
func (r *Result) hits(ctx context.Context, t *testing.T, g *guest) {
	opens := []struct {
		path string
		n    int
	}{{"/probed", 260}}
	calls := map[string]int{}
	if r.HasModules() {
		opens = append(opens, struct {
			path string
			n    int
		}{"/dev/net/tun", 40})
		calls["tun:tun_chr_open"] = 40
	}
	for _, o := range opens {
		calls["do_sys_openat2"] += o.n
	}
	r.Cells["hits"] = Differs
	wrong := func(format string, args ...any) {
		r.Wrong = append(r.Wrong, "hits: "+fmt.Sprintf(format, args...))
	}
	s, err := vmprobes.Open(ctx, "qemu:"+g.GDB, &vmprobes.Options{Cache: "-", Config: "-"})
	if err != nil {
		wrong("open: %v", err)
		return
	}
	closed := false
	defer func() {
		if !closed {
			_ = s.Close()
		}
	}()
	var odd atomic.Int64
	var probes []*vmprobes.Probe
	for name := range calls {
		p := &vmprobes.Probe{Symbol: name, Pre: func(p *vmprobes.Probe, regs *vmprobes.Regs) vmprobes.Action {
			if task, err := regs.Task(); err != nil || task.TGID != 1 {
				odd.Add(1)
			}
			if p.Symbol == "do_sys_openat2" {
				if name, err := p.ReadString(vmprobes.Addr(regs.Arg(1)), 256); err != nil || name != "/probed" && name != "/dev/net/tun" {
					odd.Add(1)
				}
			}
			return vmprobes.Continue
		}}
		probes = append(probes, p)
	}
	if err := s.Register(probes...); err != nil {
		wrong("register: %v", err)
		return
	}
	loop, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Loop(loop) }() // the first hits wait for it
	for _, c := range opens {
		reply, err := g.Do(fmt.Sprintf("open %s %d", c.path, c.n))
		if want := fmt.Sprintf("open calls=%d opened=%d", c.n, c.n); err != nil || reply != want {
			wrong("the guest: %s, %v instead of %s", reply, err, want)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		wrong("loop: %v", err)
	}
	n, failed := 0, len(r.Wrong)
	for _, p := range probes {
		st := p.Stats()
		if want := (vmprobes.Stats{Hits: uint64(calls[p.Symbol])}); st != want {
			wrong("%s: %+v instead of %+v", p.Symbol, st, want)
		}
		n += int(st.Hits)
	}
	if odd.Load() != 0 {
		wrong("%d hits with another task or another path than the guest's", odd.Load())
	}
	closed = true
	if err := s.Close(); err != nil {
		wrong("close: %v", err)
	}
	reply, lines, err := g.DoLines("dmesg")
	if err != nil || reply != "dmesg bad=0" {
		wrong("the guest afterwards: %s, %v: %q", reply, err, lines)
	}
	if len(r.Wrong) == failed {
		r.Cells["hits"] = strconv.Itoa(n)
	}
}

// TestDiff: what a guest said twice must have been read, and what it said once may have been.
func TestDiff(t *testing.T) {
	lines := func(s saying) []string { return strings.Fields(string(s["x"])) }
	before, after := saying{"x": []byte("init a a kworker")}, saying{"x": []byte("init a a later")}
	for got, want := range map[string][2][]string{
		"init a a":                 {nil, nil},
		"init a a kworker later":   {nil, nil},
		"init a":                   {{"a"}, nil},
		"a a":                      {{"init"}, nil},
		"init init a a":            {nil, {"init"}},
		"init a a another kworker": {nil, {"another"}},
	} {
		o := &outcome{got: strings.Fields(got), want: lines}
		o.diff(before, after)
		assert.Equal(t, want[0], o.missing, got)
		assert.Equal(t, want[1], o.extra, got)
	}
}

// TestSaying: what /proc has is taken for what it is.
func TestSaying(t *testing.T) {
	s := saying{
		"7/task/7/status": []byte("Name:\todd\nState:\tZ (zombie)\nTgid:\t7\nPid:\t7\nPPid:\t1\nUid:\t0\t1000\t0\t0\nGid:\t0\t1001\t0\t0\n"),
		"7/task/7/comm":   []byte("a) b (c\n"),
		"7/stat":          []byte("7 (a) b (c) S" + strings.Repeat(" 0", 22) + " 26 27 28" + strings.Repeat(" 0", 16) + " 45 46 47 48 49 50 51 0\n"),
		"7/cmdline":       []byte("x\x00\x00y z\x00"),
		"9/task/9/status": []byte("Name:\tk\nState:\tS\nTgid:\t9\nPid:\t9\nPPid:\t2\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\n"),
		"9/task/9/comm":   []byte("kworker/u8:2H-events_unbound\n"),
		"9/stat":          []byte("9 (k) S" + strings.Repeat(" 0", 49) + "\n"),
		"9/cmdline":       nil,
		"modules":         []byte("tun 61440 0 - Live 0xffffffffc0000000\n"),
		"kallsyms":        []byte("ffffffff81000000 T _text\nffffffffc0000010 t f\t[tun]\nffffffffc0000020 t b\t[bpf]\n"),
	}
	assert.ElementsMatch(t, []string{`7 "a) b (c" of 1, user 1000, group 1001, zombie true`, `9 "kworker/u8:2H" of 2, user 0, group 0, zombie false`}, s.processes(true))
	assert.ElementsMatch(t, []string{`7/7 "a) b (c"`, `9/9 "kworker/u8:2H"`}, s.threads())
	assert.Equal(t, []string{"7 26 27 28 45 46 47 48 49 50 51"}, s.layouts())
	assert.Equal(t, []string{`7 ["x" "" "y z"]`}, s.cmdlines())
	assert.Equal(t, []string{"tun, 61440 bytes, Live at 0xffffffffc0000000"}, s.modules(true))
	assert.Equal(t, []string{"ffffffff81000000 T _text "}, s.symbols(false))
	assert.Equal(t, []string{"ffffffffc0000010 t f tun"}, s.symbols(true))
}
