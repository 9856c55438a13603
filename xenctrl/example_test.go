package xenctrl_test

import (
	"errors"
	"fmt"
	"log"

	"github.com/vmprobes/vmprobes/xenctrl"
)

// List the domains, with their names.
func Example() {
	h, err := xenctrl.Open()
	if errors.Is(err, xenctrl.ErrNotControlDomain) {
		fmt.Println("not in dom0")
		return
	}
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	store, err := xenctrl.OpenStore()
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()

	domains, err := h.Domains()
	if err != nil {
		log.Fatal(err)
	}
	for _, d := range domains {
		name, _ := store.DomainName(d.ID)
		fmt.Println(d.ID, name, d.OnlineVCPUs)
	}
}

// Answer the software breakpoints of a domain by letting it go on.
func ExampleMonitor() {
	h, err := xenctrl.Open()
	if err != nil {
		log.Print(err)
		return
	}
	defer h.Close()
	m, err := h.OpenMonitor(5)
	if err != nil {
		log.Print(err)
		return
	}
	defer m.Close()
	if err := m.SetSoftwareBreakpoint(true); err != nil {
		log.Print(err)
		return
	}
	var e xenctrl.Event
	for {
		ok, err := m.Next(&e)
		if !ok || err != nil {
			break
		}
		// Not ours: the guest has to see it.
		if err := h.InjectEvent(5, e.VCPU, xenctrl.VectorBreakpoint, e.Type, ^uint32(0), e.InsnLen, 0); err != nil {
			log.Print(err)
		}
		e.Flags = xenctrl.EventVCPUPaused
		if err := m.Respond(&e); err != nil {
			log.Print(err)
		}
	}
	if err := m.Notify(); err != nil {
		log.Print(err)
	}
}
