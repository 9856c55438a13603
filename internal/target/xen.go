package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/sentinel"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// xenGuest is a domain of the Xen that this program runs on.
type xenGuest struct {
	*paging.Cache
	hv    xen.Hypervisor
	dom   xenctrl.DomainInfo
	info  Info
	pages func() (uint64, error)
	live  bool // a domain of this host, and not a test's
	close func() error
	held  atomic.Int32 // Holds without their LetGo
}

func openXen(ctx context.Context, name string) (Guest, error) {
	return within(ctx, "xenstored", func() (Guest, error) { return openDomain(strings.TrimPrefix(name, "xen:")) })
}

// within calls open, which asks who may never answer, and returns early when ctx is done.
// A guest that is opened after that is closed.
func within(ctx context.Context, who string, open func() (Guest, error)) (Guest, error) {
	type result struct {
		g   Guest
		err error
	}
	done := make(chan result)
	go func() {
		g, err := open()
		select {
		case done <- result{g, err}:
		case <-ctx.Done():
			if err == nil {
				_ = g.Close()
			}
		}
	}()
	select {
	case r := <-done:
		return r.g, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s doesn't answer: %w", who, context.Cause(ctx))
	}
}

func openDomain(name string) (_ Guest, err error) {
	h, err := xenctrl.Open()
	if err != nil {
		return nil, explain(err)
	}
	defer func() {
		if err != nil {
			h.Close()
			err = explain(err)
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
	dom, err := h.Domain(id)
	if err != nil {
		if errors.Is(err, xenctrl.ErrNoDomain) {
			return nil, sentinel.As(ErrNotFound, err)
		}
		return nil, err
	}
	switch {
	case dom.Gone():
		return nil, breakpoint.ErrGone
	case dom.Suspended():
		return nil, fmt.Errorf("%w: it is suspended, to be saved or migrated", ErrPaused)
	}
	if dom.Flags&xenctrl.DomainHVM == 0 {
		if bits, err := h.GuestWidth(id); err != nil {
			return nil, err
		} else if bits != 64 {
			return nil, fmt.Errorf("%w, and the guest is a %d-bit PV one, which can't be looked into either", Err32Bit, bits)
		}
	}
	g := newXen(xen.Live(h, id), dom)
	g.close = h.Close
	g.live = true
	g.pages = func() (uint64, error) {
		n, err := h.MaxGPFN(id)
		return n + 1, err
	}
	if g.info.Name, err = store.DomainName(id); err != nil || g.info.Name == "" {
		g.info.Name = strconv.Itoa(int(id))
	}
	if g.info.Kind == HVM {
		// A PVH guest has no device model.
		if _, err := store.Read(fmt.Sprintf("/local/domain/0/device-model/%d/state", id)); err != nil {
			g.info.Kind = PVH
		}
	}
	g.info.Kernel = bootedKernel(store, dom)
	return g, nil
}

// explain says what a user other than root lacks, whose rights are those that the
// files of Xen's devices give.
func explain(err error) error {
	if euid := os.Geteuid(); euid > 0 && errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w (this is user %d: to allow that without root, give the user the right to read and write "+
			"/dev/xen/privcmd, /dev/xen/evtchn, /dev/xen/xenbus and the folder %s)", err, euid, journalDir)
	}
	return err
}

// Xen returns the guest behind hv. Close leaves hv alone.
func Xen(hv xen.Hypervisor) (Guest, error) {
	dom, err := hv.Info()
	if err != nil {
		return nil, err
	}
	return newXen(hv, dom), nil
}

func newXen(hv xen.Hypervisor, dom xenctrl.DomainInfo) *xenGuest {
	g := &xenGuest{hv: hv, dom: dom, close: func() error { return nil }}
	g.Cache = xen.NewFrames(hv)
	g.info = Info{ID: uint16(dom.ID), Name: strconv.Itoa(int(dom.ID)), Kind: PV, VCPUs: dom.OnlineVCPUs}
	if dom.Flags&xenctrl.DomainHVM != 0 {
		g.info.Kind = HVM
	}
	return g
}

func (g *xenGuest) Info() Info { return g.info }

// Close gives back what the guest's memory is reached through, and lets the guest go.
func (g *xenGuest) Close() error {
	var errs error
	for range g.held.Load() {
		errs = errors.Join(errs, g.LetGo())
	}
	return errors.Join(errs, g.Cache.Close(), g.close())
}

// Attach opens the route that the guest and its hypervisor offer. What a dead tool has
// left in the guest is repaired first.
func (g *xenGuest) Attach(ctx context.Context, s Setup) (_ Driver, err error) {
	defer func() { err = known("", explain(err)) }()
	if err := s.wide(g); err != nil {
		return nil, err
	}
	cfg := xen.Config{Root: s.Root, Roots: s.Roots, Lookup: s.Lookup}
	if !g.live {
		return g.open(cfg)
	}
	l, err := g.own(ctx, s)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Remove())
		}
	}()
	// Nobody else is attached, but for tools that keep no journal, and who has paused the
	// domain is no tool.
	info, err := g.hv.Info()
	if err == nil {
		err = attachable(info, s.Lookup != nil)
	}
	if err != nil {
		return nil, err
	}
	if s.Guardian != nil {
		if err := s.Guardian(journal.Path(journalDir, domainJournal(g.dom.ID))); err != nil {
			return nil, err
		}
	}
	if s.Ring != nil && g.info.Kind != PV {
		if err := s.Ring(journal.Path(journalDir, domainJournal(g.dom.ID))); err != nil {
			s.log().Warn("nobody else has mapped the ring of the guest's monitor: should this process be killed while more of its vCPUs "+
				"wait than the ring takes, the guest can't be released", "domain", g.info.Name, "vcpus", g.info.VCPUs, "err", err)
		}
	}
	cfg.State = l.DriverState()
	drv, err := g.open(cfg)
	if err != nil {
		return nil, err
	}
	return journaled{owner{drv, l}, l}, nil
}

// attachable returns why a domain that has no owner can't be attached to in the state that
// it is in, or nil. known says whether its kernel is.
func attachable(info xenctrl.DomainInfo, known bool) error {
	switch paused := info.Flags&xenctrl.DomainPaused != 0; {
	case info.Gone():
		return breakpoint.ErrGone
	case info.Flags&xenctrl.DomainDebugged != 0:
		return xen.ErrBusy
	case !paused:
		return nil
	case info.CPUTime != 0:
		return ErrPaused
	case info.Flags&xenctrl.DomainHVM != 0:
		return neverRan("a kernel of a PVH or HVM guest makes its page tables itself")
	case !known:
		return neverRan("its kernel isn't known")
	}
	return nil // it was created paused: see linux.Starter
}

// neverRan is the error of a domain that was created paused, and in which no probe may be
// before it runs.
func neverRan(why string) error {
	return sentinel.As(fmt.Errorf("%w: unpause it (xl unpause), and open it when it has booted (%s)", linux.ErrNotInPlace, why), ErrPaused)
}

// Started implements [linux.Starter].
func (g *xenGuest) Started() (bool, error) {
	info, err := g.hv.Info()
	return info.CPUTime != 0, err
}

func (g *xenGuest) open(cfg xen.Config) (Driver, error) {
	if g.info.Kind == PV {
		return xen.OpenDebugger(g.hv, g.Cache, cfg)
	}
	return xen.OpenMonitor(g.hv, g.Cache, cfg)
}

// Hold and LetGo implement [Holder]. Xen counts the pauses of a domain.
func (g *xenGuest) Hold() error {
	if err := g.hv.Pause(); err != nil {
		return fmt.Errorf("pause the domain: %w", err)
	}
	g.held.Add(1)
	return nil
}

func (g *xenGuest) LetGo() error {
	if g.held.Load() == 0 {
		return nil
	}
	if err := g.hv.Unpause(); err != nil {
		return fmt.Errorf("unpause the domain (xl unpause does it by hand): %w", err)
	}
	g.held.Add(-1)
	return nil
}

// PhysicalPages implements [Sized].
func (g *xenGuest) PhysicalPages() (uint64, error) {
	if g.pages == nil {
		return 0, errors.ErrUnsupported
	}
	return g.pages()
}

// CPUs implements [linux.Machine].
func (g *xenGuest) CPUs() ([]linux.CPU, error) {
	var cpus []linux.CPU
	var errs error
	for v := range min(g.dom.MaxVCPUID+1, xenctrl.MaxVCPUs) {
		c, err := g.cpu(v)
		if err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		cpus = append(cpus, c)
	}
	if len(cpus) == 0 {
		return nil, errs
	}
	return cpus, nil
}

func (g *xenGuest) cpu(v int) (linux.CPU, error) {
	if g.info.Kind != PV {
		c, err := g.hv.HVMCPU(v)
		if err != nil {
			return linux.CPU{}, err
		}
		cpu := linux.CPU{CR0: c.CR0, CR3: c.CR3, CR4: c.CR4, EFER: c.EFER}
		if c.LSTAR != 0 {
			cpu.Entries = append(cpu.Entries, c.LSTAR)
		}
		return cpu, nil
	}
	var c xenctrl.VCPUContext
	if err := g.hv.VCPUContext(v, &c); err != nil {
		return linux.CPU{}, err
	}
	cpu := linux.CPU{CR3: c.CtrlReg[3], PV: true}
	for _, e := range []uint64{c.Traps[3].Address, c.Traps[14].Address, c.SyscallCallbackEIP} {
		if e != 0 {
			cpu.Entries = append(cpu.Entries, e)
		}
	}
	return cpu, nil
}

// findDomain resolves a domain's name, or the id that it spells.
func findDomain(store *xenctrl.Store, name string) (xenctrl.DomID, error) {
	id, err := store.DomainByName(name)
	if errors.Is(err, xenctrl.ErrNoDomain) {
		n, perr := strconv.ParseUint(name, 10, 16)
		if perr != nil || xenctrl.DomID(n) >= xenctrl.DomIDFirstReserved {
			return 0, fmt.Errorf("%w: `xl list` shows those there are", ErrNotFound)
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
