package xen

import "github.com/vmprobes/vmprobes/paging"

// Torn makes of the state of a tool that has counted one stop, of vCPU v, and done nothing
// about it, what it was before with of the stores of takeStop.
func Torn(mem []byte, vcpus, v, with int) error {
	s, vs, err := stateIn(mem, vcpus)
	if err != nil {
		return err
	}
	s.tookOwed, s.tookLatched, s.intent = s.owed, s.latched, intentAsk
	s.took.Store(int64(v) + 1)
	s.owed--
	vs[v].stopped = false
	if with > 0 {
		s.owed++
	}
	if with > 1 {
		vs[v].stopped = true
	}
	if with > 2 {
		s.intent = intentNone
	}
	return nil
}

// WithRoots asks page tables, of which each answers as told, for something of the kernel's.
// err says that some of them aren't known.
func WithRoots(roots []paging.Root, err error, answers map[paging.Root]error) error {
	g := newGuest(nil, nil, new(shared))
	g.roots = func() ([]paging.Root, error) { return roots, err }
	return g.withRoot(0, func(r paging.Root) error { return answers[r] })
}
