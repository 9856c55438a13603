package main

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/vmprobes/vmprobes"
)

// TestLookupFunction: kernels from 7.0 on have do_file_open.
func TestLookupFunction(t *testing.T) {
	in := func(symbols ...string) func(string) (vmprobes.Addr, error) {
		return func(name string) (vmprobes.Addr, error) {
			for i, s := range symbols {
				if s == name {
					return vmprobes.Addr(i + 1), nil
				}
			}
			return 0, &vmprobes.Error{Op: "lookup", Err: vmprobes.ErrSymbolNotFound}
		}
	}
	assert.Equal(t, "do_filp_open", lookupFunction(in("do_sys_openat2", "do_filp_open")))
	assert.Equal(t, "do_file_open", lookupFunction(in("do_sys_openat2", "do_file_open")))
	assert.Equal(t, "do_filp_open", lookupFunction(func(string) (vmprobes.Addr, error) { return 0, errors.New("another reason") }))
}
