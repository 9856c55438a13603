package xentest

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// follower does what a tool must that follows calls, with nothing hidden from it: it sees
// each instruction of the guest.
type follower struct {
	t   *testing.T
	m   *Machine
	fns map[uint64]Function // by entry
	end map[uint64]bool     // instructions that end an interrupt
	// calls are those that each task is in, by its address, outer ones first.
	calls                            map[uint64][]call
	entered, returned, unwound, died map[string]uint64
	values                           map[string]map[uint64]uint64
	moved, nested                    int // calls that ended on another vCPU, and of rec in an interrupt of rec
}

type call struct {
	fn        string
	task      Task
	slot, ret uint64
	vcpu      int
}

func newFollower(t *testing.T, m *Machine) *follower {
	f := &follower{
		t: t, m: m, fns: map[uint64]Function{}, end: map[uint64]bool{}, calls: map[uint64][]call{},
		entered: map[string]uint64{}, returned: map[string]uint64{}, unwound: map[string]uint64{}, died: map[string]uint64{},
		values: map[string]map[uint64]uint64{},
	}
	backs := map[uint64]string{}
	for _, fn := range m.Functions() {
		f.fns[fn.Entry] = fn
		f.values[fn.Name] = map[uint64]uint64{}
		for _, b := range fn.Backs {
			backs[b] = fn.Name
		}
	}
	for _, in := range m.Insns() {
		if b := string(in.Bytes); b == "\x48\xcf" || b == "\x0f\x05" {
			f.end[in.VA] = true
		}
	}
	// The calls that began before.
	for _, task := range m.Tasks()[len(m.v):] {
		for sp := task.StackHi - 8; sp >= m.read64(task.Addr+taskSP); sp -= 8 {
			if fn, ok := backs[m.read64(sp)]; ok {
				f.calls[task.Addr] = append(f.calls[task.Addr], call{fn, task, sp, m.read64(sp), -1})
				f.entered[fn]++
			}
		}
	}
	return f
}

// lose ends calls of a task, from the i-th on, without a return.
func (f *follower) lose(task uint64, i int, count map[string]uint64) {
	for _, c := range f.calls[task][i:] {
		count[c.fn]++
	}
	f.calls[task] = f.calls[task][:i]
}

// step executes an instruction, and looks at where that has led.
func (f *follower) step(vcpu int) {
	v := f.m.v[vcpu]
	was := v.rip
	if f.m.RunVCPU(vcpu, 1) == 0 || f.end[was] {
		return // back from an interrupt to where it has been before
	}
	if f.m.prog.symbol(v.rip).Name == "switch_to" {
		return // between two tasks
	}
	task, err := f.m.CurrentTask(vcpu)
	if err != nil {
		f.t.Fatal(err)
	}
	sp, a := v.r[rsp], task.Addr
	if sp < task.StackLo || sp >= task.StackHi {
		f.t.Fatalf("vCPU %d at %#x: stack pointer %#x isn't in %+v", vcpu, v.rip, sp, task)
	}
	if s := f.calls[a]; len(s) > 0 && s[0].task != task {
		if f.m.TaskAlive(s[0].task) {
			f.t.Errorf("%+v is alive, and %+v as well", s[0].task, task)
		}
		f.lose(a, 0, f.died)
	}
	if i := slices.IndexFunc(f.calls[a], func(c call) bool { return v.rip == c.ret && sp == c.slot+8 }); i >= 0 {
		n := i // those that have left their slot to each other return together
		for n < len(f.calls[a]) && f.calls[a][n].slot == f.calls[a][i].slot {
			c := f.calls[a][n]
			f.returned[c.fn]++
			f.values[c.fn][v.r[rax]]++
			if c.vcpu >= 0 && c.vcpu != vcpu {
				f.moved++
			}
			n++
		}
		f.lose(a, n, f.unwound)
		f.calls[a] = f.calls[a][:i]
	}
	fn, ok := f.fns[v.rip]
	if !ok {
		return
	}
	c := call{fn.Name, task, sp, f.m.read64(sp), vcpu}
	if i := slices.IndexFunc(f.calls[a], func(d call) bool { return d.slot < sp }); i >= 0 {
		f.lose(a, i, f.unwound)
	}
	if i := slices.IndexFunc(f.calls[a], func(d call) bool { return d.slot == sp }); i >= 0 {
		last := f.calls[a][len(f.calls[a])-1]
		if last.ret != c.ret || !f.m.TailsTo(f.m.Symbol(last.fn), fn.Entry) {
			f.lose(a, i, f.unwound)
		}
	}
	f.entered[fn.Name]++
	f.calls[a] = append(f.calls[a], c)
	n := 0
	for _, d := range f.calls[a] {
		if d.fn == "rec" {
			n++
		}
	}
	if n > recDepth {
		f.nested++
	}
}

func returnsConfigs() (all []Config) {
	for _, k := range []Kind{PV, HVM} {
		for _, n := range []int{1, 2, 4} {
			all = append(all, Config{Kind: k, VCPUs: n, Returns: true, GDBSX: true, AVX: n > 1, Seed: uint64(n), IRQEvery: 400})
		}
	}
	return all
}

// What the guest counts of its calls is what somebody sees who looks at each of its
// instructions, and adds up.
func TestReturns(t *testing.T) {
	for _, cfg := range returnsConfigs() {
		t.Run(cfg.name(), func(t *testing.T) {
			m := New(cfg)
			text := m.Text()
			f := newFollower(t, m)
			r := rand.New(rand.NewPCG(cfg.Seed, 1))
			steps := 100_000
			if testing.Short() {
				steps = 40_000
			}
			for n := 0; n < steps*cfg.VCPUs || !m.Parked(); n++ {
				if n == steps*cfg.VCPUs {
					m.Park()
				}
				if s := m.Oops(); s != "" || n > 2*steps*cfg.VCPUs+20_000 {
					t.Fatalf("%s: %s", s, m.State())
				}
				i := r.IntN(cfg.VCPUs)
				f.step(i)
				if m.prog.symbol(m.v[i].rip).of == "rec" && r.IntN(100) == 0 {
					m.Interrupt(i) // which calls it, too
				}
			}
			n := uint64(cfg.VCPUs)
			inside := map[string]uint64{
				"blocker": n + 1, "call_blocker": n + 1, "blocking": waiters * n, "victim": n,
				"yield": n + 1 + waiters*n + n,
			}
			for _, fn := range m.Functions() {
				entered, returned, unwound, died := m.Returns(fn.Name)
				if entered == 0 || entered != returned+unwound+died+m.Inside(fn.Name) || m.Inside(fn.Name) != inside[fn.Name] {
					t.Errorf("%s: %d entered, %d returned, %d unwound, %d died, %d inside", fn.Name, entered, returned, unwound, died, m.Inside(fn.Name))
				}
				for _, c := range []struct {
					what      string
					got, want uint64
				}{
					{"entered", entered, f.entered[fn.Name]}, {"returned", returned, f.returned[fn.Name]},
					{"unwound", unwound, f.unwound[fn.Name]}, {"died", died, f.died[fn.Name]},
				} {
					if c.got != c.want {
						t.Errorf("%s: guest has counted %d %s, seen %d", fn.Name, c.got, c.what, c.want)
					}
				}
				if fn.Values == nil {
					continue
				}
				if got := slices.Sorted(maps.Keys(f.values[fn.Name])); !slices.Equal(got, fn.Values) {
					t.Errorf("%s has returned %v, must be %v", fn.Name, got, fn.Values)
				}
				for v, got := range f.values[fn.Name] {
					if want := returned / uint64(len(fn.Values)); got != want {
						t.Errorf("%s has returned %d %d times, must be %d", fn.Name, v, got, want)
					}
				}
			}
			for _, name := range []string{"lj_mid", "lj_deep"} {
				if _, _, n, _ := m.Returns(name); n == 0 {
					t.Errorf("%s was never unwound", name)
				}
			}
			for _, name := range []string{"victim", "yield"} {
				if _, n, _, d := m.Returns(name); n == 0 || d == 0 {
					t.Errorf("%s: %d returned, %d died", name, n, d)
				}
			}
			if f.moved == 0 != (cfg.VCPUs == 1) || f.nested == 0 {
				t.Errorf("%d calls went to another vCPU, %d interrupted rec", f.moved, f.nested)
			}
			for i := range m.v {
				if m.Result(i) != innerValue {
					t.Errorf("vCPU %d: the result is %#x", i, m.Result(i))
				}
			}
			t.Logf("%v, %d loops of vCPU 0, %d calls moved, %d interrupts in rec", m.prog, m.Counter(0), f.moved, f.nested)
			m.Release()
			Verify(t, m, text)
		})
	}
}
