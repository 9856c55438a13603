//go:build !linux || !amd64

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "guestinit: this is the /init of the lab's x86-64 Linux guest; build it with GOOS=linux GOARCH=amd64")
	os.Exit(1)
}
