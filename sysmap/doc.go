// Package sysmap reads the symbol tables of Linux kernels.
//
// A kernel's symbols come in several shapes, and ParseFile accepts all of them:
//
//   - a System.map, or a saved /proc/kallsyms (plain or gzip'ed text);
//   - an ELF vmlinux with a .symtab;
//   - a stripped ELF vmlinux: the kernel carries its own symbol table
//     ("kallsyms") in .rodata, and FromELF finds it there by its structure;
//   - a vmlinuz (bzImage) as installed in /boot: it is unpacked first.
//
// The last one matters most in practice. Distributions no longer ship a usable
// System.map (Debian's is a one-line stub, see ErrStub) and their debug packages
// are close to a gigabyte, but every installed kernel has its own table inside.
//
//	m, err := sysmap.ParseFile("/boot/vmlinuz-6.1.0-56-amd64")
//	if err != nil { … }
//	sym, err := m.Lookup("do_sys_openat2")
//
// The addresses are those the kernel was linked at. A running kernel is usually
// moved by KASLR; Map.Slide gives a view of the same table with the slide added.
//
// A running kernel has the same table in its memory: FromMemory reads it there, at
// its true addresses, through whatever reads the guest's memory. Map.With adds the
// symbols of the modules that are loaded; Map.MarshalBinary and UnmarshalMap are for
// a cache on disk.
//
// The package knows nothing of hypervisors or breakpoints, is pure Go and builds
// everywhere. All input may come from a hostile guest: lengths, loops and
// allocations are bounded whatever the input says. A Map is immutable and safe
// for concurrent use.
package sysmap
