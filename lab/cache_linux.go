package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// recipe changes when the images are to be made in another way, so that those
// in the caches are made again.
const recipe = 1

// cache is the folder where everything the lab downloads and builds is kept,
// outside the source tree.
type cache struct{ dir string }

func openCache() (*cache, error) {
	dir := os.Getenv("VMPROBES_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("no place for the cache (set VMPROBES_CACHE): %w", err)
		}
		dir = filepath.Join(base, "vmprobes")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	return &cache{dir}, nil
}

func (c *cache) path(parts ...string) string {
	return filepath.Join(append([]string{c.dir}, parts...)...)
}

// mkdir makes a folder in the cache and returns its path.
func (c *cache) mkdir(parts ...string) (string, error) {
	dir := c.path(parts...)
	return dir, os.MkdirAll(dir, 0o755)
}

// built is what a build made for a host.
type built struct {
	Xen        string            // the hypervisor, uncompressed
	Bochs      string            // the emulator of the hvm hosts
	Kernel     string            // dom0's, as an ELF file
	Base       string            // dom0's first file system
	Kernels    map[string]string // archives with the guest kernels, by series
	Versions   map[string]string // of the packages used
	XenVersion string
}

func (b *built) files() []string {
	files := []string{b.Xen, b.Kernel, b.Base}
	if b.Bochs != "" {
		files = append(files, b.Bochs)
	}
	for _, f := range b.Kernels {
		files = append(files, f)
	}
	return files
}

func (c *cache) statePath(host string) string { return c.path("host-" + host + ".json") }

// load returns what was built for a host.
func (c *cache) load(host string) (*built, error) {
	raw, err := os.ReadFile(c.statePath(host))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the %s host is not built: run \"lab build %s\"", host, host)
	} else if err != nil {
		return nil, err
	}
	var b built
	if err := json.Unmarshal(raw, &b); err != nil {
		return nil, fmt.Errorf("%s: %w (run \"lab build %s\" again)", c.statePath(host), err, host)
	}
	for _, f := range b.files() {
		if _, err := os.Stat(f); err != nil {
			return nil, fmt.Errorf("%w (run \"lab build %s\" again)", err, host)
		}
	}
	return &b, nil
}

func (c *cache) store(host string, b *built) error {
	raw, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(c.statePath(host), append(raw, '\n'))
}

// writeFile writes a file so that it is either whole or not there.
func writeFile(path string, data []byte) error {
	return writeWith(path, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

func writeWith(path string, write func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Chmod(f.Name(), 0o644); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// key names a file after what it was made from.
func key(parts ...string) string {
	sum := sha256.New()
	fmt.Fprintln(sum, recipe)
	for _, p := range parts {
		fmt.Fprintf(sum, "%q\n", p)
	}
	return hex.EncodeToString(sum.Sum(nil))[:12]
}

// versionKey is key for packages and their versions.
func versionKey(what string, pkgs []debPackage) string {
	parts := []string{what}
	for _, p := range pkgs {
		parts = append(parts, p.Name+"="+p.Version)
	}
	slices.Sort(parts[1:])
	return key(parts...)
}

// lock takes a lock file and says so if that takes long. The returned function
// gives it back.
func lock(ctx context.Context, path, what string) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o666)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	_ = f.Chmod(0o666) // another user's lab shares it; fails if it is theirs
	for start, told := time.Now(), false; ; time.Sleep(200 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if ctx.Err() != nil {
			_ = f.Close()
			return nil, &exitError{codeLab, fmt.Errorf("interrupted while waiting for %s", what)}
		}
		if !told && time.Since(start) > 2*time.Second {
			told = true
			fmt.Fprintf(os.Stderr, "lab: waiting for %s\n", what)
		}
	}
}

// lockEmulator makes sure that one emulator runs at a time on this machine:
// two of them would only slow each other down beyond every timeout.
func lockEmulator(ctx context.Context) (func(), error) {
	return lock(ctx, filepath.Join(os.TempDir(), "vmprobes-emulator.lock"), "the emulator of another lab")
}
