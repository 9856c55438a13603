//go:build !linux

package qemu

import (
	"errors"
	"fmt"
)

func mapRAM(string, ramMap) (directRAM, ramMap, error) {
	return nil, nil, fmt.Errorf("the guest's memory in a file: only on Linux: %w", errors.ErrUnsupported)
}

func openProcMem(*VM, int) (directRAM, ramMap, error) {
	return nil, nil, fmt.Errorf("the guest's memory in a process: only on Linux: %w", errors.ErrUnsupported)
}

func connections(string) int { return 0 }

func listening(string) bool { return true }
