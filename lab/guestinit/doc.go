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
//	openpath PATH           one openat(2) of PATH: DONE openpath calls=1 opened, or
//	                        DONE openpath calls=1 failed errno=E
//	reads N [CPU|all]       N rounds of calls of openat(2), read(2) and close(2), each
//	                        with a result that is the same in all rounds, on one CPU or
//	                        on each: DONE reads rounds=R wrong=W. A round has 2 calls of
//	                        openat, of which one fails, and 5 of read, of which one fails
//	                        before it comes to a file
//	recurse N [CPU|all]     wake a waiter through a chain of epoll instances N times:
//	                        DONE recurse times=T depth=D
//	block N SECONDS         N threads, each in a read(2) that blocks for SECONDS:
//	                        DONE block threads=N returned=N
//	blockkill N             start N processes and kill them when each is blocked in a
//	                        read(2): "| PID" lines, and DONE blockkill processes=N killed=N
//	busy SECONDS [CPU|all [REST]]
//	                        the same calls in the background, for SECONDS or
//	                        (0) until stop; answered when they have started.
//	                        After each call its thread rests REST times as long
//	                        as that took (0: it doesn't)
//	count                   DONE count running=R total=T cpu0=A … ymm=… mem=…
//	                        since start, by "open" and "busy" together
//	stop                    end "busy"; answered like count
//	check                   what the background checkers found:
//	                        DONE check rounds=R ymm=… mem=…
//	int3user N              execute N int3 in user mode:
//	                        DONE int3user sent=N sigtraps=M
//	threads                 the threads that make the calls of "open" and "busy":
//	                        DONE threads cpu0=TID cpu1=TID
//	online N                bring CPU N up, which must be the next one; "open" and
//	                        "busy" use it from then on: DONE online cpus=N+1
//	breaks N                debug a process that calls a function N times, with a
//	                        breakpoint at it: DONE breaks calls=N hits=H others=0 status=0
//	                        (others: signals that are none of the debugger's)
//	steps N                 … that makes N system calls in a function, stepping
//	                        from its first instruction to its return:
//	                        DONE steps calls=N made=S want=S others=0
//	watch N                 … whose memory is written N times by the kernel, in its
//	                        read(2), and N times by itself, under a watchpoint of
//	                        perf's and one of the debugger's:
//	                        DONE watch reads=N kernel=N user=N odd=0 others=0 status=0
//	ldt                     load DS with a local segment and take that away:
//	                        DONE ldt before=7 after=0
//	ftrace FUNCTION         trace calls of a function
//	ftrace FIRST BEHIND     trace all functions from FIRST up to but without BEHIND
//	ftrace off              end it. Each is answered with
//	                        DONE ftrace alive=yes|no enabled=FUNCTIONS calls=N
//	                        (enabled: those that the kernel has changed, for kprobes
//	                        too; calls: recorded since it was turned on)
//	kprobes on FUNCTION…    have a kprobe event at each function
//	kprobes counts          "| FUNCTION TID:HITS …" lines, and
//	                        DONE kprobes on=N missed=M
//	kprobes off             have none
//	kretprobes on FUNCTION…|counts|off
//	                        the same at returns, if there are no kprobe events. The lines
//	                        are "| FUNCTION TID:RESULT:HITS …", with results that have no
//	                        sign
//	kretprobes order        "| TID FUNCTION RESULT" lines, in the order of returns since
//	                        they were turned on, and DONE kretprobes order=LINES: some thousands at most, as
//	                        the memory that it takes is never free again
//	event NAME on|off       a trace event as xdp/xdp_exception, or a subsystem's all
//	reload N                unload the modules and load them again, N times:
//	                        DONE reload modules=M times=N
//	storm forks|modules|off start processes that end at once, on as many threads as
//	                        there are CPUs, or unload and load all modules but one, in
//	                        the background; end both. DONE storm forks=N loads=M, of
//	                        those since the last such answer
//	kallsyms NAME           DONE kallsyms NAME 0x… (all matches), of the table as
//	                        it was when first asked for
//	kallsymshash            SHA-256 of /proc/kallsyms: of the kernel's lines, and
//	                        of those of loaded modules:
//	                        DONE kallsymshash kernel=H:LINES modules=H:LINES
//	text SYMBOL|0xADDR LEN  the guest's own view of kernel memory, in hex
//	texthash                checksum of the kernel's _stext.._etext
//	textkeep                the same, and keep a copy of it
//	textchanges             compare it with the copy: "| ADDR OLD NEW" lines, and
//	                        DONE textchanges other=M own=N (own: the kernel's own
//	                        doing, at its jump labels and static calls)
//	dmesg                   "| " lines with signs of trouble, and
//	                        DONE dmesg bad=N boot=M (M: before GUEST READY)
//	modules                 "| " lines of /proc/modules
//	ps                      "| " lines of the processes
//	stat                    "| " line of /proc/1/stat
//	sleep MILLISECONDS      nothing, later
//	poweroff                shut the guest down
//
// There is no gdb in the guest, which has no file system to keep one in: "breaks",
// "steps" and "watch" do by ptrace(2) what it does for breakpoints, single steps
// and watchpoints, to a process whose every instruction is known.
package main
