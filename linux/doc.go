// Package linux understands a running Linux kernel from its memory and the
// registers of one vCPU, and nothing else: no System.map, no debug package, no
// profile, no configuration.
//
// [Discover] climbs a ladder. Each rung needs those below it, and says what it
// looked at, what it found and why it believes it ([Kernel.Explain]):
//
//  1. the control registers give the page tables;
//  2. the page tables give the kernel's image, wherever KASLR put it;
//  3. the image holds the kernel's own symbol table (kallsyms);
//  4. the symbols lead to the version string and the build id;
//  5. … and to the kernel's own type information (BTF), where it has any;
//  6. symbols and types lead to tasks, modules and system calls, and symbols alone to
//     the kernel's lists of places where no breakpoint may stand.
//
// A rung that is missing can be replaced by a file ([Options]).
//
// # Trust
//
// The guest is assumed to be hostile. Every list walk, string, table and allocation
// has a stated bound, and each operation a budget: four million reads, 128 MiB in
// all, and no read begun after a minute. An operation that would exceed it fails with
// [ErrBudget]. What it keeps in memory is proportional to what it read: 256 MiB at
// the most.
//
// A method returns what the guest's memory says, or an error; it never panics. An
// answer is as good as the guest: a kernel that lies about its processes is believed.
// Its text is different, as a misplaced breakpoint would kill it: while a table of what
// the kernel rewrites can't be read, every place is refused ([ErrUnknownPlaces]).
// Strings are returned as they are in memory; errors and what String methods return
// are printable ASCII.
//
// The guest runs on while its memory is read. Lists are validated as they are walked,
// and read again if they changed meanwhile.
//
// # Layering
//
// The package knows nothing of hypervisors or breakpoints. A [Machine] is all it
// needs: page frames and registers.
package linux
