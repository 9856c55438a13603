package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// emulator runs a machine.
type emulator interface {
	name() string
	defaultTimeout() time.Duration
	defaultKernels() []string
	// guestCmdline is what a guest's kernel needs on its command line.
	guestCmdline() string
	start(ctx context.Context, m *machine) error
	// ended delivers the emulator's end, once.
	ended() <-chan error
	// context is the one it was started with.
	context() context.Context
	kill()
}

// chooseEmulator finds out what this machine can run the host with.
func chooseEmulator(ctx context.Context, host, accel string) (emulator, error) {
	needsVMX := host == job.HVM
	switch accel {
	case "kvm":
		return &qemu{kvm: true}, requireTools(job.PV)
	case "tcg":
		if needsVMX {
			return nil, errors.New("QEMU without KVM cannot run the hvm host: its SVM does not intercept int3")
		}
		return &qemu{}, requireTools(job.PVStock)
	case "bochs":
		return &bochs{}, requireTools(job.HVM)
	case "", "auto":
	default:
		return nil, &exitError{codeUsage, fmt.Errorf("--accel %s: want auto, kvm, tcg or bochs", accel)}
	}
	if needsVMX {
		if kvmNests() == nil && kvmWorks(ctx) == nil {
			return &qemu{kvm: true}, nil
		}
		return &bochs{}, requireTools(job.HVM)
	}
	return &qemu{}, requireTools(job.PVStock)
}

// kvmNests tells whether a guest of this machine could have guests itself.
func kvmNests() error {
	raw, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	flags := strings.Fields(string(raw))
	for flag, module := range map[string]string{"vmx": "kvm_intel", "svm": "kvm_amd"} {
		for _, f := range flags {
			if f != flag {
				continue
			}
			nested, err := os.ReadFile("/sys/module/" + module + "/parameters/nested")
			if err != nil {
				return err
			}
			if n := strings.TrimSpace(string(nested)); n != "Y" && n != "1" {
				return fmt.Errorf("%s has nested=%s", module, n)
			}
			return nil
		}
	}
	return errors.New("the processor offers neither vmx nor svm")
}

// kvmWorks tries: that /dev/kvm is there says nothing.
func kvmWorks(ctx context.Context) error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_ = f.Close()
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "64", "-nodefaults", "-display", "none", "-monitor", "stdio")
	cmd.Stdin = strings.NewReader("quit\n")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, lastLines(string(out), 1))
	}
	return nil
}

// process is an emulator's process.
type process struct {
	ctx  context.Context
	cmd  *exec.Cmd
	end  chan error
	dead chan struct{}
}

// run starts cmd in a process group of its own, so that Ctrl-C reaches the lab
// only, and makes the kernel end it should the lab die.
func (p *process) run(ctx context.Context, cmd *exec.Cmd, attr syscall.SysProcAttr) error {
	attr.Pdeathsig = syscall.SIGKILL
	if !attr.Setsid {
		attr.Setpgid = true
	}
	cmd.SysProcAttr = &attr
	p.ctx, p.cmd, p.end, p.dead = ctx, cmd, make(chan error, 1), make(chan struct{})
	started := make(chan error)
	go func() {
		// The death signal is tied to the thread that starts the process, so
		// that thread waits for it too.
		lockThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		if err == nil {
			err = errors.New("exit code 0")
		}
		p.end <- err
		close(p.dead)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start the emulator: %w", err)
	}
	return nil
}

func (p *process) ended() <-chan error      { return p.end }
func (p *process) context() context.Context { return p.ctx }

func (p *process) kill() {
	if p.cmd == nil || p.cmd.Process == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	<-p.dead
}

// Without eager-fpu, PV domains (dom0 among them) lose the upper halves of
// their ymm registers under TCG, a few times a second. It costs nothing.
const (
	xenArgs    = "console=com1 com1=115200,8n1 loglvl=warning guest_loglvl=warning spec-ctrl=eager-fpu"
	kernelArgs = "console=hvc0 earlyprintk=xen quiet"
)

// qemu runs Xen as the multiboot kernel that it is.
type qemu struct {
	process
	kvm bool
}

func (q *qemu) name() string {
	if q.kvm {
		return "QEMU and KVM"
	}
	return "QEMU"
}

func (q *qemu) defaultTimeout() time.Duration { return 20 * time.Minute }
func (q *qemu) defaultKernels() []string      { return []string{"6.1", "6.12"} }
func (q *qemu) guestCmdline() string          { return "" }

func (q *qemu) start(ctx context.Context, m *machine) error {
	sockets, err := os.MkdirTemp("", "lab-*") // their paths must be short
	if err != nil {
		return err
	}
	console, err := newPort("unix", filepath.Join(sockets, "1"))
	if err != nil {
		return err
	}
	if m.wire, err = newPort("unix", filepath.Join(sockets, "2")); err != nil {
		return err
	}
	go func() { _, _ = io.Copy(m.console, <-console.conn) }()

	// QEMU splits what it is given at commas, so the files have names without
	// one in its working directory.
	for name, target := range map[string]string{"xen": m.built.Xen, "vmlinux": m.built.Kernel} {
		if err := os.Symlink(target, filepath.Join(m.dir, name)); err != nil {
			return err
		}
	}
	// With SMAP in the model, a PV dom0 crashes at once under TCG.
	accel := []string{"-accel", "tcg,thread=multi", "-cpu", "max,-smap,-smep,-pku,-la57"}
	if q.kvm {
		accel = []string{"-accel", "kvm", "-cpu", "host"}
	}
	args := append(accel,
		"-smp", "2", "-m", "2048", "-display", "none", "-no-reboot", "-net", "none", "-monitor", "none",
		"-serial", "unix:"+console.address(), "-serial", "unix:"+m.wire.address(),
		"-kernel", "xen", "-append", strings.TrimSpace(xenArgs+" dom0_mem=1024M,max:1024M "+m.flags.xenArgs),
		"-initrd", "vmlinux "+kernelArgs+","+filepath.Base(m.initrd()),
	)
	var stderr bytes.Buffer
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.Dir = m.dir
	cmd.Stdout, cmd.Stderr = m.console, io.MultiWriter(m.console, &stderr)
	err = q.run(ctx, cmd, syscall.SysProcAttr{})
	go func() {
		<-q.dead
		_ = os.RemoveAll(sockets)
	}()
	return err
}

// bochs runs the hvm host where there is no hardware for it: its model of an
// Intel processor has VMX and EPT. It is slow.
type bochs struct{ process }

func (b *bochs) name() string                  { return "Bochs" }
func (b *bochs) defaultTimeout() time.Duration { return time.Hour }
func (b *bochs) defaultKernels() []string      { return []string{"6.1"} }

// Bochs 2.7 has two mistakes in its VMX that guests die of without any probe:
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
const bochsXenArgs = "apicv=0"

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
const bochsConfig = `cpu: model=corei7_haswell_4770, count=1, ips=%d, reset_on_triple_fault=0
memory: guest=1536, host=1536
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
vga: extension=none
ata0: enabled=1
ata0-master: type=cdrom, path="lab.iso", status=inserted
boot: cdrom
com1: enabled=1, mode=socket-client, dev="%s"
com2: enabled=1, mode=socket-client, dev="%s"
display_library: term
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

var bochsScreen = regexp.MustCompile(`screen "([^"]+)"`)

func (b *bochs) start(ctx context.Context, m *machine) error {
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
	config := fmt.Sprintf(bochsConfig, bochsIPS, console.address(), m.wire.address())
	for name, content := range map[string]string{"bochsrc": config, "commands": "c\n"} {
		if err := os.WriteFile(filepath.Join(m.dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	master, slave, err := openPTY()
	if err != nil {
		return err
	}
	// Debian's Bochs has its debugger compiled in, which has to be told to
	// continue. It insists on a terminal.
	cmd := exec.Command("bochs", "-q", "-f", "bochsrc", "-rc", "commands")
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "TERM=xterm", "LINES=25", "COLUMNS=80")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	err = b.run(ctx, cmd, syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0})
	_ = slave.Close()
	if err != nil {
		_ = master.Close()
		return err
	}
	go drainScreens(master, filepath.Join(m.logs, "bochs-terminal.log"))
	return nil
}

// drainScreens reads what Bochs writes to its terminal, and to the second
// terminal that it opens as the machine's screen: unread, it would block.
func drainScreens(master *os.File, log string) {
	defer func() { _ = master.Close() }()
	out, err := os.Create(log)
	if err == nil {
		defer func() { _ = out.Close() }()
	}
	var seen []byte
	opened := false
	buf := make([]byte, 4096)
	for {
		n, err := master.Read(buf)
		if out != nil {
			_, _ = out.Write(buf[:n])
		}
		if !opened {
			seen = append(seen, buf[:n]...)
			if found := bochsScreen.FindSubmatch(seen); found != nil {
				opened = true
				go drainScreen(string(found[1]))
			}
		}
		if err != nil {
			return
		}
	}
}

func drainScreen(path string) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		progress("Bochs' screen: %v", err)
		return
	}
	defer func() { _ = f.Close() }()
	_, _ = io.Copy(io.Discard, f)
}

// makeCD makes the CD that Bochs boots from.
func (b *bochs) makeCD(ctx context.Context, m *machine) error {
	boot := filepath.Join(m.dir, "cd", "boot")
	if err := os.MkdirAll(filepath.Join(boot, "grub"), 0o755); err != nil {
		return err
	}
	config := fmt.Sprintf(grubConfig, strings.TrimSpace(xenArgs+" "+bochsXenArgs+" "+m.flags.xenArgs), kernelArgs+" rodata=off "+bochsKernelArgs)
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

func copyFile(from, to string) error {
	return writeWith(to, func(f *os.File) error { return appendFile(f, from) })
}
