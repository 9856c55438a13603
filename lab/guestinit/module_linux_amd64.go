package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// loadModules loads the kernel modules that came with the archive, so that the
// guest has some.
func loadModules() {
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err == nil {
			err = unix.InitModule(b, "")
		}
		if err != nil {
			say("ERR %s: %v", file, err)
		}
	}
}

// reloadModules takes the modules but those of so many files out of the kernel and loads
// them again, n times.
func reloadModules(n uint64, stay int) (string, error) {
	files, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return "", err
	}
	files = files[min(stay, len(files)):]
	for range n {
		for _, file := range files {
			name := strings.TrimSuffix(filepath.Base(file), ".ko")
			if err := unix.DeleteModule(name, unix.O_NONBLOCK); err != nil {
				return "", fmt.Errorf("unload %s: %w", name, err)
			}
		}
		for _, file := range files {
			f, err := os.Open(file)
			if err == nil {
				err = unix.FinitModule(int(f.Fd()), "", 0)
				_ = f.Close()
			}
			if err != nil {
				return "", fmt.Errorf("load %s: %w", file, err)
			}
		}
	}
	return fmt.Sprintf("reload modules=%d times=%d", len(files), n), nil
}

// kallsymsHash hashes the lines of /proc/kallsyms, without what isn't of a loaded
// module: BPF programs and what the kernel makes for its own tracing.
func kallsymsHash() (string, error) {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	kernel, modules := sha256.New(), sha256.New()
	var kernelLines, moduleLines int
	in := bufio.NewScanner(f)
	for in.Scan() {
		line := append(in.Bytes(), '\n')
		_, module, found := bytes.Cut(line, []byte("\t["))
		switch {
		case !found:
			kernelLines++
			kernel.Write(line)
		case !bytes.HasPrefix(module, []byte("bpf]")) && !bytes.HasPrefix(module, []byte("__builtin__")):
			moduleLines++
			modules.Write(line)
		}
	}
	if err := in.Err(); err != nil {
		return "", err
	}
	return fmt.Sprintf("kallsymshash kernel=%x:%d modules=%x:%d", kernel.Sum(nil), kernelLines, modules.Sum(nil), moduleLines), nil
}
