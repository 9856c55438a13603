package xen

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
