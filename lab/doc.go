// Command lab builds and runs the emulated Xen hosts in which vmprobes tests
// itself: a whole dom0 with guests, inside an emulator, on any Linux machine.
// See README.md.
package main
