package main

// openLoop makes n openat(2) calls of path and closes what they open. If
// pattern is not nil it is live in ymm registers all the while, and bad counts
// the calls behind which it was no longer there. made counts the calls as they
// are made.
//
//go:noescape
func openLoop(path *byte, n uint64, pattern *[32]byte) (made, failed, bad uint64)

// ymmLoop keeps pattern live in ymm registers while it spins and then sleeps
// for pause, and returns 1 if it was damaged.
//
//go:noescape
func ymmLoop(pattern *[32]byte, spins uint64, pause *[2]int64) (bad uint64)

// int3Loop executes n int3 instructions.
func int3Loop(n uint64)

// trapAddresses returns the addresses of the SIGTRAP handler, which counts in
// traps, and of the code that returns from it.
func trapAddresses() (handler, restorer uintptr)

// traps counts the SIGTRAPs that came. It is written by the handler.
var traps uint64

// setDS and getDS load and read the DS register.
func setDS(selector uint64)
func getDS() (selector uint64)

// readLoop reads 8 bytes of fd n times into *byKernel, each followed by a store to
// *byUser.
//
//go:noescape
func readLoop(n, fd uint64, byKernel, byUser *uint64)

// callLoop calls a function so many times, which makes that many system calls each
// time.
func callLoop(times, calls uint64)

// callAddress is where that function begins.
func callAddress() uintptr

// forkExit starts a process that ends at once, and returns its pid, or an error number
// below zero. What is Go's never runs in the new process.
func forkExit() (pid int)

// forkRead starts a process that reads a byte of fd, and ends when there is one. It returns
// as forkExit does.
func forkRead(fd uint64) (pid int)
