// Package guardian has a second process of the same program look after the guests of the
// first: when that one dies, however it does, the guardian repairs what it has left in
// them.
//
// Importing the package is enough for a program to be able to be its own guardian: its
// init function, which does nothing else, takes over a process that [Start] has made. It
// runs before main, and before the init functions of the packages that import it.
package guardian

import "errors"

// environment tells the init function that this process is a guardian: of the process
// with this number and start time.
const environment = "VMPROBES_GUARDIAN_OF"

// between tells it that this process is to start the guardian, and to end.
const between = "VMPROBES_GUARDIAN_START"

// ErrNoGuardian: a guardian could not be started, so a death of this process would leave
// guests standing still until the next Open repairs them.
var ErrNoGuardian = errors.New("can't start the process that repairs guests should this one be killed")
