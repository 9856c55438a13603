package breakpoint_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/xentest"
)

// host is a simulated Xen and its guest.
type host struct {
	name string
	cfg  xentest.Config
}

func hosts() []host {
	return []host{
		{"pv", xentest.Config{Kind: xentest.PV, GDBSX: true, AVX: true}},
		{"hvm-tf", xentest.Config{Kind: xentest.HVM, AVX: true}},
		{"hvm-mtf", xentest.Config{Kind: xentest.HVM, MTF: true, AVX: true}},
	}
}

// each runs f on every host, with one and several vCPUs.
func each(t *testing.T, f func(t *testing.T, cfg xentest.Config)) {
	for _, n := range []int{1, 2, 4} {
		with(t, n, f)
	}
}

// one runs f on every host with two vCPUs.
func one(t *testing.T, f func(t *testing.T, cfg xentest.Config)) { with(t, 2, f) }

func with(t *testing.T, vcpus int, f func(t *testing.T, cfg xentest.Config)) {
	for _, h := range hosts() {
		t.Run(fmt.Sprintf("%s/%d", h.name, vcpus), func(t *testing.T) {
			cfg := h.cfg
			cfg.VCPUs, cfg.Seed = vcpus, uint64(vcpus)
			f(t, cfg)
		})
	}
}

// engine attaches to a guest at rest, whose driver the test may hook. The guest must
// be unharmed at the end.
func engine(t *testing.T, cfg xentest.Config, c breakpoint.Config) (*xentest.Machine, *hooked, *breakpoint.Engine) {
	t.Helper()
	m := xentest.New(cfg)
	before := m.Text()
	m.Start()
	quiesce(t, m)
	drv, err := m.Attach(nil)
	require.NoError(t, err)
	d := &hooked{Driver: drv}
	c.Scratch = m.Scratch
	e := breakpoint.New(d, c)
	t.Cleanup(func() {
		assert.NoError(t, e.Close())
		m.Release()
		xentest.Verify(t, m, before)
		m.Stop()
		assert.Zero(t, m.Mappings())
		assert.Zero(t, m.Pauses())
	})
	return m, d, e
}

// hooked is a driver with some calls of the test's. Those that return an error run
// before the driver's own, and a failure of theirs is its failure.
type hooked struct {
	breakpoint.Driver
	read    func(addr uint64) error
	store   func() error
	remove  func() error
	resume  func() error
	thaw    func() error
	step    func() error
	stepped func()                 // a step has begun
	waited  func(*breakpoint.Stop) // a stop has come
}

func first(hook, call func() error) error {
	if hook != nil {
		if err := hook(); err != nil {
			return err
		}
	}
	return call()
}

func (d *hooked) Read(cr3, addr uint64, b []byte) (int, error) {
	if d.read != nil {
		if err := d.read(addr); err != nil {
			return 0, err
		}
	}
	return d.Driver.Read(cr3, addr, b)
}

func (d *hooked) Store(cr3, addr uint64, b []byte) error {
	return first(d.store, func() error { return d.Driver.Store(cr3, addr, b) })
}

func (d *hooked) RemoveBreak(addr uint64) error {
	return first(d.remove, func() error { return d.Driver.RemoveBreak(addr) })
}

func (d *hooked) Resume(s *breakpoint.Stop) error {
	return first(d.resume, func() error { return d.Driver.Resume(s) })
}

func (d *hooked) Thaw() error { return first(d.thaw, d.Driver.Thaw) }

func (d *hooked) StepOver(s *breakpoint.Stop, addr uint64) error {
	err := first(d.step, func() error { return d.Driver.StepOver(s, addr) })
	if err == nil && d.stepped != nil {
		d.stepped()
	}
	return err
}

func (d *hooked) Wait(ctx context.Context, s *breakpoint.Stop) error {
	err := d.Driver.Wait(ctx, s)
	if err == nil && d.waited != nil {
		d.waited(s)
	}
	return err
}

var errInjected = errors.New("injected")

// failing returns a hook that fails n times.
func failing(n int) func() error {
	return func() error {
		if n > 0 {
			n--
			return errInjected
		}
		return nil
	}
}

// failNext has the next n calls of the hypervisor fail.
func failNext(m *xentest.Machine, n int) {
	for i := range n {
		m.FailCall(1+i, fmt.Errorf("%w: %w", errInjected, syscall.ENOMEM))
	}
}

// served runs f while the engine serves, and returns Serve's result.
func served(t *testing.T, e *breakpoint.Engine, f func()) error {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := e.Serve(ctx, true)
		done <- err
	}()
	f()
	cancel()
	err := <-done
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// serveFor serves for a while, again after each failure, and returns the failures.
func serveFor(t *testing.T, e *breakpoint.Engine, d time.Duration) (errs []error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	for ctx.Err() == nil {
		if _, err := e.Serve(ctx, true); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			errs = append(errs, err)
		}
	}
	return errs
}

// serveUntil serves until done, for two seconds at the most, and returns what
// Serve told.
func serveUntil(t *testing.T, e *breakpoint.Engine, done func() bool) (told []error) {
	t.Helper()
	for range 200 {
		if done() {
			return told
		}
		told = append(told, serveFor(t, e, 10*time.Millisecond)...)
	}
	return told
}

// patience is how long a guest may take to come to rest before it counts as stuck. With
// every instruction of a loop stepped in place that takes seconds, and more on a busy
// machine.
const patience = 2 * time.Minute

func quiesce(t *testing.T, m *xentest.Machine) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := m.Quiesce(ctx); err != nil {
		calls := slices.DeleteFunc(m.CallLog(), func(c xentest.Call) bool { return c.Op == "gdbsx domstatus" || c.Op == "info" })
		require.NoError(t, err, "%s\nlast calls: %v", m.State(), calls[max(0, len(calls)-30):])
	}
}

// find returns the guest's first instruction that begins with these bytes.
func find(t *testing.T, m *xentest.Machine, prefix ...byte) uint64 {
	t.Helper()
	for _, in := range m.Insns() {
		if bytes.HasPrefix(in.Bytes, prefix) {
			return in.VA
		}
	}
	t.Fatalf("the guest has no % x", prefix)
	return 0
}

// outOfLine is an instruction (imul) that is executed out of line.
func outOfLine(t *testing.T, m *xentest.Machine) uint64 { return find(t, m, 0x48, 0x69, 0xc0) }

// isOwn reports whether va is one of the guest's own breakpoints.
func isOwn(m *xentest.Machine, va uint64) bool {
	return slices.Contains(m.OwnBreakpoints(), va)
}
