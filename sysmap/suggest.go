package sysmap

import (
	"hash/maphash"
	"slices"
	"strings"
)

const (
	maxSuggest  = 10
	maxEditName = 128
)

// purposes lists, for names that people look for, the kernel functions that do the
// work, those of new kernels first. Facts of Linux 2.6 to 7.3.
var purposes = []struct {
	asked []string // without sys_
	funcs []string
}{
	{[]string{"open", "openat", "openat2", "creat", "do_sys_open", "do_filp_open", "do_file_open", "filp_open"},
		[]string{"do_sys_openat2", "do_file_open", "do_filp_open", "do_sys_open", "vfs_open"}},
	{[]string{"exec", "execve", "execveat", "do_execve", "do_execveat", "do_execveat_common"},
		[]string{"bprm_execve", "do_execveat_common", "do_execve_common", "do_execve"}},
	{[]string{"fork", "vfork", "clone", "clone3", "do_fork", "_do_fork"},
		[]string{"kernel_clone", "_do_fork", "do_fork", "copy_process"}},
	{[]string{"exit", "exit_group", "do_exit"}, []string{"do_exit", "do_group_exit"}},
	{[]string{"unlink", "unlinkat", "remove", "do_unlinkat", "filename_unlinkat"},
		[]string{"filename_unlinkat", "do_unlinkat", "vfs_unlink"}},
	{[]string{"rename", "renameat", "renameat2", "do_renameat2"},
		[]string{"filename_renameat2", "do_renameat2", "vfs_rename"}},
	{[]string{"mkdir", "mkdirat", "do_mkdirat"}, []string{"filename_mkdirat", "do_mkdirat", "vfs_mkdir"}},
	{[]string{"read", "pread64", "readv"}, []string{"vfs_read", "ksys_read"}},
	{[]string{"write", "pwrite64", "writev"}, []string{"vfs_write", "ksys_write"}},
	{[]string{"connect"}, []string{"__sys_connect", "tcp_v4_connect"}},
	{[]string{"bio", "submit_bio", "generic_make_request", "submit_bio_noacct", "blkio"},
		[]string{"submit_bio", "submit_bio_noacct", "generic_make_request"}},
	{[]string{"schedule", "context_switch", "finish_task_switch"},
		[]string{"__schedule", "schedule", "finish_task_switch"}},
	{[]string{"page_fault", "do_page_fault"}, []string{"exc_page_fault", "do_user_addr_fault", "handle_mm_fault", "do_page_fault"}},
	{[]string{"insmod", "init_module", "finit_module", "load_module"}, []string{"load_module", "do_init_module"}},
	{[]string{"kill", "tkill", "tgkill"}, []string{"do_send_sig_info", "__send_signal_locked", "do_send_specific"}},
	{[]string{"mmap", "mmap2", "do_mmap"}, []string{"do_mmap", "vm_mmap_pgoff", "ksys_mmap_pgoff"}},
	{[]string{"ptrace"}, []string{"ptrace_attach", "arch_ptrace"}},
	{[]string{"text_poke_bp"}, []string{"smp_text_poke_single"}},
}

// Suggest returns names of the map that the user may have meant by one it does not
// have, the best first, at most ten: the name a system call has on this kernel
// (sys_open is __x64_sys_open since 4.17, fa697140f9a2), the function that does its
// work, what the compiler made of a function, and if there is none of these, names
// that differ by a letter or two.
func (m *Map) Suggest(name string) []string {
	var out []string
	add := func(s string) {
		if s == name || len(out) >= maxSuggest {
			return
		}
		if slices.Contains(out, s) {
			return
		}
		out = append(out, s)
	}
	have := func(s string) {
		if m.has(s) {
			add(s)
		}
	}
	if name == "" || len(name) > maxName || m.Len() == 0 {
		return nil
	}
	base, call := name, false
	for _, p := range []string{"__x64_sys_", "__ia32_compat_sys_", "__ia32_sys_", "__do_sys_", "__se_sys_", "SyS_", "sys_", "ksys_"} {
		if s, ok := strings.CutPrefix(name, p); ok && s != "" {
			base, call = s, true
			break
		}
	}
	if call {
		for _, p := range []string{"__x64_sys_", "sys_", "__do_sys_", "__se_sys_", "SyS_", "__ia32_sys_", "__ia32_compat_sys_"} {
			have(p + base)
		}
	}
	for _, p := range purposes {
		for _, a := range p.asked {
			if a != base {
				continue
			}
			for _, f := range p.funcs {
				if m.has(f) {
					add(f)
				} else {
					for _, s := range m.suffixed(f) {
						add(s.Name)
					}
				}
			}
		}
	}
	if !call {
		have("__x64_sys_" + name)
		have("sys_" + name)
	}
	for _, s := range m.suffixed(name) {
		add(s.Name)
	}
	if len(out) == 0 && len(name) >= 4 && len(name) <= maxEditName {
		m.near(name, min(2, len(name)/4), add)
	}
	return out
}

func (m *Map) has(name string) bool {
	hash := maphash.String(seed, name)
	for _, v := range m.views() {
		if i, _ := v.t.first(hash, name); i != 0 {
			return true
		}
	}
	return false
}

// near adds the names at an edit distance of at most d, nearest first.
func (m *Map) near(name string, d int, add func(string)) {
	var second []string
	for _, v := range m.views() {
		for i := range v.t.ent {
			s := v.t.name(i)
			if len(s) < len(name)-d || len(s) > len(name)+d || strings.HasPrefix(s, "__pfx_") {
				continue
			}
			switch got := editDistance(name, s, d); {
			case got <= min(d, 1):
				add(s)
			case got == 2 && d == 2 && len(second) < maxSuggest:
				second = append(second, s)
			}
		}
	}
	for _, s := range second {
		add(s)
	}
}

// editDistance returns Levenshtein's distance of a and b, a change of case being
// free, or most+1 if it is more than most. Both have at most maxEditName+2 bytes.
func editDistance(a, b string, most int) int {
	// What they have in common at both ends makes no difference.
	for a != "" && b != "" && lower(a[0]) == lower(b[0]) {
		a, b = a[1:], b[1:]
	}
	for a != "" && b != "" && lower(a[len(a)-1]) == lower(b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	if len(a) > len(b)+most || len(b) > len(a)+most {
		return most + 1
	}
	var rows [2][maxEditName + 4]int
	prev, cur := rows[0][:len(b)+1], rows[1][:len(b)+1]
	for j := range prev {
		prev[j] = j
	}
	// Only the band within most of the diagonal can matter.
	for i := 1; i <= len(a); i++ {
		from, to := max(1, i-most), min(len(b), i+most)
		cur[from-1] = most + 1
		if from == 1 {
			cur[0] = i
		}
		low := cur[from-1]
		for j := from; j <= to; j++ {
			c := prev[j-1]
			if lower(a[i-1]) != lower(b[j-1]) {
				c++
			}
			c = min(c, cur[j-1]+1)
			if j < i+most { // else prev[j] is outside the band
				c = min(c, prev[j]+1)
			}
			cur[j] = c
			low = min(low, c)
		}
		if low > most {
			return most + 1
		}
		prev, cur = cur, prev
	}
	return min(prev[len(b)], most+1)
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c |= 0x20
	}
	return c
}
