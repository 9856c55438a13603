package xenaccess_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"strings"

	"github.com/vmprobes/vmprobes/xenaccess"
)

func ExampleParseConfig() {
	var c *xenaccess.Config
	c, err := xenaccess.ParseConfig(strings.NewReader(`
a3guest {
    ostype = "linux";
    sysmap = "/boot/System.map-2.6.18-xen";
    linux_tasks = 0x60;
    colour = blue;
}`))
	var where *xenaccess.SyntaxError
	if errors.As(err, &where) {
		log.Fatalf("line %d: %s", where.Line, where.Msg)
	}
	var d xenaccess.DomainConfig
	d, _ = c.Domain("a3guest")
	fmt.Println(d.OSType, d.Sysmap, d.Rekall == "", d.Offsets["linux_tasks"])
	fmt.Println(c.Warnings())
	// Output:
	// Linux /boot/System.map-2.6.18-xen true 96
	// [configuration:6:5: key "colour" is not known]
}

// A variable of the kernel, and what a process has at an address.
func ExampleOpen() {
	if _, err := xenaccess.LoadConfig("/etc/xenaccess.conf"); errors.Is(err, xenaccess.ErrConfig) {
		log.Fatal(err)
	}
	g, err := xenaccess.Open(context.Background(), "file:/var/crash/a3guest.core", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer g.Close()
	at, err := g.Symbol("saved_command_line")
	if err != nil {
		log.Fatal(err)
	}
	pointer, err := g.Kernel().Uint64(at)
	if err != nil {
		log.Fatal(err)
	}
	line, err := g.Kernel().ReadString(pointer, 4096)
	fmt.Printf("%q %v\n", line, err)
	first := make([]byte, 16)
	if _, err := g.Physical().Read(0, first); errors.Is(err, xenaccess.ErrNoPhysical) {
		log.Print("a PV guest, of which not enough is known")
	}
	user, err := g.User(1)
	if err != nil {
		log.Fatal(err)
	}
	_, err = user.Read(0x400000, first)
	fmt.Printf("% x %v\n", first, err)
}
