// Introspect does what the examples of XenAccess and LibVMI do: it lists a guest's
// processes and modules, reads a variable of its kernel, translates an address, and
// dumps where a process has its arguments.
package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"

	"github.com/vmprobes/vmprobes/xenaccess"
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: introspect guest symbol pid")
	}
	pid, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	g, err := xenaccess.Open(context.Background(), os.Args[1], nil)
	if err != nil {
		log.Fatal(err)
	}
	if err := errors.Join(show(g, os.Args[2], pid), g.Close()); err != nil {
		log.Fatal(err)
	}
}

func show(g *xenaccess.Guest, symbol string, pid int) error {
	tasks, err := g.Linux().Processes(false)
	for _, t := range tasks {
		fmt.Printf("[%5d] %q (struct addr:%x)\n", t.PID, t.Comm, t.Addr)
	}
	mods, merr := g.Linux().Modules()
	for _, m := range mods {
		fmt.Printf("%q\n", m.Name)
	}
	addr, serr := g.Symbol(symbol)
	if err := errors.Join(err, merr, serr); err != nil {
		return err
	}
	value, err := g.Kernel().Uint64(addr)
	at, terr := g.Kernel().Translate(addr)
	fmt.Printf("%s at %#x, physical %v: %#x\n", symbol, addr, at.Phys(), value)
	t, perr := g.Linux().Process(pid)
	l, lerr := g.Linux().Layout(t)
	user, uerr := g.User(pid)
	if err := errors.Join(err, terr, perr, lerr, uerr); err != nil {
		return err
	}
	args := make([]byte, min(l.ArgEnd-l.ArgStart, 256))
	n, err := user.Read(l.ArgStart, args)
	fmt.Print(hex.Dump(args[:n]))
	return err
}
