//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "dom0init: this is the /init of the lab's emulated dom0; build it with GOOS=linux")
	os.Exit(1)
}
