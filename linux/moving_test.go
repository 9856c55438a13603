package linux_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

// moving is a guest in which something happens once so many pages were read.
type moving struct {
	*kerneltest.Synthetic
	at, pages int
	happen    func(s *kerneltest.Synthetic)
	done      bool
}

func (m *moving) Page(f paging.Frame, w bool) ([]byte, func(), error) {
	if m.pages++; m.at > 0 && m.pages == m.at {
		m.happen(m.Synthetic)
		m.done = true
	}
	b, _, err := m.Map(f, w)
	return b, func() {}, err
}

func (m *moving) CPUs() ([]linux.CPU, error) { return m.Machine().CPUs() }

// unlink takes an element out of a list, as list_del does.
func unlink(s *kerneltest.Synthetic, at uint64) {
	next, prev := s.Get64(at), s.Get64(at+8)
	s.Put64(next+8, prev)
	s.Put64(prev, next)
	s.Put64(at, 0xdead000000000100)
	s.Put64(at+8, 0xdead000000000122)
}

// TestMovingLists has a module unloaded, or a process end, at each moment of reading the
// list: it is on the list or isn't, the others are, and there is no error.
func TestMovingLists(t *testing.T) {
	modules := func(k *linux.Kernel) (names []string, err error) {
		mods, err := k.Modules()
		for _, m := range mods {
			names = append(names, m.Name)
		}
		return names, err
	}
	processes := func(k *linux.Kernel) (names []string, err error) {
		tasks, err := k.Processes(false)
		for _, t := range tasks {
			names = append(names, t.Comm)
		}
		return names, err
	}
	for name, c := range map[string]struct {
		happen func(s *kerneltest.Synthetic)
		read   func(k *linux.Kernel) ([]string, error)
		before []string
		after  []string
	}{
		"first module": {
			func(s *kerneltest.Synthetic) {
				m := s.Sym["module demo"]
				unlink(s, m+kerneltest.ModuleList)
				clear(s.Bytes(m)[:kerneltest.ModuleList]) // freed
				s.Put64(m+kerneltest.ModuleMem+8, 1<<40)
			}, modules, []string{"demo", "older"}, []string{"older"},
		},
		"last module": {
			func(s *kerneltest.Synthetic) { unlink(s, s.Sym["module older"]+kerneltest.ModuleList) },
			modules, []string{"demo", "older"}, []string{"demo"},
		},
		"process": {
			func(s *kerneltest.Synthetic) {
				p := s.Sym["task 40"]
				unlink(s, p+kerneltest.TaskTasks)
				s.Put64(p+kerneltest.TaskCred, 8)
			}, processes, []string{"init", "kthreadd", "kworker/0:0", "daemon", "zombie\x1b[31m"}, []string{"init", "kthreadd", "kworker/0:0", "zombie\x1b[31m"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := &moving{Synthetic: kerneltest.NewSynthetic(kerneltest.Layout{}), happen: c.happen}
			k, err := linux.Discover(t.Context(), m, nil)
			require.NoError(t, err)
			_, err = k.Types()
			require.NoError(t, err)
			before := bytes.Clone(m.RAM)
			for at := 1; ; at++ {
				copy(m.RAM, before)
				m.pages, m.at, m.done = 0, at, false
				got, err := c.read(k)
				require.NoError(t, err, "page %d", at)
				if !m.done {
					require.Greater(t, at, 50)
					break
				}
				if len(got) == len(c.before) {
					assert.Equal(t, c.before, got)
				} else {
					assert.Equal(t, c.after, got, "page %d", at)
				}
			}
		})
	}
}

// TestBadPointers: one bad pointer hides nothing else, and is told.
func TestBadPointers(t *testing.T) {
	names := func(tasks []linux.Task) (all []string) {
		for _, t := range tasks {
			all = append(all, fmt.Sprintf("%s/%d", t.Comm, t.UID))
		}
		return all
	}
	all := []string{"init/0", "kthreadd/0", "kworker/0:0/0", "daemon/1000", "zombie\x1b[31m/1000"}
	for name, c := range map[string]struct {
		harm func(s *kerneltest.Synthetic)
		want []string
		why  string
	}{
		"next": {func(s *kerneltest.Synthetic) { s.Put64(s.Sym["task 2"]+kerneltest.TaskTasks, 8) }, all, "list at"},
		"prev": {func(s *kerneltest.Synthetic) { s.Put64(s.Sym["task 3"]+kerneltest.TaskTasks+8, 8) }, all, "broken list"},
	} {
		s := kerneltest.NewSynthetic(kerneltest.Layout{})
		c.harm(s)
		tasks, err := discover(t, s).Processes(false)
		require.Error(t, err, name)
		assert.ErrorContains(t, err, c.why, name)
		assert.Equal(t, c.want, names(tasks), name)
	}

	// A bad pointer in a task is marked there, and fails nothing.
	for name, c := range map[string]struct {
		pid     int
		off     uint64
		value   uint64
		unknown linux.Fields
	}{
		"cred":                 {40, kerneltest.TaskCred, 8, linux.FieldUID | linux.FieldGID},
		"cred, not canonical":  {40, kerneltest.TaskCred, 0x4141414141414141, linux.FieldUID | linux.FieldGID},
		"cred of the idle one": {0, kerneltest.TaskCred, 8, linux.FieldUID | linux.FieldGID},
		"real_parent":          {3, kerneltest.TaskParent, 0, linux.FieldPPID},
		"real_parent, no task": {1, kerneltest.TaskParent, kerneltest.SyntheticText, linux.FieldPPID},
	} {
		s := kerneltest.NewSynthetic(kerneltest.Layout{})
		want, err := discover(t, s).Processes(true)
		require.NoError(t, err)
		s.Put64(s.Sym[fmt.Sprintf("task %d", c.pid)]+c.off, c.value)
		k := discover(t, s)
		tasks, err := k.Processes(true)
		require.NoError(t, err, name)
		require.Len(t, tasks, len(want), name)
		for i, got := range tasks {
			if got.PID != c.pid {
				assert.Equal(t, want[i], got, name)
				continue
			}
			require.Error(t, got.Err, name)
			assert.Equal(t, c.unknown, got.Unknown, name)
			assert.Equal(t, want[i].Comm, got.Comm, name)
			one, err := k.Task(got.Addr)
			require.NoError(t, err, name)
			assert.Equal(t, c.unknown, one.Unknown, name)
		}
	}

	// A module of a terabyte, and one that leads nowhere.
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	s.Put32(s.Sym["module demo"]+kerneltest.ModuleMem+8, 1<<31)
	mods, err := discover(t, s).Modules()
	require.ErrorIs(t, err, linux.ErrBadKernel)
	require.Len(t, mods, 1)
	assert.Equal(t, "older", mods[0].Name)
	s = kerneltest.NewSynthetic(kerneltest.Layout{})
	s.Put64(s.Sym["module demo"]+kerneltest.ModuleList, 8)
	mods, err = discover(t, s).Modules()
	require.Error(t, err)
	require.Len(t, mods, 2, "from both ends")
}

// TestFullName: a kernel thread may have a longer name than there is room for in its task.
func TestFullName(t *testing.T) {
	const long, cut = "rcu_tasks_trace_kthread", "rcu_tasks_trace"
	make := func(flags uint32, comm, name string) *kerneltest.Synthetic {
		s := kerneltest.NewSynthetic(kerneltest.Layout{})
		task, free := s.Sym["task 3"], s.Sym["task 50"]+0x190
		copy(s.Bytes(task + kerneltest.TaskComm)[:16], comm+"\x00")
		s.Put32(task+kerneltest.TaskFlags, flags)
		s.Put64(task+kerneltest.TaskWorker, free)
		s.Put64(free+kerneltest.KthreadName, free+0x20)
		copy(s.Bytes(free+0x20), name+"\x00")
		return s
	}
	const kernelThread = 0x00200000
	for what, c := range map[string]struct {
		s    *kerneltest.Synthetic
		want string
	}{
		"longer":       {make(kernelThread, cut, long), long},
		"of a process": {make(0, cut, long), cut},
		"not its name": {make(kernelThread, cut, "kthreadd"), cut},
		"short":        {make(kernelThread, "rcu_gp", "rcu_gp_and_more"), "rcu_gp"},
		"nowhere": {func() *kerneltest.Synthetic {
			s := make(kernelThread, cut, long)
			s.Put64(s.Sym["task 3"]+kerneltest.TaskWorker, 8)
			return s
		}(), cut},
	} {
		task, err := discover(t, c.s).Process(3)
		require.NoError(t, err, what)
		assert.Equal(t, c.want, task.Name(), what)
		assert.Equal(t, c.want+"[3]", task.String(), what)
		assert.NoError(t, task.Err, what)
	}
}
