package main

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A storm changes the kernel's lists in the background as fast as the guest can.
type storm struct {
	ends   atomic.Bool
	jobs   sync.WaitGroup
	forks  atomic.Uint64
	loads  atomic.Uint64
	failed atomic.Pointer[string]
}

// command starts the storms that are named, or ends what runs.
func (s *storm) command(kinds []string, cpus int) (string, error) {
	for _, kind := range kinds {
		switch kind {
		case "forks":
			s.ends.Store(false)
			for range cpus {
				s.jobs.Go(s.fork)
			}
		case "modules":
			s.ends.Store(false)
			s.jobs.Go(s.reload)
		case "off":
			s.ends.Store(true)
			s.jobs.Wait()
		default:
			return "", fmt.Errorf("no storm of %q: forks, modules or off", kind)
		}
	}
	if err := s.failed.Swap(nil); err != nil {
		return "", fmt.Errorf("storm: %s", *err)
	}
	return fmt.Sprintf("storm forks=%d loads=%d", s.forks.Swap(0), s.loads.Swap(0)), nil
}

// fork has up to eight processes at a time that end at once.
func (s *storm) fork() {
	for !s.ends.Load() {
		var pids []int
		for range 8 {
			if pid := forkExit(); pid > 0 {
				pids = append(pids, pid)
			}
		}
		for _, pid := range pids {
			for {
				_, err := unix.Wait4(pid, nil, 0, nil)
				if err != unix.EINTR {
					break
				}
			}
			s.forks.Add(1)
		}
	}
}

// reload has all modules but one come and go.
func (s *storm) reload() {
	for !s.ends.Load() {
		if _, err := reloadModules(1, 1); err != nil {
			what := err.Error()
			s.failed.Store(&what)
			return
		}
		s.loads.Add(1)
	}
}
