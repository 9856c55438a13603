package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// Bochs is built from source: Debian's has its debugger compiled in and its
// optimizations left out, which costs half of its speed or more, and Debian 12's is
// older. The archive is Debian's, without a version of its own in any list of
// packages of Debian 12.
const (
	bochsPool    = "pool/main/b/bochs/"
	bochsArchive = "bochs_3.0+dfsg.orig.tar.xz"
	bochsSHA256  = "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b"
)

var bochsConfigure = []string{
	"--enable-cpu-level=6", "--enable-x86-64", "--enable-long-phy-address", "--enable-vmx=2", "--enable-svm", "--enable-avx", "--enable-evex",
	"--enable-all-optimizations", "--disable-docbook", "--with-nogui", "CFLAGS=-O2", "CXXFLAGS=-O2",
}

// bochsEdit is a change to Bochs' source: text that goes before a line of it.
type bochsEdit struct{ file, before, text string }

// bochsEdits mend where Bochs does otherwise than processors, and Xen or Linux relies
// on them:
//
//   - One of AMD's with the next-RIP feature, which the models have by their CPUID
//     (Fn8000_000A EDX[3]), takes the return address of an int3, an into or an int n
//     that is injected at VMRUN from the VMCB's nRIP field (APM volume 2, 15.20
//     Event Injection), where Xen writes it (svm_inject_event). Bochs saves nRIP at
//     #VMEXIT and never reads it: an injected int3 returns to itself for ever. A
//     fault on the way still goes back to prev_rip, which VMRUN has set.
//   - When #DB is intercepted, the VMCB's DR6 says why (13.1.1.3, 15.12.2): Xen has
//     nothing else to give to the guest. Bochs leaves without having updated DR6.
//   - Whether a SYSCALL ends in a single step's #DB is decided by TF as it is then, so
//     that a kernel is spared it by TF in IA32_FMASK (Linux: syscall_init). Bochs goes
//     by TF as it was before, and Linux meets a step in its first instruction, which
//     it warns of (exc_debug_kernel), whenever a debugger steps through a system call.
var bochsEdits = []bochsEdit{{
	file:   "cpu/svm.cc",
	before: "  interrupt(vector, type, push_error, error_code);\n",
	text: `  if ((type == BX_SOFTWARE_INTERRUPT || type == BX_SOFTWARE_EXCEPTION) && BX_SUPPORT_SVM_EXTENSION(BX_CPUID_SVM_NRIP_SAVE))
    RIP = vmcb_read64(SVM_CONTROL64_NRIP);
`,
}, {
	file:   "cpu/svm.cc",
	before: "  BX_CPU_THIS_PTR debug_trap = 0; // clear debug_trap field\n",
	text: `  if (vector == BX_DB_EXCEPTION) // B0 to B3 are of this one; BD, BS and BT stay until they are cleared
    BX_CPU_THIS_PTR dr6.set32((BX_CPU_THIS_PTR dr6.get32() & ~0xfu) | (BX_CPU_THIS_PTR debug_trap & 0xe00f));
`,
}, {
	file:   "cpu/proc_ctrl.cc",
	before: "    writeEFlags(read_eflags() & ~(BX_CPU_THIS_PTR msr.fmask) & ~(EFlagsRFMask), EFlagsValidMask);\n",
	text: `    if (BX_CPU_THIS_PTR msr.fmask & EFlagsTFMask)
      BX_CPU_THIS_PTR debug_trap &= ~BX_DEBUG_SINGLE_STEP_BIT;
`,
}}

func (e bochsEdit) apply(dir string) error {
	path := filepath.Join(dir, e.file)
	source, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if n := strings.Count(string(source), e.before); n != 1 {
		return fmt.Errorf("%s has %d places to change instead of one", e.file, n)
	}
	return os.WriteFile(path, []byte(strings.Replace(string(source), e.before, e.text+e.before, 1)), 0o644)
}

// bochsKey names what is built: it changes with the source, the edits to it, and how
// it is configured.
func bochsKey() string {
	parts := append([]string{bochsSHA256}, bochsConfigure...)
	for _, e := range bochsEdits {
		parts = append(parts, e.file, e.before, e.text)
	}
	return key(parts...)
}

// buildBochs builds the emulator of the hvm hosts.
func (c *cache) buildBochs(ctx context.Context) (string, error) {
	out, have, err := c.made("bochs-" + bochsKey())
	if err != nil || have {
		return out, err
	}
	archive, err := c.fetchBochs(ctx)
	if err != nil {
		return "", fmt.Errorf("fetch the source of Bochs: %w", err)
	}
	tmp, err := os.MkdirTemp(c.dir, "bochs-*")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	progress("build Bochs (a minute)")
	if _, err := output(ctx, tmp, "tar", "-x", "--strip-components=1", "-f", archive); err != nil {
		return "", fmt.Errorf("unpack the source of Bochs: %w", err)
	}
	for _, e := range bochsEdits {
		if err := e.apply(tmp); err != nil {
			return "", fmt.Errorf("change the source of Bochs: %w", err)
		}
	}
	for _, command := range [][]string{
		append([]string{"./configure"}, bochsConfigure...),
		{"make", fmt.Sprintf("-j%d", runtime.NumCPU())},
	} {
		if _, err := output(ctx, tmp, command[0], command[1:]...); err != nil {
			return "", fmt.Errorf("build Bochs: %w", err)
		}
	}
	program := filepath.Join(tmp, "bochs")
	if err := os.Chmod(program, 0o755); err != nil {
		return "", err
	}
	return out, os.Rename(program, out)
}

// fetchBochs gets the source from where this machine gets its packages.
func (c *cache) fetchBochs(ctx context.Context) (string, error) {
	dir, err := c.mkdir("sources")
	if err != nil {
		return "", err
	}
	archive := filepath.Join(dir, bochsArchive)
	if err := checkSHA256(archive, bochsSHA256); err == nil {
		return archive, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		progress("%v: fetching it again", err)
	}
	tmp, err := os.MkdirTemp(c.dir, "fetch-*")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	fetched := filepath.Join(tmp, bochsArchive)
	repositories, err := output(ctx, "", "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return "", err
	}
	var tried []string
	var failed []error
	for base := range strings.FieldsSeq(repositories) {
		uri := strings.TrimSuffix(base, "/") + "/" + bochsPool + bochsArchive
		if slices.Contains(tried, uri) {
			continue
		}
		tried = append(tried, uri)
		progress("fetch %s", uri)
		args := append(aptOptions()[1:], "download-file", uri, fetched, "SHA256:"+bochsSHA256)
		if _, err = output(ctx, tmp, "/usr/lib/apt/apt-helper", args...); err == nil {
			err = checkSHA256(fetched, bochsSHA256)
		}
		if err == nil {
			return archive, os.Rename(fetched, archive)
		}
		failed = append(failed, err)
	}
	return "", fmt.Errorf("%w\n(put the file, with the SHA-256 sum %s, at %s)",
		errors.Join(append(failed, fmt.Errorf("%d repositories tried", len(tried)))...), bochsSHA256, archive)
}

// checkSHA256 returns nil if the file has that sum.
func checkSHA256(path, want string) error {
	got, err := sumSHA256(path)
	if err == nil && got != want {
		err = fmt.Errorf("%s: SHA-256 sum %s, want %s", path, got, want)
	}
	return err
}

func sumSHA256(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// bochs runs the hvm hosts where there is no hardware for them: its model of an
// Intel processor has VMX and EPT, that of an AMD one SVM and NPT. It is slow.
type bochs struct {
	process
	model   string // as Bochs calls it
	xenArgs string
}

func newBochs(host string) *bochs {
	if job.Find(host).Kind == job.HVMAMD {
		return &bochs{model: "ryzen", xenArgs: bochsAMDXenArgs}
	}
	return &bochs{model: "corei7_haswell_4770", xenArgs: bochsIntelXenArgs}
}

func (b *bochs) name() string                  { return "Bochs" }
func (b *bochs) defaultTimeout() time.Duration { return time.Hour }

// One: each makes the start longer.
func (b *bochs) defaultKernels(all []string) []string { return all[:1] }

// Bochs 2.7 was seen to have two mistakes in its VMX that guests die of without any
// probe; 3.0 has the second still, and both arguments cost nothing:
//
//   - An interrupt of the machine that comes while a virtual interrupt waits for
//     the guest to enable its interrupts delivers the virtual one at once
//     (cpu/event.cc, InterruptAcknowledge), a few times in each boot: in the middle
//     of tick_do_update_jiffies64, say, whose lock the handler then waits for.
//     With Xen's apicv=0 no virtual interrupts wait in the processor.
//   - A guest that is entered with its interrupts disabled cannot be interrupted
//     from outside until it has enabled them itself (cpu/vmx.cc:
//     handleCpuContextChange runs before in_vmx_guest is set). One that spins so
//     without a PAUSE, which Xen has exits for, waiting for another vCPU, stops the
//     whole machine. A second vCPU does when it measures its delay loop, which lpj=
//     spares it; tsc=reliable spares it the comparison of clocks.
const bochsIntelXenArgs = "apicv=0"

// With XSAVE, programs in dom0 come to harm in the AMD model: xl aborts in malloc.
const bochsAMDXenArgs = "xsave=0"

func (b *bochs) guestCmdline() string {
	const hz = 250 // CONFIG_HZ of Debian's kernels
	return fmt.Sprintf("tsc=reliable lpj=%d %s", bochsIPS/hz, bochsKernelArgs)
}

// bochsKernelArgs spare kernels half of their start: the tests of cryptographic
// algorithms, and certificates. (rodata=off, for dom0, spares it a walk through
// its page tables.)
const bochsKernelArgs = "cryptomgr.notests initcall_blacklist=load_system_certificate_list"

const grubConfig = `set timeout=0
terminal_output console
set gfxpayload=text
menuentry lab {
  multiboot2 /boot/xen %s dom0_mem=768M,max:768M no-real-mode edd=off vga=none
  module2 /boot/vmlinux %s
  module2 --nounzip /boot/dom0.cpio
}
`

// bochsConfig is Bochs' own. ips is how many instructions make one emulated
// second. The serial ports connect to the lab.
const bochsConfig = `cpu: model=%s, count=1, ips=%d, reset_on_triple_fault=0
memory: guest=1536, host=1536
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
vga: extension=none
ata0: enabled=1
ata0-master: type=cdrom, path="lab.iso", status=inserted
boot: cdrom
com1: enabled=1, mode=socket-client, dev="%s"
com2: enabled=1, mode=socket-client, dev="%s"
display_library: nogui
clock: sync=none
log: bochs.log
panic: action=report
error: action=ignore
info: action=ignore
debug: action=ignore
`

// With less, two vCPUs and dom0 hardly get anything done between their timer
// interrupts; with more, waiting takes longer.
const bochsIPS = 150_000_000

func (b *bochs) start(ctx context.Context, m *machine) error {
	if m.built.Bochs == "" { // by an older lab, or where KVM nests
		return fmt.Errorf("the %[1]s host has no Bochs: run \"lab build %[1]s\" again, on a machine whose KVM doesn't nest", m.host)
	}
	console, err := newPort("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	if m.wire, err = newPort("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	go func() { _, _ = io.Copy(m.console, <-console.conn) }()
	if err := b.makeCD(ctx, m); err != nil {
		return err
	}
	config := fmt.Sprintf(bochsConfig, b.model, bochsIPS, console.address(), m.wire.address())
	if err := os.WriteFile(filepath.Join(m.dir, "bochsrc"), []byte(config), 0o644); err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(m.logs, "bochs.log"))
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	cmd := exec.Command(m.built.Bochs, "-q", "-f", "bochsrc")
	cmd.Dir = m.dir
	cmd.Stdout, cmd.Stderr = out, out
	return b.run(ctx, cmd, syscall.SysProcAttr{})
}

// makeCD makes the CD that Bochs boots from.
func (b *bochs) makeCD(ctx context.Context, m *machine) error {
	boot := filepath.Join(m.dir, "cd", "boot")
	if err := os.MkdirAll(filepath.Join(boot, "grub"), 0o755); err != nil {
		return err
	}
	config := fmt.Sprintf(grubConfig, strings.TrimSpace(xenArgs+" "+b.xenArgs+" "+m.flags.xenArgs), kernelArgs+" rodata=off "+bochsKernelArgs)
	if err := os.WriteFile(filepath.Join(boot, "grub", "grub.cfg"), []byte(config), 0o644); err != nil {
		return err
	}
	for name, source := range map[string]string{"xen": m.built.Xen, "vmlinux": m.built.Kernel} {
		if err := copyFile(source, filepath.Join(boot, name)); err != nil {
			return err
		}
	}
	if err := os.Rename(m.initrd(), filepath.Join(boot, "dom0.cpio")); err != nil {
		return err
	}
	_, err := output(ctx, m.dir, "grub-mkrescue", "-d", "/usr/lib/grub/i386-pc", "-o", "lab.iso", "cd")
	return err
}
