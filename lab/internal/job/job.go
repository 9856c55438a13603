// Package job is what the lab program and the emulated dom0 agree on: where
// things are in dom0 and what it is asked to run.
package job

// Where things are in dom0.
const (
	// Path of the Job, in JSON.
	Path = "/lab/job.json"
	// Modules has the names of the kernel modules to load, in order.
	Modules = "/lab/modules.list"
	// Kernels has a folder for each guest kernel, named by its series, with
	// the files vmlinux, vmlinuz and release.
	Kernels = "/lab/kernels"
	// GuestImage is the guests' initial root file system.
	GuestImage = "/lab/guest.cpio"
	// WorkDir is where the job runs.
	WorkDir = "/lab/work"
	// XenBin has the Xen programs that are not on the usual path.
	XenBin = "/usr/lib/xen-4.17/bin"
	// GuestLogs matches the guests' console logs.
	GuestLogs = "/var/log/xen/guest-*.log"
)

// EnvHost is the environment variable that names the host in dom0, and that is
// not set anywhere else.
const EnvHost = "VMPROBES_LAB"

// EnvCmdline is the environment variable with what the guests' kernels need on
// their command lines under this emulator.
const EnvCmdline = "VMPROBES_LAB_CMDLINE"

// The hosts.
const (
	PV      = "pv"
	PVStock = "pv-stock"
	HVM     = "hvm"
	HVMAMD  = "hvm-amd"
)

// Hosts returns the names of all hosts.
func Hosts() []string { return []string{PV, PVStock, HVM, HVMAMD} }

// IsA tells whether a host can stand for another one: the AMD host has what the hvm
// host has, on another processor.
func IsA(host, other string) bool {
	return host == other || host == HVMAMD && other == HVM
}

// Job is what dom0 runs once it is up.
type Job struct {
	Host string   // one of the hosts
	Args []string // program and arguments; empty for a shell
	Env  []string // added to the environment
	// Cmdline is for EnvCmdline.
	Cmdline string
	// Collect has patterns of files to send back at the end.
	Collect []string
	// ShellGuest is the name of a guest to start before the shell.
	ShellGuest string
	// Rows and Columns are the size of the terminal of a shell.
	Rows, Columns uint16
}
