// Vmprobebio is the C library's demonstration: it shows the files that a guest opens.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/vmprobes/vmprobes"
)

const function = "do_sys_openat2"

var calls int

// openHandler is at do_sys_openat2(int dfd, const char *filename, struct open_how *how).
func openHandler(p *vmprobes.Probe, r *vmprobes.Regs) vmprobes.Action {
	calls++
	filename, _ := p.ReadString(r.Arg(1), 4096)
	flags, _ := p.ReadUint64(r.Arg(2))
	mode, _ := p.ReadUint64(r.Arg(2) + 8)
	_, err := fmt.Printf("[%d] %s() called\n -- filename: %08x (%q)\n -- flags: %08x\n -- mode: %08x\n",
		calls, function, r.Arg(1), filename, flags, mode)
	return p.Fail(err)
}

func watch(ctx context.Context, s *vmprobes.Session) error {
	if err := s.Register(&vmprobes.Probe{Symbol: function, Pre: openHandler}); err != nil {
		return err
	}
	fmt.Println("vmprobe registered")
	return s.Loop(ctx)
}

func main() {
	domain := "a3guest"
	if len(os.Args) > 1 {
		domain = os.Args[1]
	}
	if err := vmprobes.RunFunc(context.Background(), domain, nil, watch); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("vmprobe unregistered\n%s() called %d times.\n", function, calls)
}
