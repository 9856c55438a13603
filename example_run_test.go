package vmprobes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/vmprobes/vmprobes"
)

// Most programs need one call. It returns at Ctrl+C, or when a handler ends it.
func ExampleRun() {
	p := &vmprobes.Probe{
		Symbol: "do_sys_openat2",
		Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
			name, _ := p.ReadString(r.Arg(1), 4096)
			_, err := fmt.Printf("open %q\n", name)
			return p.Fail(err)
		},
	}
	if err := vmprobes.Run(context.Background(), "a3guest", nil, p); err != nil {
		log.Fatal(err)
	}
}

// Hits as JSON, for a minute.
func ExampleRunFunc() {
	err := vmprobes.RunFunc(context.Background(), "qemu:/run/vm.gdb", nil, func(ctx context.Context, s *vmprobes.Session) error {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if err := s.Register(&vmprobes.Probe{Symbol: "do_sys_openat2", Name: "open"}, &vmprobes.Probe{Symbol: "do_unlinkat", Name: "unlink"}); err != nil {
			return err
		}
		out := json.NewEncoder(os.Stdout)
		for hit, err := range s.Hits(ctx) {
			if errors.Is(err, context.DeadlineExceeded) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := out.Encode(hit); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
}

// The functions of the C library. Handlers may be switched off meanwhile.
func ExampleRegister() {
	var calls, failed int
	var pre vmprobes.PreHandler = func(_ *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
		if calls++; calls == 100 {
			return vmprobes.Stop
		}
		return vmprobes.Continue
	}
	// The address is that of the instruction after a call: what it returned is in RAX.
	var post vmprobes.PostHandler = func(_ *vmprobes.Probe, r *vmprobes.Regs, _ vmprobes.Flags) vmprobes.Action {
		if int64(r.Result()) < 0 {
			failed++
		}
		return vmprobes.Continue
	}
	p := &vmprobes.Probe{DomainID: 3, Symbol: "do_sys_openat2", Offset: 0x4b, Pre: pre, Post: post}
	p.Disable()
	err := vmprobes.Register(p)
	switch {
	case errors.Is(err, vmprobes.ErrBusy):
		log.Fatal("is another tool at work? ", err)
	case errors.Is(err, vmprobes.ErrDomainPaused), errors.Is(err, vmprobes.ErrDomainNotFound), errors.Is(err, vmprobes.ErrControlDomain), errors.Is(err, vmprobes.ErrBadName):
		log.Fatal("which guest? ", err)
	case err != nil:
		log.Fatal(err)
	}
	defer func() {
		if err := vmprobes.Unregister(p); err != nil {
			log.Print(err)
		}
	}()
	p.Enable()
	if p.Flags()&vmprobes.FlagPrepared == 0 {
		log.Print("it isn't registered")
	}
	if err := vmprobes.Loop(context.Background(), p); errors.Is(err, vmprobes.ErrDomainGone) {
		log.Print("the guest has shut down")
	}
	fmt.Println(calls, failed, p.Flags()&vmprobes.FlagRestored)
}

// One function for all hits, and one for all errors.
func ExampleSession_Hits() {
	name := func(d vmprobes.Domain) string {
		kinds := map[vmprobes.Kind]string{vmprobes.PV: "paravirtual", vmprobes.PVH: "Xen, no device model", vmprobes.HVM: "full"}
		if none := vmprobes.DomainID(0); d.ID == none {
			return d.Name // not a domain of Xen's
		}
		return fmt.Sprintf("%s (%d, %s)", d.Name, d.ID, kinds[d.Kind])
	}
	show := func(h *vmprobes.Hit) error {
		_, err := fmt.Printf("%d %v cpu%d %s", h.Seq, h.Time, h.VCPU, h.Regs)
		return err
	}
	err := vmprobes.RunFunc(context.Background(), "a3guest", nil, func(ctx context.Context, s *vmprobes.Session) error {
		fmt.Println(name(s.Domain()))
		if err := s.Register(&vmprobes.Probe{Symbol: "vfs_open"}); err != nil {
			return err
		}
		for hit, err := range s.Hits(ctx) {
			if err == nil {
				err = show(hit)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	var e *vmprobes.Error
	if errors.As(err, &e) && e.Op == "register" {
		log.Fatalf("%s can't be probed: %v", e.Probe, e.Err)
	}
}

// A Session of a program with signal handling of its own.
func ExampleOpen() {
	s, err := vmprobes.Open(context.Background(), "a3guest", &vmprobes.Options{Symbols: "/boot/System.map-6.1.0", IgnoreBlacklist: false})
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	jiffies, err := s.Lookup("jiffies")
	if err != nil {
		log.Fatal(err)
	}
	p := &vmprobes.Probe{Symbol: "do_idle"}
	if err := s.Register(p); err != nil {
		log.Print(err)
		return
	}
	low, err := p.ReadUint32(jiffies)
	if err != nil {
		log.Print(err)
		return
	}
	var stats vmprobes.SessionStats = s.Stats()
	fmt.Println(low, len(s.Probes()), stats.Hits)
}
