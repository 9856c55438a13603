//go:build !linux || (!amd64 && !386)

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "agent: this is the /init of a guest, for Linux on amd64 and 386")
	os.Exit(1)
}
