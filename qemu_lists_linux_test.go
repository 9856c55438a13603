package vmprobes_test

import (
	endian "encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/target"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
)

// testStorms reads each list 200 times and more while the guest starts processes, or unloads
// and loads modules, as fast as it can: no read fails, and what is there all the time
// is in each.
func testStorms(t labTest) {
	const reads = 200
	s := t.open(nil)
	k := s.Guest().Linux()
	processes := func() (names []string, err error) {
		tasks, err := k.Processes(true)
		for _, p := range tasks {
			names = append(names, fmt.Sprintf("%d %d", p.PID, p.PPID))
		}
		return names, err
	}
	threads := func() (names []string, err error) {
		init, err := k.Process(1)
		if err != nil {
			return nil, err
		}
		tasks, err := k.Threads(init)
		for _, p := range tasks {
			names = append(names, fmt.Sprintf("%d %d %s", p.PID, p.TGID, p.Comm))
		}
		return names, err
	}
	var stays string // the module that isn't unloaded
	modules := func() (names []string, err error) {
		mods, err := k.Modules()
		for _, m := range mods {
			if m.Name == stays {
				names = append(names, fmt.Sprintf("%s %#x %d %v", m.Name, m.Base, m.Size, m.State))
			}
		}
		return names, err
	}
	symbols := func() (names []string, err error) {
		syms, err := k.ModuleSymbols()
		for _, y := range syms {
			if y.Module == stays {
				names = append(names, fmt.Sprintf("%s %#x %c", y.Name, y.Addr, y.Type))
			}
		}
		return names, err
	}
	// What comes and goes in each storm is told from what stays by its name.
	t.ask("storm modules")
	ever := map[string]bool{}
	for _, l := range t.lines("modules") {
		ever[strings.Fields(l)[0]] = true
	}
	t.ask("storm off")
	first := t.lines("modules")
	stays = strings.Fields(first[len(first)-1])[0] // the oldest
	require.True(t, ever[stays])
	for _, c := range []struct {
		storm, what string
		read        func() ([]string, error)
	}{
		{"forks", "processes", processes},
		{"forks", "threads", threads},
		{"modules", "modules", modules},
		{"modules", "symbols of modules", symbols},
		{"forks modules", "processes", processes},
		{"forks modules", "symbols of modules", symbols},
	} {
		want, err := c.read()
		require.NoError(t, err, c.what)
		require.NotEmpty(t, want, c.what)
		t.ask("storm %s", c.storm)
		// The guest gets on slowly where others use the processors too.
		forks, loads, made := uint64(0), uint64(0), 0
		for i := 0; i < reads || i < 50*reads && (strings.Contains(c.storm, "forks") && forks < reads || strings.Contains(c.storm, "modules") && loads < 10); i++ {
			made++
			if i%reads == reads-1 {
				reply := t.ask("storm")
				forks += number(t, reply, "forks")
				loads += number(t, reply, "loads")
			}
			got, err := c.read()
			if !assert.NoError(t, err, "%s, in a storm of %s: read %d", c.what, c.storm, i) {
				break
			}
			there := map[string]bool{}
			for _, name := range got {
				assert.False(t, there[name], "%s, in a storm of %s: %s is there twice", c.what, c.storm, name)
				there[name] = true
			}
			missing := slices.DeleteFunc(slices.Clone(want), func(name string) bool { return there[name] })
			if !assert.Empty(t, missing, "%s, in a storm of %s: read %d", c.what, c.storm, i) {
				break
			}
		}
		reply := t.ask("storm off")
		forks += number(t, reply, "forks")
		loads += number(t, reply, "loads")
		t.Logf("%d reads of %s (%d that stay): %d processes were started, and modules reloaded %d times", made, c.what, len(want), forks, loads)
		if strings.Contains(c.storm, "forks") {
			assert.GreaterOrEqual(t, forks, uint64(reads))
		}
		if strings.Contains(c.storm, "modules") {
			assert.GreaterOrEqual(t, loads, uint64(10))
		}
	}
	require.NoError(t, s.Close())
}

// A damaged guest is one that stands still, some of whose memory reads as if it were
// something else.
type damaged struct {
	target.Guest
	cpus   []linux.CPU
	frames map[paging.Frame][]byte // those that were read
	sound  map[paging.Frame][]byte // of those that are damaged: as they are in the guest
	seen   map[paging.Frame]bool   // since it was last cleared
	reads  int
}

func (d *damaged) CPUs() ([]linux.CPU, error) { return d.cpus, nil }

func (d *damaged) Page(f paging.Frame, writable bool) ([]byte, func(), error) {
	if writable {
		return nil, nil, fmt.Errorf("frame %#x is written to", f)
	}
	d.reads++
	d.seen[f] = true
	if b, ok := d.frames[f]; ok {
		return b, func() {}, nil
	}
	b, release, err := d.Guest.Page(f, false)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	d.frames[f] = slices.Clone(b)
	return d.frames[f], func() {}, nil
}

// spoil returns a frame's bytes to damage: those that a reader may have kept.
func (d *damaged) spoil(t labTest, f paging.Frame) []byte {
	t.Helper()
	b, _, err := d.Page(f, false)
	require.NoError(t, err)
	if d.sound[f] == nil {
		d.sound[f] = slices.Clone(b)
	}
	return b
}

// mend undoes all damage.
func (d *damaged) mend() {
	for f, b := range d.sound {
		copy(d.frames[f], b)
	}
	clear(d.sound)
}

// testDamaged finds the kernel and its lists in 500 copies of the guest's memory, each
// damaged at random: in half of them one word of one task, which must leave the others;
// in the others any of what is read.
func testDamaged(t labTest) {
	const images = 250 // of each kind
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	guest, err := target.Open(t.Context(), t.g.Name())
	require.NoError(t, err)
	defer guest.Close()
	still, ok := guest.(target.Freezer)
	require.True(t, ok)
	require.NoError(t, still.Freeze())
	defer func() { assert.NoError(t, still.Thaw()) }()
	d := &damaged{Guest: guest, frames: map[paging.Frame][]byte{}, sound: map[paging.Frame][]byte{}, seen: map[paging.Frame]bool{}}
	d.cpus, err = guest.CPUs()
	require.NoError(t, err)
	k, err := linux.Discover(t.Context(), d, nil)
	require.NoError(t, err)
	tasks, err := k.Processes(true)
	require.NoError(t, err)
	require.Greater(t, len(tasks), 30)
	types, err := k.Types()
	require.NoError(t, err)
	size, err := types.Sizeof("task_struct")
	require.NoError(t, err)
	// random is a word as damage leaves it.
	random := func() uint64 {
		switch r.IntN(5) {
		case 0:
			return 0
		case 1:
			return r.Uint64N(1 << 47) // of user memory
		case 2:
			return tasks[r.IntN(len(tasks))].Addr + r.Uint64N(size)&^7
		case 3:
			return 1<<64 - 1 - r.Uint64N(1<<20)
		}
		return r.Uint64()
	}
	hidden := 0
	for i := range images {
		d.mend()
		// The idle task's struct is where the list begins, and is found by a symbol.
		n := 1 + r.IntN(len(tasks)-1)
		var fields []string
		for _, field := range []string{"tasks.next", "tasks.prev", "comm", "cred", "real_parent", "mm", "thread_node.next", "pid", "exit_state", ""} {
			if field == "" || types.HasField("task_struct."+field) {
				fields = append(fields, field)
			}
		}
		field := fields[r.IntN(len(fields))]
		at := tasks[n].Addr + r.Uint64N(size)&^7
		if field != "" {
			f, err := types.Offset("task_struct." + field)
			require.NoError(t, err)
			at = tasks[n].Addr + f.Offset
		}
		tr, err := k.Memory().Translate(k.Root(), paging.VAddr(at))
		require.NoError(t, err)
		value := random()
		word := d.spoil(t, tr.Frame)[at&0xfff:]
		was := endian.LittleEndian.Uint64(word)
		endian.LittleEndian.PutUint64(word, value)
		what := fmt.Sprintf("image %d: %s of %v (+%#x) is %#x", i, field, tasks[n], at-tasks[n].Addr, value)
		got, err := k.Processes(true)
		missing := slices.DeleteFunc(slices.Clone(tasks), func(p linux.Task) bool {
			// A process whose parent is the damaged one shows what is there.
			return slices.ContainsFunc(got, func(q linux.Task) bool {
				return p == q || p.Addr == q.Addr && (p.Addr == tasks[n].Addr || p.PPID == tasks[n].TGID)
			})
		})
		if len(missing) > 0 {
			hidden++
		}
		assert.Empty(t, missing, "%s (%v)", what, err)
		if strings.HasPrefix(field, "tasks.") && value != was {
			assert.Error(t, err, what)
		}
	}
	t.Logf("%d of %d images with one damaged task hide another one", hidden, images)

	// The frames that each step reads.
	d.mend()
	clear(d.seen)
	steps := func() (errs []error) {
		k, err := linux.Discover(t.Context(), d, nil)
		if err != nil {
			return []error{err}
		}
		_, err = k.Types()
		errs = append(errs, err)
		_, err = k.Processes(true)
		errs = append(errs, err)
		_, err = k.Modules()
		errs = append(errs, err)
		_, err = k.AllSymbols()
		return append(errs, err)
	}
	memory := func(f func()) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	d.reads = 0
	sound := memory(func() {
		for _, err := range steps() {
			require.NoError(t, err)
		}
	})
	soundReads := d.reads
	touched := slices.Sorted(maps.Keys(d.seen))
	results := map[string]int{}
	var most uint64
	mostReads := 0
	for i := range images {
		d.mend()
		for range 1 << r.IntN(8) {
			b := d.spoil(t, touched[r.IntN(len(touched))])
			switch r.IntN(4) {
			case 0: // a page that is lost
				clear(b)
			case 1: // a page that is another one
				copy(b, d.frames[touched[r.IntN(len(touched))]])
			case 2:
				b[r.IntN(len(b))] ^= 1 << r.IntN(8)
			case 3:
				endian.LittleEndian.PutUint64(b[8*r.IntN(len(b)/8):], random())
			}
		}
		d.reads = 0
		var errs []error
		most = max(most, memory(func() { errs = steps() }))
		mostReads = max(mostReads, d.reads)
		for n, name := range []string{"discovery", "types", "processes", "modules", "symbols"} {
			if n < len(errs) && errs[n] != nil {
				results[name+" fail"]++
			}
		}
		if i == 0 || most > 20*sound || mostReads > 100*soundReads {
			t.Logf("image %d: %d bytes, %d reads; sound: %d bytes, %d reads", i, most, mostReads, sound, soundReads)
		}
		require.Less(t, most, 20*sound, "image %d: bytes that were allocated", i)
		require.Less(t, mostReads, 100*soundReads, "image %d: pages that were read", i)
	}
	t.Logf("%d frames are read; of %d images: %v; at most %d bytes allocated (sound: %d), %d pages read (%d)",
		len(touched), images, results, most, sound, mostReads, soundReads)
}
