// Command demo is the demonstration, in the lab's dom0: it starts a guest, runs
// vmprobebio on it while the guest opens files, and shows that the guest is
// unharmed.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/vmprobes/vmprobes/internal/console"
	"github.com/vmprobes/vmprobes/lab/labguest"
)

// files are what the guest opens; the last two aren't there.
var files = []string{
	"/proc/version", "/proc/cpuinfo", "/sys/hypervisor/type", "/dev/null", "/init",
	"/proc/self/maps", "/proc/meminfo", "/etc/shadow", "/no/such/file",
}

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatal("demo: ", err)
	}
}

func run() error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	fmt.Printf("This is dom0 of a real Xen (%s). Starting the guest a3guest …\n", labguest.Host())
	g, err := labguest.Start(ctx, labguest.Config{Name: "a3guest", VCPUs: 2})
	if err != nil {
		return err
	}
	defer g.Destroy()
	fmt.Printf("It is up: %s.\n\n", strings.TrimSpace(g.Ready()))
	if _, err := g.Command(ctx, "textkeep"); err != nil {
		return err
	}

	fmt.Printf("# vmprobebio -n %d a3guest\n", len(files))
	cmd := exec.Command("/bin/vmprobebio", "-n", fmt.Sprint(len(files)), "a3guest")
	cmd.Stderr = os.Stderr
	ready := make(chan struct{})
	cmd.Stdout = &watcher{ready: ready}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case <-ready:
	case err := <-done:
		return fmt.Errorf("vmprobebio ended early: %v", err)
	}
	for _, f := range files {
		if _, err := g.Command(ctx, "openpath "+f); err != nil {
			return err
		}
	}
	if err := <-done; err != nil {
		return fmt.Errorf("vmprobebio: %w", err)
	}

	own, err := console.SameText(ctx, g.Output)
	if err != nil {
		return err
	}
	check, err := g.Command(ctx, "check")
	if err != nil {
		return err
	}
	dmesg, err := g.Command(ctx, "dmesg")
	if err != nil {
		return err
	}
	text := "every byte of its kernel text is as before"
	if len(own) > 0 {
		text = fmt.Sprintf("its kernel text is as before, but for %d places that it switched over itself", len(own))
	}
	fmt.Printf("\nThe guest is unharmed: %s,\n%s; %s.\n", text, check, dmesg)
	fmt.Println("\nNext: make lab-shell gives you this dom0; examples/ has the programs; make test runs everything.")
	return nil
}

// watcher copies output and tells when the first line is through.
type watcher struct{ ready chan struct{} }

func (w *watcher) Write(b []byte) (int, error) {
	if w.ready != nil && strings.Contains(string(b), "registered") {
		close(w.ready)
		w.ready = nil
	}
	return os.Stdout.Write(b)
}
