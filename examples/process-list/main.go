// Process-list prints the id and the name of each process of a guest, from the
// idle task on.
//
//	process-list [-file] [-l] guest
package main

import "github.com/vmprobes/vmprobes/examples/internal/guest"

func main() { guest.Main(guest.Command{Run: guest.ListProcesses(guest.Long())}) }
