package qemu

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The unexported methods here want the VM stopped and v.mu held.

// readThreads lists the vCPUs.
func (v *VM) readThreads() error {
	var all []string
	for query := "qfThreadInfo"; ; query = "qsThreadInfo" {
		text, err := v.callText(query)
		if err != nil {
			return err
		}
		if text == "l" {
			break
		}
		ids, ok := strings.CutPrefix(text, "m")
		if !ok {
			return fmt.Errorf("%w: list of threads %.80q", errProtocol, text)
		}
		for id := range strings.SplitSeq(ids, ",") {
			if !validThread(id) || slices.Contains(all, id) || len(all) == maxVCPUs {
				return fmt.Errorf("%w: list of threads %.80q", errProtocol, text)
			}
			all = append(all, id)
		}
	}
	if len(all) == 0 {
		return fmt.Errorf("%w: no threads", errProtocol)
	}
	v.threads = all
	return nil
}

// vcpu returns the number of a thread's vCPU.
func (v *VM) vcpu(thread string) (int, error) {
	for range 2 {
		if n := slices.Index(v.threads, thread); n >= 0 {
			return n, nil
		}
		// One was plugged in.
		if err := v.readThreads(); err != nil {
			return 0, err
		}
	}
	return 0, v.broken(fmt.Errorf("%w: unknown thread %q", errProtocol, thread))
}

// choose makes g, p, P and m be about a thread.
func (v *VM) choose(thread string) error {
	if v.current == thread {
		return nil
	}
	v.current = ""
	if err := v.callOK("Hg" + thread); err != nil {
		return fmt.Errorf("choose vCPU %s: %w", thread, err)
	}
	v.current = thread
	return nil
}

// readRegs reads the registers of the current thread into v.regs.
func (v *VM) readRegs() error {
	data, err := v.call("g")
	if err != nil {
		return err
	}
	v.regsOf = ""
	if err := v.layout.parse(&v.regs, data); err != nil {
		return v.broken(err)
	}
	v.regsOf = v.current
	return nil
}

// writeRegs gives a thread, whose registers are v.regs, those of want: as many
// packets in one write as registers differ.
func (v *VM) writeRegs(thread string, want *regFile) error {
	if *want == v.regs {
		return nil
	}
	if err := v.choose(thread); err != nil {
		return err
	}
	var packets []string
	for i := range want {
		if want[i] != v.regs[i] {
			packets = append(packets, v.layout.set(i, want[i]))
		}
	}
	if err := v.post(packets...); err != nil {
		return err
	}
	var errs error
	for i := range packets {
		data, err := v.receive()
		if err != nil {
			return err
		}
		if string(data) != "OK" {
			errs = errors.Join(errs, &refused{packets[i], printable(string(data))})
		}
	}
	if errs == nil {
		v.regs = *want
	}
	return errs
}

// readIP returns the packet that asks for the current thread's RIP. Under KVM "p"
// doesn't fetch the registers from the kernel (QEMU's handle_get_reg), "g" does.
func (v *VM) readIP() string {
	if v.info.KVM {
		return "g"
	}
	return fmt.Sprintf("p%x", v.layout.reg[rIP].number)
}

// receiveIP takes the answer.
func (v *VM) receiveIP() (uint64, error) {
	data, err := v.receive()
	if err != nil {
		return 0, err
	}
	var ip uint64
	if v.info.KVM {
		var f regFile
		err = v.layout.parse(&f, data)
		ip = f[rIP]
	} else {
		ip, err = v.layout.value(rIP, data)
	}
	if err != nil {
		return 0, v.broken(err)
	}
	return ip, nil
}

// A CPU is the state of a vCPU that tells where its kernel is.
type CPU struct {
	CR0, CR2, CR3, CR4, EFER uint64
	// IP and CPL are where the vCPU is: CPL 3 is user mode.
	IP  uint64
	CPL int
	// GSBase is the base in use, KernelGSBase the one that SWAPGS exchanges it for.
	GSBase, KernelGSBase uint64
	// IDT is the address of the interrupt descriptor table, 0 if QEMU didn't tell.
	IDT uint64
}

// CPUs returns the state of all vCPUs, in order, taken while the VM was stopped.
func (v *VM) CPUs() (cpus []CPU, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	err = v.held(func() error {
		cpus, err = v.cpus()
		return err
	})
	return cpus, err
}

func (v *VM) cpus() ([]CPU, error) {
	current := v.current
	cpus := make([]CPU, 0, len(v.threads))
	for _, t := range v.threads {
		if err := v.choose(t); err != nil {
			return nil, err
		}
		data, err := v.call("g")
		if err != nil {
			return nil, err
		}
		var f regFile
		if err := v.layout.parse(&f, data); err != nil {
			return nil, v.broken(err)
		}
		cpus = append(cpus, CPU{
			CR0: f[rCR0], CR2: f[rCR2], CR3: f[rCR3], CR4: f[rCR4], EFER: f[rEFER],
			IP: f[rIP], CPL: int(f[rCS] & 3), GSBase: f[rGSBase], KernelGSBase: f[rKernelGSBase],
		})
	}
	text, err := v.hmp("info registers -a")
	if err != nil {
		return nil, err
	}
	parseIDT(text, cpus)
	if current != "" {
		return cpus, v.choose(current)
	}
	return cpus, nil
}

// parseIDT takes the bases of the interrupt descriptor tables from the output of
// "info registers -a": lines "CPU#n" and "IDT=     base limit".
func parseIDT(text string, cpus []CPU) {
	n := -1
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if s, ok := strings.CutPrefix(line, "CPU#"); ok {
			if n, ok = decimal(s); !ok {
				n = -1
			}
			continue
		}
		s, ok := strings.CutPrefix(line, "IDT=")
		if !ok || n < 0 || n >= len(cpus) {
			continue
		}
		if f := strings.Fields(s); len(f) == 2 {
			if base, err := strconv.ParseUint(f[0], 16, 64); err == nil {
				cpus[n].IDT = base
			}
		}
	}
}
