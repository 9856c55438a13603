//go:build !linux || !amd64

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "bench runs in the lab's dom0, which is Linux on amd64: make bench-lab")
	os.Exit(1)
}
