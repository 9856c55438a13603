package vmprobes_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/vmprobes/vmprobes"
)

// Reads of more than a megabyte by one process: how long they took, and what they returned.
func ExampleReturnProbe() {
	rp := &vmprobes.ReturnProbe{
		Symbol: "vfs_read",
		Filter: &vmprobes.Filter{
			TGIDs: []int{1234},
			Args:  []vmprobes.ArgFilter{{N: 2, Op: vmprobes.Greater, Value: 1 << 20}},
		},
		Entry: func(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
			if a.Depth() > 0 {
				a.Ignore() // one inside another
			}
			a.Data = r.Arg(2)
			return vmprobes.Continue
		},
		Return: func(a *vmprobes.Activation, r *vmprobes.Regs) vmprobes.Action {
			began, ended := a.VCPU()
			_, err := fmt.Printf("%d of %d bytes in %v, vCPU %d to %d, for %#x\n", int64(r.Result()), a.Data, a.Duration(), began, ended, a.ReturnAddress())
			return a.Probe().Fail(err)
		},
		Abandoned: func(a *vmprobes.Activation, why error) vmprobes.Action {
			if errors.Is(why, vmprobes.ErrTaskGone) {
				_, pid, _ := a.Task()
				log.Print(pid, " has died in it")
			}
			return vmprobes.Continue
		},
		Follow:    vmprobes.AtReturn,
		MaxActive: 100,
	}
	if err := vmprobes.Run(context.Background(), "a3guest", nil, rp.Probe()); err != nil {
		log.Fatal(err)
	}
	st := rp.Probe().Stats()
	fmt.Println(st.Hits == st.Ignored+st.Returned+st.Abandoned+st.Dropped, st.Missed, st.Filtered, st.Foreign, st.Follow == vmprobes.AtReturn)
}

// A disk that fails now and then: every tenth submission of a bio to the block device returns
// at once. It is for a guest that can be thrown away.
func ExampleRegs_Return() {
	const eio = -5
	n := 0
	p := &vmprobes.Probe{
		Symbol: "should_fail_bio", // in the kernel's list: returning an error is all that it is for
		Pre: func(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
			if n++; n%10 != 0 {
				return vmprobes.Continue
			}
			fail := int64(eio)
			return p.Fail(r.Return(uint64(fail)))
		},
	}
	// Debian's kernels have no such list.
	opts := &vmprobes.Options{AllowReturn: true}
	err := vmprobes.Run(context.Background(), "a3guest", opts, p)
	if errors.Is(err, vmprobes.ErrNotInjectable) {
		log.Fatal("not without the risk: ", err)
	}
	fmt.Println(err, p.Stats().Skipped)
}

// The first hundred calls of each of a module's functions, and whatever of the kernel's can't be
// probed is left out.
func ExampleSession_RegisterMatching() {
	err := vmprobes.RunFunc(context.Background(), "a3guest", nil, func(ctx context.Context, s *vmprobes.Session) error {
		probes, refused, err := s.RegisterMatching("xfs:xfs_*", func(symbol string) *vmprobes.Probe {
			return &vmprobes.Probe{Limit: vmprobes.Limit{Hits: 100}}
		})
		if err != nil {
			return err
		}
		for i, err := range s.RegisterEach(
			&vmprobes.Probe{Symbol: "do_exit", Once: true, Filter: &vmprobes.Filter{PIDs: []int{1234}}},
			&vmprobes.Probe{Symbol: "vfs_read", Limit: vmprobes.Limit{PerSecond: 1000}},
		) {
			if err != nil {
				fmt.Println(i, err)
			}
		}
		fmt.Println(len(probes), len(refused))
		for hit, err := range s.Hits(ctx) {
			if err != nil {
				return err // ErrTooOften, if vfs_read was the last one
			}
			if hit.Activation == nil {
				fmt.Println(hit.Probe, hit.Probe.Flags()&vmprobes.FlagLimited != 0)
			}
		}
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
}
