//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "lab: the emulated Xen hosts need Debian 12 on an x86-64 machine (a virtual machine or a container will do)")
	os.Exit(1)
}
