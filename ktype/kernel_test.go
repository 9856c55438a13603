package ktype

import (
	"bufio"
	"bytes"
	"debug/elf"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Tests on real kernels, which are not in the repository:
//
//	VMPROBES_TEST_VMLINUX  files with BTF: vmlinux, or raw; a list as in PATH
//	VMPROBES_TEST_MODULE   modules (.ko) of the first of them, a list as well
//	VMPROBES_TEST_DWARF    vmlinux files with debug information, as Debian's
//	                       linux-image-…-dbg packages have in /usr/lib/debug/boot;
//	                       their BTF is compared with their DWARF
//
// "make test-oracles" gets all of them and runs these tests; with
// VMPROBES_REQUIRE_ORACLES=1, as there, a missing file is a failure.

func testFiles(t testing.TB, env string) []string {
	t.Helper()
	files := filepath.SplitList(os.Getenv(env))
	if len(files) == 0 {
		lack(t, "%s is not set: no real kernel to test with", env)
	}
	return files
}

// rawBTF returns a file with nothing but the BTF of a vmlinux or module.
func rawBTF(t testing.TB, file string) string {
	t.Helper()
	f, err := elf.Open(file)
	if err != nil {
		return file
	}
	defer f.Close()
	data, err := f.Section(".BTF").Data()
	require.NoError(t, err)
	out := filepath.Join(t.TempDir(), "raw.btf")
	require.NoError(t, os.WriteFile(out, data, 0o600))
	return out
}

// bpfType is a type as bpftool prints it.
type bpfType struct {
	ID      uint32 `json:"id"`
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Size    uint64 `json:"size"`
	Members []struct {
		Name   string `json:"name"`
		Bits   uint64 `json:"bits_offset"`
		Width  uint64 `json:"bitfield_size"`
		TypeID uint32 `json:"type_id"`
	} `json:"members"`
	Values []struct {
		Name string `json:"name"`
		Val  any    `json:"val"`
	} `json:"values"`
	Params []struct {
		Name string `json:"name"`
	} `json:"params"`
	TypeID uint32 `json:"type_id"`
}

func bpftool(t testing.TB, args ...string) []bpfType {
	t.Helper()
	path, err := exec.LookPath("bpftool")
	if err != nil {
		path = "/usr/sbin/bpftool"
		tool(t, path)
	}
	out, err := exec.Command(path, append([]string{"-j"}, args...)...).Output()
	require.NoError(t, err)
	var dump struct{ Types []bpfType }
	require.NoError(t, json.Unmarshal(out, &dump))
	return dump.Types
}

// Every struct, union, enum and function of the kernel's BTF, against libbpf.
func TestRealBpftool(t *testing.T) {
	for _, file := range testFiles(t, "VMPROBES_TEST_VMLINUX") {
		types, err := ParseFile(file)
		require.NoError(t, err)
		dump := bpftool(t, "btf", "dump", "file", rawBTF(t, file), "format", "raw")
		byID := map[uint32]bpfType{}
		same := map[string]int{}
		for _, b := range dump {
			byID[b.ID] = b
			same[b.Kind+" "+b.Name]++
		}
		var structs, members, enums, funcs, several, ambiguous int
		for _, b := range dump {
			if b.Name == "(anon)" {
				continue
			}
			tag := strings.TrimSuffix(strings.ToLower(b.Kind), "64")
			switch tag {
			case "struct", "union":
				found, err := types.src.find(tag, b.Name)
				require.NoError(t, err)
				require.Len(t, found, same[b.Kind+" "+b.Name])
				if len(found) > 1 {
					several++
					if _, err := types.Type(tag + " " + b.Name); err != nil {
						require.ErrorIs(t, err, ErrAmbiguous)
						ambiguous++
					}
					continue
				}
				structs++
				require.Equal(t, b.Size, found[0].size, b.Name)
				require.NoError(t, found[0].load())
				require.Len(t, found[0].members, len(b.Members), b.Name)
				for i, m := range b.Members {
					members++
					name := strings.ReplaceAll(m.Name, "(anon)", "")
					require.Equal(t, member{name, found[0].members[i].typ, m.Bits, m.Width}, found[0].members[i], b.Name)
					if name == "" {
						continue
					}
					f, err := types.Offset(tag + " " + b.Name + "." + name)
					require.NoError(t, err)
					require.Equal(t, m.Bits, f.Offset*8+uint64(f.BitOffset), "%s.%s", b.Name, name)
				}
			case "enum":
				if same[b.Kind+" "+b.Name] > 1 {
					continue
				}
				enums++
				typ, err := types.Enum("enum " + b.Name)
				require.NoError(t, err)
				require.Len(t, typ.Values(), len(b.Values))
				for i, v := range typ.Values() {
					require.Equal(t, b.Values[i].Name, v.Name)
				}
			case "func":
				p, err := types.Prototype(b.Name)
				if err != nil {
					require.ErrorIs(t, err, ErrAmbiguous)
					continue
				}
				funcs++
				if same[b.Kind+" "+b.Name] == 1 {
					params := byID[b.TypeID].Params
					n := len(p.Params)
					if p.Variadic {
						n++
					}
					require.Len(t, params, n, b.Name)
					for i, q := range p.Params {
						require.Equal(t, params[i].Name, strings.ReplaceAll(q.Name, "", ""), b.Name)
					}
				}
			}
		}
		t.Logf("%s: %d structs and unions with %d members, %d enums, %d functions; %d not unique, %d of them ambiguous",
			filepath.Base(file), structs, members, enums, funcs, several, ambiguous)
		assert.Greater(t, structs, 5000)
		assert.Greater(t, funcs, 30000)
	}
}

// memberLine is what pahole prints of a member: "int x[3]; /* 8 12 */", the offset
// with a bit behind a colon for bit-fields.
var memberLine = regexp.MustCompile(`^(.*?);\s*/\*\s*(\d+)(?::\s*(\d+))?\s+(\d+)\s*\*/`)
var memberName = regexp.MustCompile(`\(\*+(?:const |volatile )*(\w+)\)\(|\(\*+\s*(\w+)(?:\[\d*\])*\)|(\w+)(?:\[[\d ]*\])*(?:__attribute__.*)?(?::\d+)?$`)

// The offset of every named member of every struct, also of those in anonymous
// members, against pahole.
func TestRealPahole(t *testing.T) {
	for _, file := range testFiles(t, "VMPROBES_TEST_VMLINUX") {
		types, err := ParseFile(file)
		require.NoError(t, err)
		out, err := exec.Command(tool(t, "pahole"), "-F", "btf", rawBTF(t, file)).Output()
		require.NoError(t, err)
		var outer string       // the struct being printed
		var open [][][2]string // per nesting level: path and offset of members whose parent's name comes at its end
		var structs, fields, unread int
		sc := bufio.NewScanner(bytes.NewReader(out))
		for sc.Scan() {
			line := sc.Text()
			text := strings.TrimSpace(line)
			switch {
			case strings.HasPrefix(line, "struct ") && strings.HasSuffix(line, "{"):
				outer = strings.TrimSuffix(line, " {")
				open = [][][2]string{nil}
				structs++
				continue
			case outer == "":
				continue
			case strings.HasPrefix(line, "}"):
				found, err := types.candidates(outer)
				require.NoError(t, err)
				for _, m := range open[0] {
					if len(found) > 1 {
						break // pahole prints one of them
					}
					f, err := types.Offset(outer + "." + m[0])
					require.NoError(t, err)
					require.Equal(t, m[1], strconv.FormatUint(f.Offset*8+uint64(f.BitOffset), 10), "%s.%s", outer, m[0])
					fields++
				}
				outer = ""
				continue
			case strings.HasSuffix(text, "{"):
				open = append(open, nil)
				continue
			}
			m := memberLine.FindStringSubmatch(text)
			closing := strings.HasPrefix(text, "}")
			if m == nil {
				if closing {
					unread++
					open = open[:len(open)-1]
				}
				continue
			}
			decl := strings.TrimSpace(m[1])
			name := ""
			if n := memberName.FindStringSubmatch(strings.TrimPrefix(decl, "}")); n != nil {
				name = n[1] + n[2] + n[3]
			}
			if closing {
				inner := open[len(open)-1]
				open = open[:len(open)-1]
				if strings.ContainsAny(decl, "[*") {
					inner = nil // an array of structs, or a pointer to one: not at this offset
				}
				for _, f := range inner {
					if name != "" {
						f[0] = name + "." + f[0]
					}
					open[len(open)-1] = append(open[len(open)-1], f)
				}
			}
			if name == "" {
				continue
			}
			off, _ := strconv.Atoi(m[2])
			bit, _ := strconv.Atoi(m[3])
			open[len(open)-1] = append(open[len(open)-1], [2]string{name, strconv.Itoa(off*8 + bit)})
		}
		t.Logf("%s: %d structs, %d members equal, %d lines not understood", filepath.Base(file), structs, fields, unread)
		assert.Greater(t, fields, 40000)
	}
}

// wanted are the fields that introspection of Linux guests needs, of 30 structs.
// Those that a kernel doesn't have must be missing in both.
const wanted = `
task_struct: tasks pid tgid comm mm active_mm real_parent parent group_leader cred real_cred thread thread.sp files fs signal sighand nsproxy stack children sibling thread_pid __state flags exit_state start_time
mm_struct: pgd arg_start arg_end env_start env_end start_code end_code exe_file mmap_base mm_users
cred: uid gid euid cap_effective user_ns
file: f_path f_inode f_op f_flags f_pos private_data
path: mnt dentry
dentry: d_name d_parent d_inode
qstr: len name hash
mount: mnt mnt_parent mnt_mountpoint
vfsmount: mnt_root mnt_sb
inode: i_ino i_mode i_size i_sb
super_block: s_type s_id
linux_binprm: filename file mm interp
filename: name uptr
module: list name kallsyms state core_layout mem
mod_kallsyms: symtab num_symtab strtab typetab
bio: bi_iter bi_bdev bi_opf
bvec_iter: bi_sector bi_size
pt_regs: di si dx r10 r8 r9 ax orig_ax ip sp flags
new_utsname: release sysname version
uts_namespace: name
files_struct: fdt fd_array
fdtable: fd max_fds
signal_struct: nr_threads rlim
nsproxy: pid_ns_for_children
pid: numbers level
upid: nr ns
list_head: next prev
kprobe_blacklist_entry: list start_addr end_addr
syscall_metadata: name syscall_nr nb_args types args
sock: sk_protocol sk_type __sk_common.skc_daddr __sk_common.skc_num
vm_area_struct: vm_start vm_end vm_flags
socket: state type sk
`

// BTF and DWARF of the same build. It takes about a minute and 1 GB of memory for
// each kernel:
//
//	VMPROBES_TEST_DWARF=/usr/lib/debug/boot/vmlinux-… go test -run RealDWARF -v ./ktype
func TestRealDWARF(t *testing.T) {
	for _, file := range testFiles(t, "VMPROBES_TEST_DWARF") {
		btf, err := ParseFile(file)
		require.NoError(t, err)
		require.Equal(t, "BTF", btf.Source())
		f, err := os.Open(file)
		require.NoError(t, err)
		defer f.Close()
		dwarf, err := FromDWARF(f)
		require.NoError(t, err)
		equal, missing, structs := 0, 0, 0
		for line := range strings.Lines(strings.TrimSpace(wanted)) {
			name, members, _ := strings.Cut(strings.TrimSpace(line), ":")
			structs++
			for m := range strings.FieldsSeq(members) {
				path := "struct " + name + "." + m
				b, berr := btf.Offset(path)
				d, derr := dwarf.Offset(path)
				if berr != nil {
					assert.ErrorIs(t, berr, ErrNoField)
					assert.ErrorIs(t, derr, ErrNoField)
					missing++
					continue
				}
				if assert.NoError(t, derr) && assert.True(t, b.same(d), "%s: BTF %v, DWARF %v", path, b, d) {
					equal++
				}
			}
		}
		t.Logf("%s: %d fields of %d structs equal, %d in neither", filepath.Base(file), equal, structs, missing)
		assert.Greater(t, equal, 78)

		// All structs of which the kernel has one definition.
		same, fields, differ := 0, 0, 0
		for name := range btf.names() {
			found, err := btf.src.find("struct", name)
			require.NoError(t, err)
			if len(found) != 1 {
				continue
			}
			other, err := dwarf.src.find("struct", name)
			require.NoError(t, err)
			if len(other) != 1 {
				continue
			}
			ok, err := sameLayout(found[0], other[0])
			require.NoError(t, err)
			if !ok {
				differ++
				if differ < 10 {
					t.Logf("differs: %s", name)
				}
				continue
			}
			same++
			fields += len(found[0].members)
		}
		t.Logf("%s: %d structs with %d members equal, %d differ", filepath.Base(file), same, fields, differ)
		assert.Less(t, differ, same/100)

		for _, fn := range []string{"tcp_v4_connect", "vfs_open", "do_sys_openat2", "bprm_execve", "printk_sprint", "_printk"} {
			b, berr := btf.Prototype(fn)
			d, derr := dwarf.Prototype(fn)
			if assert.NoError(t, berr) && assert.NoError(t, derr) {
				assert.Equal(t, b.String(), d.String())
			}
		}
		v, err := dwarf.Variable("init_task")
		require.NoError(t, err)
		assert.Equal(t, "struct task_struct", v.String())
	}
}

func TestRealModules(t *testing.T) {
	base := testFiles(t, "VMPROBES_TEST_VMLINUX")[0]
	kernel, err := ParseFile(base)
	require.NoError(t, err)
	equal := 0
	for _, file := range testFiles(t, "VMPROBES_TEST_MODULE") {
		raw := rawBTF(t, file)
		data, err := os.ReadFile(raw)
		require.NoError(t, err)
		types, err := kernel.WithModule("mod", data)
		require.NoError(t, err)
		n := 0
		for _, b := range bpftool(t, "-B", rawBTF(t, base), "btf", "dump", "file", raw, "format", "raw") {
			if b.Name == "(anon)" || b.Kind != "STRUCT" || b.ID < kernel.src.(*btfSource).sheet.end() {
				continue
			}
			found, err := types.modules[0].src.find("struct", b.Name)
			require.NoError(t, err)
			require.NotEmpty(t, found)
			if len(found) > 1 {
				continue
			}
			for _, m := range b.Members {
				if m.Name == "(anon)" {
					continue
				}
				f, err := types.Offset("mod:struct " + b.Name + "." + m.Name)
				require.NoError(t, err)
				require.Equal(t, m.Bits, f.Offset*8+uint64(f.BitOffset))
				n++
			}
		}
		f, err := types.Offset("task_struct.comm")
		require.NoError(t, err)
		g, err := kernel.Offset("task_struct.comm")
		require.NoError(t, err)
		assert.Equal(t, g, f)
		t.Logf("%s: %d members equal", filepath.Base(file), n)
		equal += n // a small module has no structs of its own
	}
	assert.Positive(t, equal)
}

func TestRealKernels(t *testing.T) {
	for _, file := range testFiles(t, "VMPROBES_TEST_VMLINUX") {
		types, err := ParseFile(file)
		require.NoError(t, err)
		for _, path := range []string{"list_head.prev", "task_struct.tasks.prev"} {
			f, err := types.Offset(path)
			require.NoError(t, err)
			assert.EqualValues(t, 8, f.Size)
		}
		_, err = types.Offset("task_struct.state")
		assert.ErrorContains(t, err, "__state")
		_, err = types.Offset("task_strut.state")
		assert.ErrorContains(t, err, "(near: task_struct)")
		p, err := types.Prototype("tcp_v4_connect")
		require.NoError(t, err)
		assert.Equal(t, "int tcp_v4_connect(struct sock *sk, struct sockaddr *uaddr, int addr_len)", p.String())
		assert.Equal(t, "-1", p.Params[2].Format(0xffffffff))
		for name := range types.names() {
			if err := types.Print(&bytes.Buffer{}, name); err != nil {
				require.ErrorIs(t, err, ErrAmbiguous, name)
			}
			if testing.Short() {
				break
			}
		}
		_, err = types.Variable("pcpu_hot")
		if err != nil {
			_, err = types.Variable("current_task")
		}
		assert.NoError(t, err)
	}
}

func BenchmarkFromBTF(b *testing.B) {
	data, err := os.ReadFile(rawBTF(b, testFiles(b, "VMPROBES_TEST_VMLINUX")[0]))
	require.NoError(b, err)
	b.Run("load", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := FromBTF(bytes.NewReader(data), int64(len(data))); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			types, err := FromBTF(bytes.NewReader(data), int64(len(data)))
			if err == nil {
				_, err = types.Offset("task_struct.comm")
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkOffset(b *testing.B) {
	types, err := New("test", 8, Struct{"task_struct", 64, []StructField{{"pid", 0, "int"}}})
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := types.Offset("task_struct.pid"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	types, err := New("test", 8, Struct{"task_struct", 64, []StructField{{"pid", 0, "int"}, {"tgid", 4, "int"}, {"flags", 8, "u64"}, {"mm", 16, "u64"}}})
	require.NoError(b, err)
	var m Memory = &fixed{}
	var d struct {
		Pid   int    `ktype:"pid"`
		Tgid  int    `ktype:"tgid"`
		Flags uint32 `ktype:"flags"`
		MM    uint64 `ktype:"mm"`
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := types.Decode(m, "task_struct", 0, &d); err != nil {
			b.Fatal(err)
		}
	}
}
