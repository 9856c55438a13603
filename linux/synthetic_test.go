package linux_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
)

func discover(tb testing.TB, s *kerneltest.Synthetic) *linux.Kernel {
	tb.Helper()
	k, err := linux.Discover(tb.Context(), s.Machine(), nil)
	require.NoError(tb, err)
	return k
}

var layouts = map[string]kerneltest.Layout{
	"new":         {},
	"pcpu_hot":    {PCPUHot: true},
	"core_layout": {CoreLayout: true},
	"places":      {OtherPlaces: true},
}

func TestSynthetic(t *testing.T) {
	for name, l := range layouts {
		t.Run(name, func(t *testing.T) {
			s := kerneltest.NewSynthetic(l)
			k := discover(t, s)
			assert.Equal(t, kerneltest.SyntheticBanner, k.Banner())
			assert.Equal(t, "9.9.9-synthetic", k.Release())
			assert.Equal(t, kerneltest.SyntheticID, k.BuildID())
			for _, name := range []string{"fn_0000", "init_task", "_end", "modules", "__syscall_meta__openat"} {
				sym, err := k.Symbols().Lookup(name)
				require.NoError(t, err)
				assert.Equal(t, s.Sym[name], sym.Addr, name)
			}
			testTasks(t, s, k)
			testModules(t, s, k)
			testSyscalls(t, k)
			testPlaces(t, s, k)

			for page, want := range []paging.Frame{0x1234, 0, 0, 0, 0, 1<<40 - 1, 0} {
				f, err := k.PhysToMachine(uint64(page))
				if want == 0 {
					require.ErrorIs(t, err, linux.ErrNoP2M)
					continue
				}
				require.NoError(t, err)
				assert.Equal(t, want, f)
			}
			for _, r := range k.Explain() {
				assert.NoError(t, r.Err, r.Name)
			}
		})
	}
}

func testTasks(t *testing.T, s *kerneltest.Synthetic, k *linux.Kernel) {
	task := func(pid, tgid, ppid int, comm string, uid uint32) linux.Task {
		x := linux.Task{Addr: s.Sym["task "+strconv.Itoa(pid)], PID: pid, TGID: tgid, PPID: ppid, Comm: comm, UID: uid, GID: uid + 1}
		if pid == 1 {
			x.MM = s.Sym["mm 1"]
		}
		x.Exited = pid == 50
		return x
	}
	want := []linux.Task{
		task(0, 0, 0, "swapper/0", 0), task(1, 1, 0, "init", 0), task(2, 2, 0, "kthreadd", 0),
		task(3, 3, 2, "kworker/0:0", 0), task(40, 40, 1, "daemon", 1000), task(50, 50, 40, "zombie\x1b[31m", 1000),
	}
	got, err := k.Processes(true)
	require.NoError(t, err)
	assert.Equal(t, want, got)
	assert.Equal(t, "zombie?[31m[50]", got[5].String())
	got, err = k.Processes(false)
	require.NoError(t, err)
	assert.Equal(t, want[1:], got)

	daemon, err := k.Process(40)
	require.NoError(t, err)
	threads, err := k.Threads(daemon)
	require.NoError(t, err)
	assert.Equal(t, []linux.Task{want[4], task(41, 40, 1, "daemon-helper", 1000)}, threads)
	assert.Equal(t, "daemon-helper[40/41]", threads[1].String())
	cgroup, err := k.Cgroup(daemon)
	require.NoError(t, err)
	assert.Equal(t, "/system.slice/daemon.service", cgroup)
	_, err = k.Process(99)
	require.ErrorIs(t, err, linux.ErrNoProcess)

	init, err := k.Process(1)
	require.NoError(t, err)
	cgroup, err = k.Cgroup(init)
	require.NoError(t, err)
	assert.Equal(t, "/", cgroup)
	args, err := k.Cmdline(init)
	require.NoError(t, err)
	assert.Equal(t, kerneltest.SyntheticArgs, args)
	args, err = k.Cmdline(daemon)
	require.NoError(t, err)
	assert.Nil(t, args)
	layout, err := k.Layout(init)
	require.NoError(t, err)
	assert.EqualValues(t, 0x400000, layout.StartCode)
	assert.EqualValues(t, 0x406000, layout.StartStack)
	assert.EqualValues(t, 0x40a000, layout.EnvEnd)
	_, err = k.UserRoot(daemon)
	require.ErrorIs(t, err, linux.ErrNoMemory)
	b := make([]byte, 4)
	require.NoError(t, k.ReadUser(init, kerneltest.SyntheticUser+0x100, b))
	assert.Equal(t, "/sbi", string(b))
	require.ErrorIs(t, k.ReadUser(init, kerneltest.SyntheticUser+paging.PageSize, b), paging.ErrNotMapped)

	for cpu, pid := range []int{0, 40} {
		base, err := k.PerCPU(cpu)
		require.NoError(t, err)
		cur, err := k.Current(base)
		require.NoError(t, err)
		assert.Equal(t, pid, cur.PID)
	}
	_, err = k.PerCPU(-1)
	require.ErrorIs(t, err, linux.ErrBadKernel)
}

func testModules(t *testing.T, s *kerneltest.Synthetic, k *linux.Kernel) {
	mods, err := k.Modules()
	require.NoError(t, err)
	require.Len(t, mods, 2)
	for i, name := range []string{"demo", "older"} {
		m := mods[i]
		assert.Equal(t, name, m.Name)
		assert.Equal(t, s.Sym["module "+name], m.Addr)
		assert.Equal(t, s.Sym["text "+name], m.Base)
		assert.EqualValues(t, 0x1800, m.Size)
		assert.Equal(t, "Live", m.State.String())
	}
	syms, err := k.ModuleSymbols()
	require.NoError(t, err)
	text := s.Sym["text demo"]
	assert.Equal(t, []sysmap.Symbol{
		{Addr: text, Type: 't', Name: "demo_init", Module: "demo"},
		{Addr: text + 0x10, Type: 'T', Name: "demo_run", Module: "demo"},
	}, syms[:2])
	assert.Len(t, syms, 6)
	all, err := k.AllSymbols()
	require.NoError(t, err)
	sym, off, ok := all.Find(text + 0x13)
	require.True(t, ok)
	assert.Equal(t, "demo_run", sym.Name)
	assert.EqualValues(t, 3, off)
	again, err := k.AllSymbols()
	require.NoError(t, err)
	assert.Same(t, all, again)

	types, err := k.ModuleTypes()
	require.NoError(t, err)
	n, err := types.Sizeof("demo:demo_t")
	require.NoError(t, err)
	assert.EqualValues(t, 4, n)
	types, err = k.ModuleTypes("older")
	require.NoError(t, err)
	assert.False(t, types.HasField("demo:demo_t"))
}

func testSyscalls(t *testing.T, k *linux.Kernel) {
	calls, err := k.Syscalls()
	require.NoError(t, err)
	require.Len(t, calls, 2)
	c, err := k.Syscall("openat")
	require.NoError(t, err)
	assert.Equal(t, 257, c.Number)
	assert.Equal(t, "openat(int dfd, const char * filename, int flags)", c.String())
	c, err = k.Syscall("getpid")
	require.NoError(t, err)
	assert.Equal(t, "getpid()", c.String())
	_, err = k.Syscall("nosuchcall")
	require.ErrorIs(t, err, sysmap.ErrNotFound)
}

func testPlaces(t *testing.T, s *kerneltest.Synthetic, k *linux.Kernel) {
	fn, text := kerneltest.Fn, s.Sym["text demo"]
	for _, c := range []struct {
		addr uint64
		why  string
	}{
		{fn(1), ""},
		{fn(1) + 1, ""}, // a NOP
		{fn(99) + 15, ""},
		{fn(100), "noinstr"},
		{fn(109) + 15, "noinstr"},
		{fn(110), ""},
		{fn(200), "kprobe blacklist"},
		{fn(200) + 15, "kprobe blacklist"},
		{fn(201), ""},
		{fn(300), "jump label"},
		{fn(300) + 4, "jump label"},
		{fn(300) + 5, ""},
		{fn(301) + 1, "jump label"},
		{fn(301) + 2, ""},
		{fn(310) + 1, "static call"},
		{fn(310) + 5, ""},
		{fn(311) + 5, "static call"}, // of 6 bytes
		{fn(311) + 6, ""},
		{fn(320), "LOCK prefix"},
		{fn(320) + 1, ""},
		{fn(330), ""}, // what faults may be probed, but not be executed elsewhere
		{s.Sym["fn_0200.part.0"], `"fn_0200", of which this is a part`},
		{s.Sym["__SCT__something"], "trampoline"},
		{s.Sym["__SCT__something"] + 7, "trampoline"},
		{s.Sym["__SCT__something"] + 8, ""},
		{s.Sym["ftrace_call"], "ftrace's own call"},
		{s.Sym["ftrace_call"] + 4, "ftrace's own call"},
		{s.Sym["ftrace_call"] + 5, ""},
		{s.Sym["bpf_dispatcher_xdp_func"], "BPF dispatcher"},
		{s.Sym["bpf_dispatcher_xdp_func"] + 9, ""},
		{fn(540) - 9, ""},
		{fn(540) - 8, `in the bytes before a function, "__pfx_fn_0540"`},
		{fn(540) - 1, `in the bytes before a function, "__pfx_fn_0540"`},
		{fn(540), ""},
		{kerneltest.SyntheticEntry, "entry code"},
		{fn(400), ""},
		{fn(400) + 1, "ftrace"},
		{fn(400) + 5, ""},
		{fn(410) + 4, "ftrace"},
		{kerneltest.SyntheticText - 1, "not in the text"},
		{s.Sym["init_task"], "not in the text"},
		{s.Sym["text demo"], ""},
		{s.Sym["text demo"] + 0x10, ""},
		{s.Sym["text demo"] + 0x11, "not an instruction boundary"}, // of ADD, 00 00
		{text + 0x1000, "not in the text"},
		{text + 0x100, "jump label"},
		{text + 0x101, "jump label"},
		{text + 0x102, ""},
		{text + 0x10f, "not an instruction boundary"},
		{text + 0x110, "jump label"},
		{text + 0x114, "jump label"},
		{text + 0x120, "static call"},
		{text + 0x130, ""},
		{text + 0x140, "LOCK prefix"},
		{text + 0x150, "kprobe blacklist"},
		{text + 0x15f, "kprobe blacklist"},
		{text + 0x160, "noinstr"},
		{text + 0x170, "kprobes itself"},
		{text + 0x180, ""},
		{text + 0x200, ""},
		{text + 0x201, "ftrace"},
		{text + 0x205, ""},
		{s.Sym["text unformed"], "not in the text"},
	} {
		err := k.Probeable(c.addr)
		if c.why == "" {
			assert.NoError(t, err, "%#x", c.addr)
			continue
		}
		require.ErrorIs(t, err, linux.ErrNotProbeable, "%#x", c.addr)
		assert.ErrorContains(t, err, c.why)
	}
	n, err := k.FtraceSites()
	require.NoError(t, err)
	assert.Equal(t, 12, n)
	for addr, want := range map[uint64][2]bool{
		fn(400): {false, true}, fn(410): {true, true}, fn(500): {false, false},
		text + 0x200: {false, true}, text + 0x210: {false, false}, 1: {false, false},
	} {
		traced, ok := k.FtraceSite(addr)
		assert.Equal(t, want, [2]bool{traced, ok})
	}
	assert.Equal(t, "text 0xffffffff81000000 to 0xffffffff81020000, 1 blacklist entries, 4 jump labels, 2 static calls, "+
		"12 ftrace sites, 1 LOCK prefixes, 2 expected faults", rung(k, "probeable"))
	found := func(pattern string) (names []string) {
		seq, err := k.Functions(pattern)
		require.NoError(t, err)
		for s := range seq {
			names = append(names, s.Name)
		}
		return names
	}
	assert.Equal(t, []string{"fn_0098", "fn_0099"}, found("fn_009[89]"))
	assert.Len(t, found("fn_01*"), 100-10)
	_, err = k.Functions("[")
	require.Error(t, err)
}

// TestSyntheticInferred does without types, and without symbols of data.
func TestSyntheticInferred(t *testing.T) {
	for _, l := range []kerneltest.Layout{{NoTypes: true}, {NoTypes: true, NoData: true}} {
		s := kerneltest.NewSynthetic(l)
		k := discover(t, s)
		types, err := k.Types()
		require.NoError(t, err)
		assert.Equal(t, "inferred", types.Source())
		for path, want := range map[string]uint64{
			"task_struct.tasks": kerneltest.TaskTasks, "task_struct.mm": kerneltest.TaskMM, "task_struct.pid": kerneltest.TaskPID,
			"task_struct.tgid": kerneltest.TaskPID + 4, "task_struct.comm": kerneltest.TaskComm,
			"task_struct.real_parent": kerneltest.TaskParent, "mm_struct.pgd": kerneltest.MMPgd,
		} {
			f, err := types.Offset(path)
			require.NoError(t, err)
			assert.Equal(t, want, f.Offset, path)
		}
		tasks, err := k.Processes(true)
		require.NoError(t, err)
		require.Len(t, tasks, 6)
		assert.Equal(t, s.Sym["task 0"], tasks[0].Addr)
		assert.Equal(t, 40, tasks[5].PPID)
		for _, task := range tasks {
			// Zero would say that all are root's and none is a zombie.
			assert.Equal(t, "UID, GID, Exited", task.Unknown.String(), task.Comm)
			assert.NoError(t, task.Err)
		}
		for _, r := range k.Explain() {
			assert.Equal(t, r.Name == "types", r.Note(), r.Name)
			if r.Note() {
				assert.Contains(t, r.String(), "not known: users, states and threads")
			}
		}
		b := make([]byte, 4)
		require.NoError(t, k.ReadUser(tasks[1], kerneltest.SyntheticUser+0x100, b))
		assert.Equal(t, "/sbi", string(b))
		mods, err := k.Modules()
		if l.NoData {
			require.ErrorIs(t, err, sysmap.ErrNotFound)
			assert.ErrorContains(t, err, "CONFIG_KALLSYMS_ALL=n")
			_, err = k.Syscalls()
			require.ErrorIs(t, err, sysmap.ErrNotFound, "none at all would be wrong")
			continue
		}
		require.NoError(t, err)
		assert.Equal(t, "demo", mods[0].Name)
		assert.Equal(t, "Base, Size, State", mods[0].Unknown.String())
		fn := kerneltest.Fn
		assert.ErrorContains(t, k.Probeable(fn(200)), "kprobe blacklist")
		assert.ErrorContains(t, k.Probeable(fn(400)+1), "ftrace")
		n, err := k.FtraceSites()
		require.NoError(t, err)
		assert.Equal(t, 12, n)
		// Where modules have their text is not known.
		err = k.Probeable(s.Sym["text demo"])
		require.ErrorIs(t, err, linux.ErrUnknownPlaces)
		require.ErrorIs(t, err, linux.ErrNoTypes)

		// Where tables have a layout that isn't known, nothing may be probed.
		records := s.Get64(s.Sym["ftrace page"] + 8)
		s.Put64(s.Sym["blacklist entry"]+16, 5)
		s.Put64(s.Sym["ftrace page"]+8, s.Sym["blacklist entry"])
		k = discover(t, s)
		err = k.Probeable(fn(1))
		require.ErrorIs(t, err, linux.ErrUnknownPlaces)
		assert.ErrorContains(t, err, "the table of blacklist entries")
		assert.ErrorContains(t, err, "the table of ftrace sites")
		requirePrintable(t, err.Error())
		_, err = k.Functions("*")
		require.ErrorIs(t, err, linux.ErrUnknownPlaces)
		_, err = k.FtraceSites()
		require.Error(t, err)
		// … but not for ever: the guest may have been changing them.
		s.Put64(s.Sym["blacklist entry"]+16, fn(200))
		s.Put64(s.Sym["ftrace page"]+8, records)
		linux.RetrySafety(0)
		assert.ErrorContains(t, k.Probeable(fn(200)), "kprobe blacklist")
		assert.NoError(t, k.Probeable(fn(1)))
		linux.RetrySafety(time.Minute)
	}
}

// TestOnlyFunctions has a kernel that tells only where its functions are, with types and
// symbols of files.
func TestOnlyFunctions(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true, NoData: true})
	given := func(tasks uint64) *ktype.Types {
		types, err := ktype.New("a file", 8,
			ktype.Struct{Name: "list_head", Size: 16, Fields: []ktype.StructField{{Name: "next", Type: "list_head *"}, {Name: "prev", Offset: 8, Type: "list_head *"}}},
			ktype.Struct{Name: "task_struct", Fields: []ktype.StructField{
				{Name: "tasks", Offset: tasks, Type: "list_head"}, {Name: "pid", Offset: kerneltest.TaskPID, Type: "int"},
				{Name: "tgid", Offset: kerneltest.TaskPID + 4, Type: "int"}, {Name: "comm", Offset: kerneltest.TaskComm, Type: "char[16]"},
			}})
		require.NoError(t, err)
		return types
	}
	k, err := linux.Discover(t.Context(), s.Machine(), &linux.Options{Types: given(kerneltest.TaskTasks)})
	require.NoError(t, err)
	tasks, err := k.Processes(true)
	require.NoError(t, err)
	require.Len(t, tasks, 6)
	assert.Equal(t, s.Sym["task 0"], tasks[0].Addr)
	assert.Equal(t, "PPID, UID, GID, MM, Exited", tasks[5].Unknown.String())
	_, err = k.UserRoot(tasks[1])
	require.ErrorIs(t, err, linux.ErrNoTypes)
	require.NotErrorIs(t, err, linux.ErrNoMemory, "it isn't known to be a kernel thread")
	k, err = linux.Discover(t.Context(), s.Machine(), &linux.Options{Types: given(kerneltest.TaskTasks + 8)})
	require.NoError(t, err)
	_, err = k.Processes(true)
	require.ErrorIs(t, err, linux.ErrWrongTypes)

	dir, write := files(t)
	good := write("good", s.SystemMap())
	rebuilt := write("rebuilt", regexp.MustCompile(`(?m)^([0-9a-f]{15}).( t fn_1)`).ReplaceAll(s.SystemMap(), []byte("${1}8$2")))
	for _, files := range [][]string{{good}, {filepath.Join(dir, "none"), rebuilt, good}, {rebuilt}} {
		k, err := linux.Discover(t.Context(), s.Machine(), &linux.Options{SymbolFiles: func(string) []string { return files }})
		require.NoError(t, err)
		sym, err := k.Symbols().Lookup("init_task")
		if files[len(files)-1] == rebuilt {
			require.ErrorIs(t, err, sysmap.ErrNotFound)
			continue
		}
		require.NoError(t, err)
		assert.Equal(t, s.Sym["init_task"], sym.Addr)
		assert.Contains(t, rung(k, "data"), good)
		mods, err := k.Modules()
		require.NoError(t, err)
		assert.Len(t, mods, 3, "without types it isn't known that one of them is being set up")
	}
}

// files returns a folder, and a function that writes a file in it and returns its path.
func files(t *testing.T) (dir string, write func(name string, b []byte) string) {
	dir = t.TempDir()
	return dir, func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, b, 0o600))
		return path
	}
}

// TestSymbolFiles finds the symbols of a kernel that has none in files here.
func TestSymbolFiles(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{NoSymbols: true})
	dir, write := files(t)
	good := write("good", s.SystemMap())
	moved := bytes.ReplaceAll(s.SystemMap(), fmt.Appendf(nil, "%016x D linux_banner", s.Sym["linux_banner"]), []byte("ffffffff81020040 D linux_banner"))
	other := write("other", moved)
	// Of a build with the same release, and data at the same place.
	rebuilt := write("rebuilt", regexp.MustCompile(`(?m)^([0-9a-f]{15}).( t fn_)`).ReplaceAll(s.SystemMap(), []byte("${1}8$2")))
	noise := write("noise", []byte("System.map it isn't"))
	var asked string
	files := func(paths ...string) *linux.Options {
		return &linux.Options{SymbolFiles: func(release string) []string { asked = release; return paths }}
	}

	_, err := linux.Discover(t.Context(), s.Machine(), nil)
	require.ErrorIs(t, err, linux.ErrNoSymbols)
	k, err := linux.Discover(t.Context(), s.Machine(), files(filepath.Join(dir, "none"), noise, other, rebuilt, good))
	require.NoError(t, err)
	assert.Equal(t, "9.9.9-synthetic", asked)
	sym, err := k.Symbols().Lookup("fn_0007")
	require.NoError(t, err)
	assert.Equal(t, s.Sym["fn_0007"], sym.Addr)
	assert.Equal(t, "of "+good, strings.SplitN(rung(k, "symbols"), ", ", 2)[1])
	assert.Len(t, k.Explain(), 7, "%v", k.Explain())

	_, err = linux.Discover(t.Context(), s.Machine(), files(rebuilt))
	require.ErrorIs(t, err, linux.ErrNoSymbols)
	assert.ErrorContains(t, err, "of the guest's first 128 system calls")
	m, err := sysmap.ParseFile(rebuilt)
	require.NoError(t, err)
	_, err = linux.Discover(t.Context(), s.Machine(), &linux.Options{Symbols: m})
	require.ErrorIs(t, err, linux.ErrWrongSymbols)
	unknown := write("unknown", bytes.ReplaceAll(s.SystemMap(), []byte("sys_call_table"), []byte("sys_call_tables")))
	_, err = linux.Discover(t.Context(), s.Machine(), files(unknown))
	require.ErrorIs(t, err, linux.ErrNoSymbols, "what isn't named by the user must be confirmed")
	m, err = sysmap.ParseFile(unknown)
	require.NoError(t, err)
	_, err = linux.Discover(t.Context(), s.Machine(), &linux.Options{Symbols: m})
	require.NoError(t, err)
	_, err = linux.Discover(t.Context(), s.Machine(), files(noise, other))
	require.ErrorIs(t, err, linux.ErrNoSymbols)
	require.NotErrorIs(t, err, linux.ErrWrongSymbols, "the user has named no file")
	assert.ErrorContains(t, err, other)

	// What the guest says of itself is made part of a path.
	for banner, want := range map[string]string{
		"Linux version 6.1.0-56+deb12~1-amd64 (x) #1": "6.1.0-56+deb12~1-amd64",
		"Linux version 6/../../etc/passwd (x) #1":     "",
		"Linux version 6%s (x) #1":                    "",
		"Linux version .6 (x) #1":                     "",
	} {
		b := s.Bytes(s.Sym["linux_banner"])
		copy(b, banner+"\x00")
		asked = "not asked"
		_, err = linux.Discover(t.Context(), s.Machine(), files())
		require.ErrorIs(t, err, linux.ErrNoSymbols)
		assert.Equal(t, want, asked, banner)
	}
}

// TestConcurrent has many callers at once, for the race detector.
func TestConcurrent(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	k := discover(t, s)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				_, err := k.Processes(true)
				assert.NoError(t, err)
				_, err = k.AllSymbols()
				assert.NoError(t, err)
				_, err = k.Syscalls()
				assert.NoError(t, err)
				assert.NoError(t, k.Probeable(kerneltest.SyntheticText+16))
				_, err = k.ModuleTypes()
				assert.NoError(t, err)
				k.Explain()
			}
		})
	}
	wg.Wait()
	assert.LessOrEqual(t, len(k.Explain()), 8)
}

// TestSyntheticCache finds in the cache what the first guest put there.
func TestSyntheticCache(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	for i := range 2 {
		m := s.Machine()
		k, err := linux.Discover(t.Context(), m, &linux.Options{Cache: dir})
		require.NoError(t, err)
		assert.Equal(t, i == 1, cached(k))
	}
}

func cached(k *linux.Kernel) bool {
	for _, r := range k.Explain() {
		if r.Name == "symbols" {
			return r.Found != "" && r.Found[len(r.Found)-5:] == "cache"
		}
	}
	return false
}

// TestCacheSwap has a guest that shows one kernel's tables while they are decoded,
// and those of another when it is looked at again: the cache must have what was
// decoded, under the hash of the same.
func TestCacheSwap(t *testing.T) {
	honest, evil := kerneltest.NewSynthetic(kerneltest.Layout{}), kerneltest.NewSynthetic(kerneltest.Layout{})
	// The names fn_0007 and fn_0008 change places.
	swap := func(a, b string) {
		i, j := bytes.Index(evil.RAM, []byte(a)), bytes.Index(evil.RAM, []byte(b))
		require.Positive(t, i)
		require.Positive(t, j)
		copy(evil.RAM[i:], b)
		copy(evil.RAM[j:], a)
	}
	swap("tfn_0007", "tfn_0008")
	m := &swapMachine{evil: evil.Guest, honest: honest.Guest, swap: 1 << 30}
	_, err := linux.Discover(t.Context(), m, &linux.Options{Cache: filepath.Join(t.TempDir(), "cache")})
	require.NoError(t, err)
	all := m.pages
	for i := range 100 {
		dir := filepath.Join(t.TempDir(), "cache")
		m := &swapMachine{evil: evil.Guest, honest: honest.Guest, swap: all * i / 100}
		_, err := linux.Discover(t.Context(), m, &linux.Options{Cache: dir})
		require.NoError(t, err)
		k, err := linux.Discover(t.Context(), honest.Machine(), &linux.Options{Cache: dir})
		require.NoError(t, err)
		sym, err := k.Symbols().Lookup("fn_0007")
		require.NoError(t, err)
		require.Equal(t, honest.Sym["fn_0007"], sym.Addr, "swapped after %d of %d pages", m.swap, all)
	}
}

// A swapMachine is one guest until so many pages have been read, and then another.
type swapMachine struct {
	evil, honest *kerneltest.Guest
	swap, pages  int
}

func (m *swapMachine) Page(f paging.Frame, w bool) ([]byte, func(), error) {
	g := m.evil
	if m.pages++; m.pages > m.swap {
		g = m.honest
	}
	b, _, err := g.Map(f, w)
	return b, func() {}, err
}

func (m *swapMachine) CPUs() ([]linux.CPU, error) { return m.honest.Machine().CPUs() }

func TestCacheFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	opts := &linux.Options{Cache: dir}
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	var wg sync.WaitGroup
	for range 4 { // at once
		wg.Go(func() {
			_, err := linux.Discover(t.Context(), s.Machine(), opts)
			assert.NoError(t, err)
		})
	}
	wg.Wait()
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1, "and no temporary file is left")

	// Those that a killed writer left go when the next entry comes; and so do the
	// entries that nobody has used for longest.
	old := time.Now().Add(-24 * time.Hour)
	for i := range 40 {
		name := filepath.Join(dir, strconv.Itoa(i)+".symbols")
		require.NoError(t, os.WriteFile(name, []byte("x"), 0o600))
		require.NoError(t, os.Chtimes(name, old, old.Add(time.Duration(i)*time.Second)))
	}
	left := filepath.Join(dir, "left.tmp")
	require.NoError(t, os.WriteFile(left, nil, 0o600))
	require.NoError(t, os.Chtimes(left, old, old))
	other := kerneltest.NewSynthetic(kerneltest.Layout{PCPUHot: true})
	_, err = linux.Discover(t.Context(), other.Machine(), opts)
	require.NoError(t, err)
	files, err = os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, files, 32)
	assert.NoFileExists(t, left)
	assert.NoFileExists(t, filepath.Join(dir, "0.symbols"))
	k, err := linux.Discover(t.Context(), s.Machine(), opts)
	require.NoError(t, err)
	assert.True(t, cached(k), "the one in use is still there")
}

// TestRunning: a kernel is told from another one, or none, at its place.
func TestRunning(t *testing.T) {
	for name, change := range map[string]func(*kerneltest.Synthetic){
		"another kernel": func(s *kerneltest.Synthetic) { copy(s.Bytes(s.Sym["linux_banner"]), "Linux version 7") },
		"no page tables": func(s *kerneltest.Synthetic) { clear(s.RAM[s.CR3 : s.CR3+paging.PageSize]) },
		"left in memory": func(s *kerneltest.Synthetic) { s.CR3 += 2 * paging.PageSize },
		"other data": func(s *kerneltest.Synthetic) {
			for i := range paging.PageSize {
				s.RAM[s.CR3+uint64(i)] = 0xa5
			}
		},
	} {
		s := kerneltest.NewSynthetic(kerneltest.Layout{})
		k := discover(t, s)
		ok, err := k.Running()
		require.NoError(t, err)
		assert.True(t, ok, name)
		change(s)
		ok, err = k.Running()
		require.NoError(t, err, name)
		assert.False(t, ok, name)
	}
	_, err := (*linux.Kernel)(nil).Running()
	require.ErrorIs(t, err, linux.ErrNoKernel)
}

// TestWeakBanner has the string of init/version.c before that of the build, and no
// symbol that tells which is which.
func TestWeakBanner(t *testing.T) {
	for _, l := range []kerneltest.Layout{{WeakBanner: true}, {WeakBanner: true, NoData: true}} {
		k := discover(t, kerneltest.NewSynthetic(l))
		assert.Equal(t, kerneltest.SyntheticBanner, k.Banner())
		_, err := k.Symbols().Lookup("linux_banner")
		assert.Equal(t, l.NoData, err != nil)
	}
}
