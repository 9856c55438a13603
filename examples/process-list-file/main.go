// Process-list-file prints the id and the name of each process in a saved memory
// image: process-list -file.
//
//	process-list-file [-l] file
package main

import "github.com/vmprobes/vmprobes/examples/internal/guest"

func main() { guest.Main(guest.Command{File: true, Run: guest.ListProcesses(guest.Long())}) }
