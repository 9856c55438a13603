// Command guestinit is the /init of the lab's guests: the only process in
// there. It is driven by a test in dom0 over the guest's console, one command
// and one reply a line, and makes a known number of system calls so that the
// test can compare what the guest did with what a probe saw.
//
// When it is up it prints
//
//	GUEST READY <kernel release> <number of vCPUs>
//
// A command may be preceded by "@<tag> "; its reply then is too. Each command
// is answered with one line that starts with DONE or ERR; lines that start
// with "| " may come before it. The commands:
//
//	ping                    nothing
//	open N [CPU|all]        make exactly N openat(2) calls of /lab-probe-target
//	                        on CPU 0, on one CPU or on each CPU, with a
//	                        pattern live in the ymm registers:
//	                        DONE open total=T cpu0=A cpu1=B ymm=ok mem=ok
//	                        (ymm=none without AVX, BAD:<count> if damaged)
//	openpath PATH           one openat(2) of PATH: DONE openpath calls=1 opened|failed
//	busy SECONDS [CPU|all]  the same calls in the background, for SECONDS or
//	                        (0) until stop; answered when they have started
//	count                   DONE count running=R total=T cpu0=A … ymm=… mem=…
//	                        since start, by "open" and "busy" together
//	stop                    end "busy"; answered like count
//	check                   what the background checkers found:
//	                        DONE check rounds=R ymm=… mem=…
//	int3user N              execute N int3 in user mode:
//	                        DONE int3user sent=N sigtraps=M
//	kallsyms NAME           DONE kallsyms NAME 0x… (all matches), of the table as
//	                        it was when first asked for
//	kallsymshash            SHA-256 of /proc/kallsyms: of the kernel's lines, and
//	                        of those of loaded modules:
//	                        DONE kallsymshash kernel=H:LINES modules=H:LINES
//	text SYMBOL|0xADDR LEN  the guest's own view of kernel memory, in hex
//	texthash                checksum of the kernel's _stext.._etext
//	dmesg                   "| " lines with signs of trouble, and
//	                        DONE dmesg bad=N boot=M (M: before GUEST READY)
//	modules                 "| " lines of /proc/modules
//	ps                      "| " lines of the processes
//	stat                    "| " line of /proc/1/stat
//	sleep MILLISECONDS      nothing, later
//	poweroff                shut the guest down
package main
