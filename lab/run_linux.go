package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/lab/internal/job"
	"github.com/vmprobes/vmprobes/lab/internal/wire"
)

// machine is one emulated host and what belongs to it while it runs.
type machine struct {
	host  string
	flags runFlags
	cache *cache
	built *built
	emu   emulator
	dir   string // scratch, in the cache
	logs  string // kept until the next run

	console *consoleLog
	wire    *port // the lab protocol
}

// runJob runs args in the host's dom0. back says which of the collected files
// go where, by base name.
func runJob(ctx context.Context, host string, flags runFlags, args []string, back map[string]string) error {
	bin := args[0]
	info, err := os.Stat(bin)
	if err != nil {
		found, lookErr := exec.LookPath(bin)
		if lookErr != nil {
			return &exitError{codeUsage, fmt.Errorf("nothing to run: %w", err)}
		}
		bin = found
	} else if info.IsDir() || info.Mode().Perm()&0o111 == 0 {
		return &exitError{codeUsage, fmt.Errorf("%s is not executable", bin)}
	}
	inside := "/lab/bin/" + filepath.Base(bin)
	flags.files = append(slices.Clone(flags.files), bin+":"+inside)
	j := job.Job{Host: host, Args: append([]string{inside}, args[1:]...), Env: jobEnv(flags.env), Collect: flags.collect}

	m, cleanup, err := boot(ctx, host, flags, j)
	if err != nil {
		return err
	}
	defer cleanup()
	return m.follow(back)
}

// jobEnv is the environment that goes along: what is meant for the tests, and
// how Go programs debug themselves.
func jobEnv(extra []string) []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		if strings.HasPrefix(name, "VMPROBES_") && name != "VMPROBES_CACHE" && name != job.EnvHost ||
			slices.Contains([]string{"GODEBUG", "GOTRACEBACK", "GOMAXPROCS"}, name) {
			env = append(env, kv)
		}
	}
	return append(env, extra...)
}

// boot starts the host. The returned function ends it.
func boot(ctx context.Context, host string, flags runFlags, j job.Job) (*machine, func(), error) {
	c, err := openCache()
	if err != nil {
		return nil, nil, err
	}
	b, err := c.load(host)
	if err != nil {
		return nil, nil, err
	}
	programs, err := c.buildPrograms(ctx)
	if err != nil {
		return nil, nil, err
	}
	m := &machine{host: host, flags: flags, cache: c, built: b}
	if m.logs, err = c.mkdir("logs", host); err != nil {
		return nil, nil, err
	}
	if m.dir, err = os.MkdirTemp(c.dir, "run-*"); err != nil {
		return nil, nil, err
	}
	cleanup := func() { _ = os.RemoveAll(m.dir) }

	unlock, err := lockEmulator(ctx)
	if err != nil {
		cleanup()
		return nil, nil, err
	}
	// The trial of KVM starts an emulator, if only for a moment.
	m.emu, err = chooseEmulator(ctx, host, flags.accel)
	if err == nil {
		err = m.prepare(j, programs)
	}
	if err == nil {
		err = m.start(ctx)
	}
	if err != nil {
		unlock()
		cleanup()
		return nil, nil, err
	}
	return m, func() {
		m.stop()
		unlock()
		cleanup()
	}, nil
}

func (m *machine) initrd() string { return filepath.Join(m.dir, "dom0.cpio") }

// prepare makes the file that dom0 boots with: the base, the guest kernels and
// the job, one archive behind the other.
func (m *machine) prepare(j job.Job, programs map[string]string) error {
	kernels := m.flags.kernels
	if len(kernels) == 0 {
		kernels = m.emu.defaultKernels(releaseOf(m.host).kernels())
	}
	parts := []string{m.built.Base}
	for _, k := range kernels {
		part, ok := m.built.Kernels[k]
		if !ok {
			return fmt.Errorf("no guest kernel %q (run \"lab build %s\"?)", k, m.host)
		}
		parts = append(parts, part)
	}
	out, err := os.Create(m.initrd())
	if err != nil {
		return err
	}
	for _, part := range parts {
		if err := appendFile(out, part); err != nil {
			_ = out.Close()
			return err
		}
	}
	if err := m.writeJob(out, j, programs); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}

func appendFile(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	_, err = io.Copy(w, f)
	return err
}

func (m *machine) writeJob(out io.Writer, j job.Job, programs map[string]string) error {
	w := cpio.NewWriter(out)
	if err := addFile(w, programs["dom0init"], "init"); err != nil {
		return err
	}
	guest, err := guestImage(programs["guestinit"])
	if err != nil {
		return err
	}
	if err := w.Bytes(job.GuestImage, 0o644, guest); err != nil {
		return err
	}
	j.Cmdline = m.emu.guestCmdline()
	raw, err := json.Marshal(j)
	if err != nil {
		return err
	}
	if err := w.Bytes(job.Path, 0o644, raw); err != nil {
		return err
	}
	if err := w.Dir(job.WorkDir, 0o755); err != nil {
		return err
	}
	for _, spec := range m.flags.files {
		from, to, ok := strings.Cut(spec, ":")
		if !ok || !path.IsAbs(to) {
			return &exitError{codeUsage, fmt.Errorf("--file %s: want HOST:DOM0 with an absolute path in dom0", spec)}
		}
		if err := addTree(w, from, to); err != nil {
			return fmt.Errorf("--file %s: %w", spec, err)
		}
	}
	return w.Close()
}

func addFile(w *cpio.Writer, from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return w.File(to, info.Mode().Perm(), info.Size(), f)
}

func addTree(w *cpio.Writer, from, to string) error {
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return err
	}
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		name := path.Join(to, filepath.ToSlash(rel))
		switch {
		case d.IsDir():
			return w.Dir(name, 0o755)
		case d.Type().IsRegular():
			return addFile(w, p, name)
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			return w.Symlink(target, name)
		}
		return nil // sockets and the like
	})
}

// guestImage makes the guests' file system.
func guestImage(guestinit string) ([]byte, error) {
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	for _, dir := range []string{"dev", "proc", "sys", "tmp"} {
		if err := w.Dir(dir, 0o755); err != nil {
			return nil, err
		}
	}
	if err := w.CharDevice("dev/console", 0o600, 5, 1); err != nil {
		return nil, err
	}
	if err := addFile(w, guestinit, "init"); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// port is a serial port of the emulated machine: a socket that the emulator
// connects to.
type port struct {
	listener net.Listener
	conn     chan net.Conn
}

func newPort(network, address string) (*port, error) {
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, fmt.Errorf("serial port: %w", err)
	}
	p := &port{listener: l, conn: make(chan net.Conn, 1)}
	go func() {
		if conn, err := l.Accept(); err == nil {
			p.conn <- conn
		}
	}()
	return p, nil
}

func (p *port) address() string { return p.listener.Addr().String() }

// consoleLog keeps what Xen and the dom0 kernel print, and watches for their
// end.
type consoleLog struct {
	mu   sync.Mutex
	file *os.File
	echo io.Writer
	line []byte
	tail []string
	died chan string
}

// deadly matches the last words of Xen and of dom0.
var deadly = regexp.MustCompile(`Kernel panic - not syncing|\(XEN\) Panic on CPU|[Dd]omain 0 (crashed|shutdown)|Hardware Dom0 (crashed|shutdown|halted)|\(XEN\) .*FATAL (TRAP|PAGE FAULT)`)

const tailLines = 60

func (c *consoleLog) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _ = c.file.Write(p)
	if c.echo != nil {
		_, _ = c.echo.Write(p)
	}
	for _, b := range p {
		if b != '\n' {
			c.line = append(c.line, b)
			continue
		}
		line := strings.TrimRight(string(c.line), "\r")
		c.line = c.line[:0]
		if c.tail = append(c.tail, line); len(c.tail) > tailLines {
			c.tail = c.tail[1:]
		}
		if deadly.MatchString(line) {
			select {
			case c.died <- line:
			default:
			}
		}
	}
	return len(p), nil
}

func (c *consoleLog) last() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(append(slices.Clone(c.tail), string(c.line)), "\n")
}

// start starts the emulator. When ctx ends, or the timeout passes, it is
// killed by follow.
func (m *machine) start(ctx context.Context) error {
	file, err := os.Create(filepath.Join(m.logs, "console.log"))
	if err != nil {
		return err
	}
	m.console = &consoleLog{file: file, died: make(chan string, 1)}
	if m.flags.verbose {
		m.console.echo = os.Stderr
	}
	return m.emu.start(ctx, m)
}

func (m *machine) stop() {
	m.emu.kill()
	_ = m.console.file.Close()
}

func (m *machine) timeout() time.Duration {
	if m.flags.timeout > 0 {
		return m.flags.timeout
	}
	return m.emu.defaultTimeout()
}

// told tells whether somebody wants to know how the boot goes.
func (m *machine) told() bool {
	return m.flags.verbose || isTerminal(os.Stderr.Fd())
}

// result is how dom0's work ended.
type result struct {
	code   int
	err    error
	files  map[string][]byte
	failed failures
}

// follow passes on the job's output until its end.
func (m *machine) follow(back map[string]string) error {
	r := m.wait(nil)
	m.keep(r, back)
	if r.err != nil {
		return r.err
	}
	if r.code != 0 {
		return &exitError{code: r.code}
	}
	return nil
}

// wait reads the lab protocol until the job is done or something breaks.
// onStart, if not nil, takes over the connection when the job starts.
func (m *machine) wait(onStart func(net.Conn) error) result {
	r := result{files: map[string][]byte{}}
	begin := time.Now()
	done := make(chan error, 1)
	started := false
	parser := wire.Parser{
		Message: func(msg wire.Message) {
			switch msg.Kind {
			case wire.Status:
				if m.told() {
					progress("%s: %s (%v)", m.host, msg.Data, time.Since(begin).Round(100*time.Millisecond))
				}
			case wire.Start:
				started = true
				if m.told() {
					progress("%s: ready after %v, with %s", m.host, time.Since(begin).Round(100*time.Millisecond), m.emu.name())
				}
			case wire.Stdout:
				r.failed.write(msg.Data)
				_, _ = io.WriteString(os.Stdout, msg.Data)
			case wire.Stderr:
				_, _ = io.WriteString(os.Stderr, msg.Data)
			case wire.File:
				r.files[msg.Name] = append(r.files[msg.Name], msg.Data...)
			case wire.Fatal:
				done <- fmt.Errorf("dom0 could not be set up: %s", msg.Data)
			case wire.Exit:
				r.code = msg.Code
				done <- nil
			}
		},
	}
	finished := make(chan struct{})
	defer close(finished)
	pieces := make(chan []byte)
	go func() {
		var conn net.Conn
		select {
		case conn = <-m.wire.conn:
		case <-finished:
			return
		}
		defer func() { _ = conn.Close() }()
		buf := make([]byte, 16<<10)
		for {
			n, err := conn.Read(buf)
			if n > 0 {
				select {
				case pieces <- bytes.Clone(buf[:n]):
				case <-finished:
					return
				}
			}
			if err != nil {
				return
			}
			if onStart != nil {
				// The parser runs in the other goroutine; take over once it
				// has seen the start.
				select {
				case pieces <- nil:
				case <-finished:
					return
				}
				if started {
					select {
					case done <- onStart(conn):
					case <-finished:
					}
					return
				}
			}
		}
	}()

	timer := time.NewTimer(m.timeout())
	defer timer.Stop()
	var dead <-chan time.Time
	var deadLine string
	for {
		select {
		case p := <-pieces:
			_, _ = parser.Write(p)
		case err := <-done:
			if err != nil {
				r.err = m.failure(codeLab, err)
			}
			return r
		case deadLine = <-m.console.died:
			dead = time.After(2 * time.Second) // it has more to say
		case <-dead:
			r.err = m.failure(codeLab, fmt.Errorf("the host died: %s", deadLine))
			return r
		case err := <-m.emu.ended():
			// What it had sent may still be on its way.
			for late := time.After(time.Second); ; {
				select {
				case p := <-pieces:
					_, _ = parser.Write(p)
					continue
				case doneErr := <-done:
					if doneErr == nil {
						return r
					}
					err = doneErr
				case <-late:
				}
				break
			}
			r.err = m.failure(codeLab, fmt.Errorf("%s ended too early: %w", m.emu.name(), err))
			return r
		case <-timer.C:
			r.err = m.failure(codeTimeout, fmt.Errorf("timeout after %v", m.timeout()))
			return r
		case <-m.emu.context().Done():
			r.err = &exitError{codeLab, errors.New("interrupted")}
			return r
		}
	}
}

// failure adds what the console said last.
func (m *machine) failure(code int, err error) error {
	return &exitError{code, fmt.Errorf("%w\n--- the last lines of the console (all of it: %s)\n%s\n---", err, filepath.Join(m.logs, "console.log"), m.console.last())}
}

// keep stores what came back from dom0, and shows the guests' consoles if the
// job failed or came to no end.
func (m *machine) keep(r result, back map[string]string) {
	dir := m.logs
	if m.flags.out != "" {
		dir = m.flags.out
		if err := os.MkdirAll(dir, 0o755); err != nil {
			progress("%v", err)
		}
	}
	names := make([]string, 0, len(r.files))
	for name := range r.files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		to := filepath.Join(dir, filepath.Base(name))
		if p, ok := back[name]; ok {
			to = p
		}
		if err := os.WriteFile(to, r.files[name], 0o644); err != nil {
			progress("%v", err)
			continue
		}
		if (r.code != 0 || r.err != nil) && strings.HasPrefix(name, "guest-") {
			fmt.Fprintf(os.Stderr, "--- console of %s, the last lines (all of it: %s)\n%s\n---\n", strings.TrimSuffix(name, ".log"), to, lastLines(string(r.files[name]), 40))
		}
	}
	if what := r.failed.String(); what != "" {
		fmt.Fprintf(os.Stderr, "--- what failed\n%s\n---\n", what)
	}
}
