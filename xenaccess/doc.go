// Package xenaccess looks into the memory of a running guest, or of a saved one:
// XenAccess, in Go, and without the System.map and the offsets that it had to be
// given.
//
//	g, err := xenaccess.Open(ctx, "a3guest", nil)
//	if err != nil { … }
//	defer g.Close()
//	tasks, err := g.Linux().Processes(false)
//
// [Open] takes a guest as every program of this module does: the name of a domain,
// its id, or a name with a scheme, "file:" among them. [Guest.Linux] is its kernel,
// as far as it is understood from the guest's own memory. Memory is read through a
// [Space]: the kernel's, a process', physical, or machine memory.
//
// Nothing is changed in the guest unless Write is called. It isn't stopped either,
// except for a QEMU guest, which stands still for a moment while it is opened.
//
// # From C to Go
//
//	xa_init, xa_init_vm_id_strict       Open(ctx, "3", nil)
//	xa_init_vm_name_strict              Open(ctx, name, nil)
//	xa_init_vm_…_lax                    Open(ctx, name, &Options{Lax: true})
//	xa_init_file_strict, _lax           Open(ctx, "file:"+path, …)
//	xa_destroy                          Guest.Close
//	xa_access_kernel_sym(bol)           Guest.Symbol(name), then Kernel().Page
//	xa_access_kernel_va, _va_range      Guest.Kernel().Page, .Read, .Write
//	xa_access_virtual_address (0.3)     the same
//	xa_access_user_va, _va_range        Guest.User(pid), then .Page, .Read, .Write
//	xa_access_pa                        Guest.Physical().Page, .Read, .Write
//	xa_access_ma                        Guest.Machine().Page, .Read, .Write
//	xa_translate_kv2p                   Guest.Kernel().Translate
//	xa_symbol_to_address                Guest.Symbol
//	xa_read_long_sym, _long_long_sym    Guest.Symbol, then Kernel().Uint32, .Uint64
//	xa_read_long_virt, _long_long_virt  Kernel() or User(pid), then .Uint32, .Uint64
//	xa_read_long_phys, …_mach, …        Physical() or Machine(), then .Uint32, .Uint64
//	xa_linux_get_taskaddr               Guest.Linux().Process(pid), then .Layout
//	linux_pid_to_pgd                    Guest.Linux().Process(pid), then .UserRoot
//	/etc/xenaccess.conf                 Options.Config, ParseConfig
//	module-list, process-list, …        the folder examples
//
// The C functions return a pointer into the guest's page and an offset;
// [Space.Page] does as well. Most programs want Read, or [ktype.Types] for what
// has structure. A kernel's 32-bit "long" is Uint32 here. Windows guests
// (xa_windows_get_peb) are not understood.
package xenaccess
