package qemu

import (
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
