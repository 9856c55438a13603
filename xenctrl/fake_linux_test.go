package xenctrl

import (
	"sort"
	"strings"
	"sync"
	"syscall"
)

// A pipe is the descriptor of a fake: readable while something is pending.
type pipe struct{ r, w int }

func newPipe() pipe {
	var p [2]int
	if err := syscall.Pipe2(p[:], syscall.O_CLOEXEC); err != nil {
		panic(err)
	}
	return pipe{p[0], p[1]}
}

func (p pipe) put() { _, _ = syscall.Write(p.w, []byte{1}) }
func (p pipe) get() { _, _ = syscall.Read(p.r, make([]byte, 1)) }
func (p pipe) close() {
	_ = syscall.Close(p.r)
	_ = syscall.Close(p.w)
}

// fakeEvents is an eventLib in memory.
type fakeEvents struct {
	pipe
	mu       sync.Mutex
	queue    []uint32
	bound    map[uint32]bool
	masked   map[uint32]bool
	notified int
	bindErr  error
	onNotify func()
	closed   int
}

var _ eventLib = (*fakeEvents)(nil)

func newFakeEvents() *fakeEvents {
	return &fakeEvents{pipe: newPipe(), bound: map[uint32]bool{}, masked: map[uint32]bool{}}
}

func (e *fakeEvents) fd() int { return e.r }

func (e *fakeEvents) bind() (uint32, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.bindErr != nil {
		return 0, e.bindErr
	}
	port := uint32(len(e.bound) + 9)
	e.bound[port] = true
	return port, nil
}

func (e *fakeEvents) bindVIRQ(uint32) (uint32, error)               { return e.bind() }
func (e *fakeEvents) bindInterdomain(DomID, uint32) (uint32, error) { return e.bind() }

func (e *fakeEvents) unbind(port uint32) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.bound[port] {
		return syscall.ENOTCONN
	}
	delete(e.bound, port)
	return nil
}

func (e *fakeEvents) notify(port uint32) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.bound[port] {
		return syscall.ENOTCONN
	}
	e.notified++
	if e.onNotify != nil {
		e.onNotify()
	}
	return nil
}

// raise is an event from the other side.
func (e *fakeEvents) raise(port uint32) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.masked[port] {
		return
	}
	e.masked[port] = true
	e.queue = append(e.queue, port)
	e.put()
}

func (e *fakeEvents) pending() (uint32, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.queue) == 0 {
		return 0, syscall.EAGAIN
	}
	port := e.queue[0]
	e.queue = e.queue[1:]
	e.get()
	return port, nil
}

func (e *fakeEvents) unmask(port uint32) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.masked, port)
	return nil
}

func (e *fakeEvents) close() error {
	e.closed++
	e.pipe.close()
	return nil
}

// fakeStore is a storeLib in memory.
type fakeStore struct {
	pipe
	mu      sync.Mutex
	nodes   map[string]string
	watches map[[2]string]bool
	queue   [][2]string
	closed  int
}

var _ storeLib = (*fakeStore)(nil)

func newFakeStore(nodes map[string]string) *fakeStore {
	return &fakeStore{pipe: newPipe(), nodes: nodes, watches: map[[2]string]bool{}}
}

func (s *fakeStore) fd() int { return s.r }

func (s *fakeStore) read(path string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.nodes[path]
	if !ok {
		return nil, syscall.ENOENT
	}
	return []byte(v), nil
}

func (s *fakeStore) directory(path string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found := map[string]bool{}
	for p := range s.nodes {
		if rest, ok := strings.CutPrefix(p, path+"/"); ok {
			name, _, _ := strings.Cut(rest, "/")
			found[name] = true
		}
	}
	if len(found) == 0 {
		return nil, syscall.ENOENT
	}
	var names []string
	for name := range found {
		names = append(names, name)
	}
	sort.Strings(names)
	return names, nil
}

func (s *fakeStore) watch(path, token string) error {
	s.mu.Lock()
	s.watches[[2]string{path, token}] = true
	s.mu.Unlock()
	s.fire(path)
	return nil
}

func (s *fakeStore) fire(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		if w[0] == path {
			s.queue = append(s.queue, w)
			s.put()
		}
	}
}

func (s *fakeStore) unwatch(path, token string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.watches[[2]string{path, token}] {
		return syscall.ENOENT
	}
	delete(s.watches, [2]string{path, token})
	return nil
}

func (s *fakeStore) checkWatch() (string, string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return "", "", syscall.EAGAIN
	}
	w := s.queue[0]
	s.queue = s.queue[1:]
	s.get()
	return w[0], w[1], nil
}

func (s *fakeStore) close() error {
	s.closed++
	s.pipe.close()
	return nil
}
