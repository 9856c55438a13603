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
	// GuestLogs matches the guests' console logs.
	GuestLogs = "/var/log/xen/guest-*.log"
)

// EnvHost is the environment variable that names the host in dom0, and that is
// not set anywhere else.
const EnvHost = "VMPROBES_LAB"

// EnvCmdline is the environment variable with what the guests' kernels need on
// their command lines under this emulator.
const EnvCmdline = "VMPROBES_LAB_CMDLINE"

// The hosts of Debian 12's Xen. Each is a kind of host, too: those of other releases are
// of one of these kinds.
const (
	PV      = "pv"
	PVStock = "pv-stock"
	HVM     = "hvm"
	HVMAMD  = "hvm-amd"
)

// Host is a kind of host with a release of Xen.
type Host struct {
	Name string
	Kind string // PV, PVStock, HVM or HVMAMD
	Xen  string // the release, such as "4.17"
}

var hosts = []Host{
	{PV, PV, "4.17"},
	{PVStock, PVStock, "4.17"},
	{HVM, HVM, "4.17"},
	{HVMAMD, HVMAMD, "4.17"},
	{"pv-stock-4.20", PVStock, "4.20"},
	{"hvm-4.20", HVM, "4.20"},
	{"pv-4.20", PV, "4.20"}, // last: its source is the hardest to come by
}

// Hosts returns the names of all hosts.
func Hosts() []string {
	var names []string
	for _, h := range hosts {
		names = append(names, h.Name)
	}
	return names
}

// Find returns the host of that name, or the zero Host if there is none.
func Find(name string) Host {
	for _, h := range hosts {
		if h.Name == name {
			return h
		}
	}
	return Host{}
}

// XenBin returns where the programs of a release of Xen are that are not on the usual
// path.
func XenBin(release string) string { return "/usr/lib/xen-" + release + "/bin" }

// IsA tells whether a host can stand for another one: each for one of its kind with an
// earlier Xen, and the AMD host, which has what the hvm host has, on another processor.
func IsA(host, other string) bool {
	kind := Find(host).Kind
	return host == other || kind != "" && kind == other || kind == HVMAMD && other == HVM
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
