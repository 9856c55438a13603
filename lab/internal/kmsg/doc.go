// Package kmsg reads the kernel's log, in a guest.
package kmsg
