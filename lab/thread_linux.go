package main

import "runtime"

// lockThread keeps the calling goroutine on its thread, and the thread alive,
// until the goroutine ends.
func lockThread() { runtime.LockOSThread() }
