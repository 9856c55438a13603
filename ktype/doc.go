// Package ktype knows the C types of a Linux kernel, and reads memory through
// them.
//
// The types come from whatever describes the kernel at hand: the BTF that it
// carries in its own memory (FromBTF), a vmlinux with BTF or DWARF (FromELF), a
// Volatility 3 symbol file (FromISF), or a few offsets found out by other means
// (New). ParseFile looks at a file and takes the right one. They are all used in
// the same way:
//
//	f, err := types.Offset("task_struct.comm") // f.Offset, f.Size, f.Type
//
//	task := types.At(mem, "task_struct", addr)
//	comm, err := task.Field("real_parent.comm").CString()
//
//	var p struct {
//		Pid    int    `ktype:"pid"`
//		Parent int    `ktype:"real_parent.tgid"`
//		Comm   string `ktype:"comm"`
//	}
//	err = types.Decode(mem, "task_struct", addr, &p)
//
// # Paths
//
// A path is the name of a type and the way from there to a member:
//
//	task_struct.se.vruntime         members of members
//	task_struct.__state             members of anonymous structs and unions as in C
//	files_struct.fd_array[3]        elements; BTF has a[3][4] as a[12]
//	task_struct.real_parent->comm   through a pointer; "." works, too
//
// The name may have its C keyword ("struct page", "enum pid_type"). Without it a
// struct or union is preferred to a typedef, and that to an enum or a base type.
// With WithModule "nf_tables:nft_chain" is the module's own type.
//
// # Trust
//
// Both the descriptions and the memory may be a hostile guest's. Sizes, counts,
// depths and strings are bounded, a member is never outside its struct, and no
// input panics. Strings are returned as they are in memory: quote them before
// they go to a terminal.
//
// A Types is immutable and safe for concurrent use. Only little-endian kernels
// are known.
package ktype
