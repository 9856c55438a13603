// Package linux understands a running Linux kernel from its memory and the
// registers of one vCPU, and nothing else: no System.map, no debug package, no
// profile, no configuration.
//
// [Discover] climbs a ladder. Each rung needs those below it, and says what it
// looked at, what it found and why it believes that ([Kernel.Explain]):
//
//  1. the control registers give the page tables;
//  2. the page tables give the kernel's image, wherever KASLR put it;
//  3. the image holds the kernel's own symbol table (kallsyms);
//  4. the symbols lead to the version string and the build id;
//  5. … and to the kernel's own type information (BTF), where it has any;
//  6. symbols and types lead to tasks, modules and system calls, and symbols to the
//     kernel's lists of places where no breakpoint may be.
//
// A rung that is missing can be replaced by a file ([Options]).
//
// # Trust
//
// The guest is taken to be hostile. Every list walk, string, table and allocation
// has a stated bound, and each operation a budget: it reads guest memory four
// million times at most, and 128 MiB, and begins no read after a minute. Beyond
// that it fails with [ErrBudget]. What it keeps is in proportion to what it read:
// 256 MiB at the most.
//
// An answer is an error or what the guest's memory says, never a panic, and no
// answer is worth more than the guest itself: a kernel that lies about its
// processes is believed. What it doesn't tell of its own text is another thing: there
// a breakpoint could kill it, so that no place is one for a probe as long as a table
// of what the kernel rewrites can't be read ([ErrUnknownPlaces]). Strings are
// returned as they are in memory; errors, [Rung.String], [Task.String] and
// [Syscall.String] are printable.
//
// The guest runs on while its memory is read. Lists are validated on the way and
// read again when they changed under the reader.
//
// # Layering
//
// The package knows nothing of hypervisors or breakpoints. A [Machine] is all it
// needs: page frames and registers.
package linux
