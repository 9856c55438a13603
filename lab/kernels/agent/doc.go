// Command agent is the /init of the kernels that "make test-kernels" compares with what
// is read of them. It runs on amd64 and 386.
//
// It loads the modules of the archive, starts processes with what is hard to read (names,
// command lines, threads, another user, a PID namespace, a zombie) and prints
//
//	GUEST READY <kernel release>
//
// Then it answers commands on its console as lab/guestinit does (package
// internal/console):
//
//	say FILES       keep a tar archive in memory, with all of /proc/PID and
//	                /proc/PID/task/TID that tells of processes and, if FILES is "all",
//	                /proc/kallsyms and /proc/modules. "| FRAME N" lines tell in which
//	                page frames it is, in hexadecimal: a serial port would need a minute.
//	                DONE say bytes=N sha256=H
//	open PATH N     make exactly N openat(2) calls: DONE open calls=N opened=M
//	dmesg           "| " lines with signs of trouble: DONE dmesg bad=N
//	ping            nothing
package main
