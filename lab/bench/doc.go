// Command bench measures hits a second in the lab's dom0: this project beside
// the least that a C program needs (cloop/loop.c), in one boot, in turn. The
// guest has one vCPU and calls openat without rest. "make bench-lab" runs it.
package main
