package xenctrl

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// A Store is a connection to xenstore. WaitWatch may be called from one
// goroutine at a time, the other methods from any.
type Store struct {
	mu     sync.RWMutex // held for reading during each call
	l      storeLib
	p      *poller
	once   sync.Once
	closed bool
}

// OpenStore connects to xenstore.
func OpenStore() (*Store, error) {
	l, err := openStoreLib()
	if err != nil {
		return nil, err
	}
	return newStore(l)
}

// newStore owns l, and closes it if it fails.
func newStore(l storeLib) (*Store, error) {
	p, err := newPoller(l.fd(), false)
	if err != nil {
		_ = l.close()
		return nil, opErr("open xenstore", domNone, -1, err)
	}
	return &Store{l: l, p: p}, nil
}

func (s *Store) do(op string, paths []string, f func(l storeLib) error) error {
	for _, path := range paths {
		if path == "" || len(path) > maxStorePath || strings.IndexByte(path, 0) >= 0 {
			return opErr(op, domNone, -1, syscall.EINVAL)
		}
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return opErr(op, domNone, -1, ErrClosed)
	}
	return opErr(op, domNone, -1, f(s.l))
}

// Read returns the value of a node. It is fs.ErrNotExist if there is none.
func (s *Store) Read(path string) (string, error) {
	var v []byte
	err := s.do("xenstore read "+path, []string{path}, func(l storeLib) (err error) {
		v, err = l.read(path)
		return err
	})
	return string(v), err
}

// Directory returns the names of the nodes below a node.
func (s *Store) Directory(path string) ([]string, error) {
	var names []string
	err := s.do("xenstore directory "+path, []string{path}, func(l storeLib) (err error) {
		names, err = l.directory(path)
		return err
	})
	return names, err
}

// Watch asks for events when the node at path, or one below it, changes. The
// first event comes at once. The token comes back with each event.
func (s *Store) Watch(path, token string) error {
	return s.do("xenstore watch "+path, []string{path, token}, func(l storeLib) error { return l.watch(path, token) })
}

// Unwatch ends what Watch began.
func (s *Store) Unwatch(path, token string) error {
	return s.do("xenstore unwatch "+path, []string{path, token}, func(l storeLib) error { return l.unwatch(path, token) })
}

// WaitWatch returns the next event of a watch, or the error of ctx.
func (s *Store) WaitWatch(ctx context.Context) (path, token string, err error) {
	const op = "xenstore wait"
	s.mu.RLock()
	defer s.mu.RUnlock()
	for {
		if s.closed {
			return "", "", opErr(op, domNone, -1, ErrClosed)
		}
		path, token, err = s.l.checkWatch()
		if err == nil {
			return path, token, nil
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return "", "", opErr(op, domNone, -1, err)
		}
		if err := s.p.wait(ctx); err != nil {
			return "", "", waitErr(op, ctx, err)
		}
	}
}

// Close ends the connection and makes WaitWatch return. Calling it again does
// nothing.
func (s *Store) Close() (err error) {
	s.once.Do(func() {
		s.p.interrupt() // wakes WaitWatch, which holds the lock
		s.mu.Lock()
		defer s.mu.Unlock()
		s.closed = true
		s.p.close()
		err = opErr("close xenstore", domNone, -1, s.l.close())
	})
	return err
}

// DomainName returns the name that the toolstack gave to a domain.
func (s *Store) DomainName(id DomID) (string, error) {
	name, err := s.Read(fmt.Sprintf("/local/domain/%d/name", id))
	if errors.Is(err, syscall.ENOENT) {
		return "", &Error{Op: "get name", Domain: id, VCPU: -1, Err: ErrNoDomain}
	}
	return name, err
}

// DomainByName returns the id of the domain with that name: ErrNoDomain if
// there is none, ErrAmbiguousName if there are several.
func (s *Store) DomainByName(name string) (DomID, error) {
	list, err := s.Directory("/local/domain")
	if err != nil {
		return 0, err
	}
	var found []DomID
	for _, entry := range list {
		n, err := strconv.ParseUint(entry, 10, 16)
		if err != nil || DomID(n) >= DomIDFirstReserved {
			continue
		}
		got, err := s.DomainName(DomID(n))
		if errors.Is(err, ErrNoDomain) {
			continue // it went away, or was never given a name
		}
		if err != nil {
			return 0, err
		}
		if got == name {
			found = append(found, DomID(n))
		}
	}
	switch len(found) {
	case 0:
		return 0, fmt.Errorf("domain %q: %w", name, ErrNoDomain)
	case 1:
		return found[0], nil
	}
	return 0, fmt.Errorf("domain %q: %w: name it by one of the ids %v", name, ErrAmbiguousName, found)
}
