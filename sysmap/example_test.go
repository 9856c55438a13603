package sysmap_test

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vmprobes/vmprobes/sysmap"
)

const kallsyms = `ffffffff81000000 T _text
ffffffff8134a350 t do_sys_openat2
ffffffff8134a9e0 T __x64_sys_open
ffffffff81e01ef2 T _etext
`

func Example() {
	m, err := sysmap.Parse(strings.NewReader(kallsyms))
	if err != nil {
		fmt.Println(err)
		return
	}
	m = m.Slide(0x1e000000) // KASLR

	if _, err := m.Lookup("sys_open"); errors.Is(err, sysmap.ErrNotFound) {
		fmt.Println(err)
		fmt.Println("try:", strings.Join(m.Suggest("sys_open"), ", "))
	}
	if sym, off, ok := m.Find(0xffffffff9f34a354); ok {
		fmt.Printf("%s+%#x\n", sym.Name, off)
	}
	// Output:
	// "sys_open": symbol not found
	// try: __x64_sys_open, do_sys_openat2
	// do_sys_openat2+0x4
}
