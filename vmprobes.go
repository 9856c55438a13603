// Package vmprobes places kprobe-like breakpoints in the kernel of a running Xen
// guest, from dom0, with nothing installed in the guest.
//
// A [Probe] names an instruction, and handlers that run before and after it:
//
//	p := &vmprobes.Probe{
//		DomainName: "a3guest",
//		Symbol:     "do_sys_openat2",
//		Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
//			name, _ := p.ReadString(vmprobes.Addr(r.Arg(1)), 4096)
//			fmt.Println("open", name)
//			return vmprobes.Continue
//		},
//	}
//	if err := vmprobes.Register(p); err != nil {
//		log.Fatal(err)
//	}
//	defer vmprobes.Unregister(p)
//	err := vmprobes.Loop(context.Background(), p)
//
// [Register], [Loop] and [Unregister] are those of the C library of the same
// name. [Open] gives a [Session], which holds any number of probes.
//
// PV guests need a hypervisor built with CONFIG_GDBSX; HVM and PVH guests work
// with every Xen that has vm_event. Open says what is missing before it touches
// anything.
package vmprobes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/vmprobes/vmprobes/internal/route"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// Open attaches to the domain called name, or with the numeric id that it
// spells. A nil opts means defaults.
func Open(ctx context.Context, name string, opts *Options) (*Session, error) {
	s, err := open(ctx, name, opts)
	if err != nil {
		return nil, &Error{Op: "open", Domain: name, Err: err}
	}
	return s, nil
}

func open(ctx context.Context, name string, opts *Options) (_ *Session, err error) {
	if name == "" {
		return nil, ErrNoDomain
	}
	if opts == nil {
		opts = new(Options)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if euid := os.Geteuid(); euid > 0 {
		return nil, fmt.Errorf("%w (this is user %d)", ErrNotRoot, euid)
	}
	h, err := xenctrl.Open()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	store, err := xenctrl.OpenStore()
	if err != nil {
		return nil, err
	}
	defer store.Close()

	id, err := findDomain(store, name)
	if err != nil {
		return nil, err
	}
	info, err := h.Domain(id)
	if err != nil {
		if errors.Is(err, xenctrl.ErrNoDomain) {
			return nil, fmt.Errorf("%w (%w)", ErrDomainNotFound, err)
		}
		return nil, err
	}
	switch {
	case info.Gone():
		return nil, ErrDomainGone
	case info.Flags&xenctrl.DomainPaused != 0:
		return nil, ErrDomainPaused
	}
	if kindOf(info.Flags) == PV {
		if bits, err := h.GuestWidth(id); err != nil {
			return nil, err
		} else if bits != 64 {
			return nil, fmt.Errorf("the guest is a %d-bit PV one: %w", bits, errors.ErrUnsupported)
		}
	}
	d := Domain{ID: DomainID(id), Kind: kindOf(info.Flags), VCPUs: info.OnlineVCPUs}
	if d.Name, err = store.DomainName(id); err != nil || d.Name == "" {
		d.Name = strconv.Itoa(int(id))
	}
	if d.Kind == HVM {
		// A PVH guest has no device model.
		if _, err := store.Read(fmt.Sprintf("/local/domain/0/device-model/%d/state", id)); err != nil {
			d.Kind = PVH
		}
	}
	syms, file, symErr := loadSymbols(opts, func() string { return bootedKernel(store, info) })
	if symErr != nil && (opts.Symbols != "" || os.Getenv(symbolsEnv) != "") {
		return nil, symErr
	}
	if syms != nil {
		anchors, err := findAnchors(h, info)
		if err != nil {
			return nil, err
		}
		if syms, err = fit(syms, anchors); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	drv, err := attach(route.Live(h, id), info)
	if err != nil {
		return nil, err
	}
	if dbg, ok := drv.(*route.Debugger); ok {
		known := false
		if syms != nil {
			if sym, err := syms.Lookup("xen_vcpu_info"); err == nil {
				dbg.SetVCPUInfo(sym.Addr)
				known = true
			}
		}
		if !known && opts.Logger != nil {
			opts.Logger.Warn("xen_vcpu_info is not known: breakpoints of the guest's own are given back as if interrupts were on", "domain", d.Name)
		}
	}
	s := newSession(d, drv, syms, symErr, opts, func() { h.Close() })
	if syms != nil {
		s.useKernelRoot()
		if err := s.checkBanner(); err != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", file, err), s.Close())
		}
	}
	s.log.Debug("attached", "kind", d.Kind.String(), "vcpus", d.VCPUs, "symbols", file)
	return s, nil
}

// findDomain resolves a domain's name, or the id that it spells.
func findDomain(store *xenctrl.Store, name string) (xenctrl.DomID, error) {
	id, err := store.DomainByName(name)
	if errors.Is(err, xenctrl.ErrNoDomain) {
		n, perr := strconv.ParseUint(name, 10, 16)
		if perr != nil || xenctrl.DomID(n) >= xenctrl.DomIDFirstReserved {
			return 0, fmt.Errorf("%w: `xl list` shows those there are", ErrDomainNotFound)
		}
		id, err = xenctrl.DomID(n), nil
	}
	if err != nil {
		return 0, err
	}
	if id == xenctrl.DomID0 {
		return 0, ErrControlDomain
	}
	return id, nil
}

// bootedKernel returns the kernel file from which libxl built a domain, or "".
func bootedKernel(store *xenctrl.Store, info xenctrl.DomainInfo) string {
	// For PV guests it is in xenstore.
	if vm, err := store.Read(fmt.Sprintf("/local/domain/%d/vm", info.ID)); err == nil && strings.HasPrefix(vm, "/vm/") {
		if file, err := store.Read(vm + "/image/kernel"); err == nil && isKernel(file) {
			return file
		}
	}
	// For all, in the configuration that libxl keeps of a domain.
	h := info.Handle
	return configuredKernel(fmt.Sprintf("/var/lib/xen/userdata-d.%d.%x-%x-%x-%x-%x.libxl-json",
		info.ID, h[:4], h[4:6], h[6:8], h[8:10], h[10:]))
}

// configuredKernel returns the kernel that a libxl-json file names.
func configuredKernel(name string) string {
	f, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	const limit = 1 << 20
	var config struct {
		Build struct {
			Kernel string `json:"kernel"`
			PV     struct {
				Kernel string `json:"kernel"`
			} `json:"type.pv"`
		} `json:"b_info"`
	}
	if json.NewDecoder(io.LimitReader(f, limit)).Decode(&config) != nil {
		return ""
	}
	for _, file := range []string{config.Build.Kernel, config.Build.PV.Kernel} {
		if isKernel(file) {
			return file
		}
	}
	return ""
}

// isKernel rules out what can't be a kernel file of dom0's, such as the boot
// loader of an HVM guest.
func isKernel(file string) bool {
	if !strings.HasPrefix(file, "/") || strings.HasSuffix(file, "/hvmloader") {
		return false
	}
	st, err := os.Stat(file)
	return err == nil && st.Mode().IsRegular()
}

// findAnchors asks Xen for addresses that the guest's kernel has given it.
func findAnchors(h *xenctrl.Handle, info xenctrl.DomainInfo) ([]anchor, error) {
	if kindOf(info.Flags) == PV {
		var c xenctrl.VCPUContext
		if err := h.VCPUContext(info.ID, 0, &c); err != nil {
			return nil, err
		}
		return []anchor{
			{c.Traps[3].Address, xenInt3},
			{c.Traps[14].Address, xenPageFault},
			{c.SyscallCallbackEIP, xenSyscall},
		}, nil
	}
	c, err := h.HVMCPU(info.ID, 0)
	if err != nil {
		return nil, err
	}
	if c.LSTAR == 0 {
		return nil, errors.New("the guest's kernel hasn't set up its system calls yet: wait until it has booted")
	}
	return []anchor{{c.LSTAR, syscallEntry}}, nil
}

// checkArguments finds what is wrong with a probe for the package-level
// functions, as register_vmprobe did.
func checkArguments(p *Probe) error {
	switch {
	case p == nil:
		return ErrNilProbe
	case p.DomainID != 0 && p.DomainName != "":
		return ErrTwoDomains
	case p.DomainID == 0 && p.DomainName == "":
		return ErrNoDomain
	case p.DomainName == "0" || p.DomainName == "Domain-0":
		return ErrControlDomain
	}
	return p.checkPlace()
}

// Register finds p's domain and address, attaches and arms the breakpoint
// (register_vmprobe).
//
// Until Unregister, SIGINT, SIGTERM, SIGHUP and SIGQUIT are caught: the
// first one unregisters the probe and ends its Loop with ErrInterrupted; after
// that, signals do again what they did before. SIGPIPE and SIGTSTP (Ctrl+Z) are
// ignored meanwhile: a write to a closed pipe returns its error, and the program
// can't be stopped while a guest depends on it. Programs with signal handling of
// their own use [Open].
func Register(p *Probe) error {
	if err := checkArguments(p); err != nil {
		e := &Error{Op: "register", Err: err}
		if p != nil {
			e.Domain, e.Probe = p.domain(), p.location()
		}
		return e
	}
	p.mu.Lock()
	registered := p.session != nil
	p.mu.Unlock()
	if registered {
		return &Error{Op: "register", Domain: p.domain(), Probe: p.location(), Err: ErrRegistered}
	}
	g := guardSignals()
	s, err := Open(context.Background(), p.domain(), &Options{Logger: defaultLogger()})
	if err != nil {
		g.release()
		return err
	}
	s.guard = g
	p.mu.Lock()
	p.ended = g
	p.mu.Unlock()
	if err := s.register(true, p); err != nil {
		err = errors.Join(err, s.Close())
		g.release()
		return err
	}
	go g.watch(s)
	return nil
}

// defaultLogger logs to stderr if VMPROBES_DEBUG is set: what a C program built
// with -D_VERBOSE printed.
func defaultLogger() *slog.Logger {
	if os.Getenv("VMPROBES_DEBUG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Loop runs the guest and calls p's handlers until one of them returns something
// else than Continue, ctx is done, a signal comes (ErrInterrupted), or the
// domain is gone (loop_vmprobe). p stays registered unless a signal came.
func Loop(ctx context.Context, p *Probe) error {
	if p == nil {
		return &Error{Op: "loop", Err: ErrNilProbe}
	}
	p.mu.Lock()
	s, private, ended := p.session, p.private, p.ended
	p.mu.Unlock()
	if sig := ended.signal(); s == nil && sig != nil {
		return &Error{Op: "loop", Domain: p.domain(), Probe: p.location(), Err: fmt.Errorf("%w (%v)", ErrInterrupted, sig)}
	}
	if s == nil || !private {
		return &Error{Op: "loop", Domain: p.domain(), Probe: p.location(), Err: ErrNotRegistered}
	}
	err := s.Loop(ctx)
	if sig := s.guard.signal(); sig != nil && errors.Is(err, ErrClosed) {
		return &Error{Op: "loop", Domain: p.domain(), Probe: p.location(), Err: fmt.Errorf("%w (%v)", ErrInterrupted, sig)}
	}
	return err
}

// Unregister takes the breakpoint out, gives the guest its instruction back and
// detaches (unregister_vmprobe). Unregistering a probe that isn't registered
// does nothing. A handler must not call it: it returns Stop instead.
func Unregister(p *Probe) error {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	s, private := p.session, p.private
	p.mu.Unlock()
	if s == nil {
		return nil
	}
	if !private {
		return s.Unregister(p)
	}
	err := s.Close()
	s.guard.release()
	return err
}

// guard catches signals for one registration of the package-level functions.
type guard struct {
	ch   chan os.Signal
	quit chan struct{}
	once sync.Once

	mu  sync.Mutex
	sig os.Signal
}

func guardSignals() *guard {
	g := &guard{ch: make(chan os.Signal, 8), quit: make(chan struct{})}
	for _, sig := range append(notEnds(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT) {
		if !signal.Ignored(sig) {
			signal.Notify(g.ch, sig)
		}
	}
	return g
}

// watch unregisters the probe of s at the first signal. After that, signals do
// again what they did before: the next one ends the program.
func (g *guard) watch(s *Session) {
	defer g.release()
	for {
		select {
		case <-g.quit:
			return
		case sig := <-g.ch:
			if slices.Contains(notEnds(), sig) {
				continue
			}
			g.mu.Lock()
			g.sig = sig
			g.mu.Unlock()
			if err := s.Close(); err != nil {
				s.log.Error("unregister after a signal", "signal", sig.String(), "err", err)
			}
			return
		}
	}
}

// signal returns the signal that unregistered the probe, or nil.
func (g *guard) signal() os.Signal {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sig
}

func (g *guard) release() {
	g.once.Do(func() {
		signal.Stop(g.ch)
		close(g.quit)
	})
}
