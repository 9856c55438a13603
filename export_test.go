package vmprobes

// Looping reports whether Loop serves the hits: from then on none counts as missed.
func (s *Session) Looping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.looping
}
