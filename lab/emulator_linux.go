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
	"strings"
	"syscall"
	"time"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// emulator runs a machine.
type emulator interface {
	name() string
	defaultTimeout() time.Duration
	// defaultKernels are the guest kernels that dom0 has, of those that there are.
	defaultKernels(all []string) []string
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
	hvm := job.IsA(host, job.HVM)
	switch accel {
	case "kvm":
		return &qemu{kvm: true}, requireTools(job.PV)
	case "tcg":
		if hvm {
			return nil, fmt.Errorf("QEMU without KVM cannot run the %s host: its SVM does not intercept int3", host)
		}
		return &qemu{}, requireTools(job.PVStock)
	case "bochs":
		return newBochs(host), requireTools(job.HVM)
	case "", "auto":
	default:
		return nil, &exitError{codeUsage, fmt.Errorf("--accel %s: want auto, kvm, tcg or bochs", accel)}
	}
	switch {
	case needsBochs(ctx, host):
		return newBochs(host), requireTools(job.HVM)
	case hvm:
		return &qemu{kvm: true}, nil
	}
	return &qemu{}, requireTools(job.PVStock)
}

// needsBochs tells whether it takes Bochs to run the host on this machine. KVM can
// run an hvm host, but with the processor that the machine has.
func needsBochs(ctx context.Context, host string) bool {
	kind := job.Find(host).Kind
	return kind == job.HVMAMD || kind == job.HVM && (kvmNests() != nil || kvmWorks(ctx) != nil)
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
func (q *qemu) guestCmdline() string          { return "" }

func (q *qemu) defaultKernels(all []string) []string { return all }

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

func copyFile(from, to string) error {
	return writeWith(to, func(f *os.File) error { return appendFile(f, from) })
}
