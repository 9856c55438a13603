package kernels

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Aspects are what is compared, in the order of the table's columns.
var Aspects = []string{"symbols", "module symbols", "modules", "processes", "threads", "command lines", "layout", "hits"}

// A Result is what a run has found of one kernel.
type Result struct {
	Package
	Day     string            // of the run, as 2026-11-30
	QEMU    string            // its version
	Program string            // which code it was
	Earlier bool              // it was another program than the last
	Seconds int               // that it took
	Cells   map[string]string // by aspect, as [Cell] makes them
	// Wrong has a line for each difference between what was read and what the guest said,
	// and for each error.
	Wrong []string
	// Unfetched says why the kernel could not be had, though the mirror lists it.
	Unfetched string
}

// Cells of the table other than counts.
const (
	NotKnown = "not known" // the kernel doesn't tell, and what reads it says so
	NotTried = "–"
	Differs  = "**≠**" // see below the table
)

// cell is the form of a cell.
var cell = regexp.MustCompile(`^(?:[0-9]+|not known|–|\*\*≠\*\*)$`)

// Table renders docs/kernels.md.
func Table(list List, results []Result) string {
	results = slices.Clone(results)
	slices.SortFunc(results, func(a, b Result) int { return compare(a.Package, b.Package) })
	var ran, unfetched []Result
	days, qemus := map[string]bool{}, map[string]bool{}
	for _, r := range results {
		if r.Unfetched != "" {
			unfetched = append(unfetched, r)
			continue
		}
		ran = append(ran, r)
		days[r.Day], qemus[r.QEMU] = true, true
	}
	var b strings.Builder
	b.WriteString(head)
	wrong := 0
	for _, r := range ran {
		if len(r.Wrong) > 0 {
			wrong++
		}
	}
	fmt.Fprintf(&b, "Of %d kernels that the mirror lists %d were run, %s, in QEMU %s: %d exact, %d not.\n\n",
		len(list.Packages), len(ran), strings.Join(sorted(days), ", "), strings.Join(sorted(qemus), ", "), len(ran)-wrong, wrong)
	b.WriteString("| kernel | Debian | " + strings.Join(Aspects, " | ") + " | run |\n")
	b.WriteString(strings.Repeat("|---", 3+len(Aspects)) + "|\n")
	for _, r := range ran {
		b.WriteString(r.row() + "\n")
	}
	if wrong > 0 {
		b.WriteString("\nWhat differs:\n\n")
		for _, r := range ran {
			for _, w := range r.Wrong {
				fmt.Fprintf(&b, "- %s: %s\n", r.Release, w)
			}
		}
	}
	if left := notRun(list, results); len(left) > 0 {
		b.WriteString("\nNot run, though the mirror lists them:\n\n")
		for _, l := range left {
			b.WriteString("- " + l + "\n")
		}
	}
	if len(unfetched)+len(list.Missing) > 0 {
		b.WriteString("\nNot to be had:\n\n")
		for _, m := range list.Missing {
			fmt.Fprintf(&b, "- %s (%s): %s\n", m.Suite, m.Arch, m.Why)
		}
		for _, r := range unfetched {
			fmt.Fprintf(&b, "- %s: %s\n", r.Release, r.Unfetched)
		}
	}
	return b.String()
}

func (r Result) row() string {
	row := []string{r.Release, strings.Join(r.Suites, ", ")}
	for _, a := range Aspects {
		c := r.Cells[a]
		if c == "" {
			c = NotTried
		}
		row = append(row, c)
	}
	run := r.Day
	if r.Earlier {
		run += earlier
	}
	row = append(row, run)
	return "| " + strings.Join(row, " | ") + " |"
}

// notRun sums up the kernels that have no result, by family.
func notRun(list List, results []Result) []string {
	done := map[string]bool{}
	for _, r := range results {
		done[r.Release] = true
	}
	left := map[string]int{}
	for _, p := range list.Packages {
		if !done[p.Release] {
			left[p.Family()]++
		}
	}
	var out []string
	for f, n := range left {
		out = append(out, fmt.Sprintf("%s: %d", f, n))
	}
	slices.SortFunc(out, natural)
	return out
}

func sorted(set map[string]bool) []string {
	var out []string
	for s := range set {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

// ErrForm says that a page isn't one that Table has made.
var ErrForm = errors.New("not the table of kernels")

// Check checks the form of a page that Table has made: its rows, their order and the
// counts above them. It returns the kernels in it.
func Check(page string) (releases []string, err error) {
	rest, ok := strings.CutPrefix(page, head)
	if !ok {
		return nil, fmt.Errorf("%w: it begins otherwise; make test-kernels writes it", ErrForm)
	}
	var listed, ran, exact, not int
	var days string
	line, rest, _ := strings.Cut(rest, "\n")
	m := counts.FindStringSubmatch(line)
	if m == nil {
		return nil, fmt.Errorf("%w: %q", ErrForm, line)
	}
	if _, err := fmt.Sscan(strings.Join([]string{m[1], m[2], m[4], m[5]}, " "), &listed, &ran, &exact, &not); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForm, err)
	}
	days = m[3]
	if ran == 0 || days == "" || exact+not != ran || ran > listed {
		return nil, fmt.Errorf("%w: %q", ErrForm, line)
	}
	var last Package
	wrong := 0
	for line := range strings.Lines(rest) {
		f := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|---") || strings.HasPrefix(line, "| kernel ") {
			continue
		}
		if len(f) != 3+len(Aspects) || !runOn.MatchString(strings.TrimSpace(f[2+len(Aspects)])) {
			return nil, fmt.Errorf("%w: %q", ErrForm, line)
		}
		p := Package{Release: strings.TrimSpace(f[0]), Arch: "i386"}
		if strings.HasSuffix(p.Release, "amd64") {
			p.Arch = "amd64"
		}
		if !Known(p.Release) || last.Release != "" && compare(last, p) >= 0 {
			return nil, fmt.Errorf("%w: %s: not a kernel, or not in order", ErrForm, p.Release)
		}
		bad := false
		for _, c := range f[2 : 2+len(Aspects)] {
			c = strings.TrimSpace(c)
			if !cell.MatchString(c) {
				return nil, fmt.Errorf("%w: %s: a cell with %q", ErrForm, p.Release, c)
			}
			bad = bad || c == Differs
		}
		if bad && !strings.Contains(page, "\n- "+p.Release+": ") {
			return nil, fmt.Errorf("%w: %s: nothing says what differs", ErrForm, p.Release)
		}
		if strings.Contains(page, "\n- "+p.Release+": ") {
			wrong++
		}
		releases = append(releases, p.Release)
		last = p
	}
	if len(releases) != ran || wrong != not {
		return nil, fmt.Errorf("%w: %d rows and %d that differ, above them %q", ErrForm, len(releases), wrong, line)
	}
	return releases, nil
}

// earlier marks a row of another program than the last.
const earlier = ", earlier code"

var runOn = regexp.MustCompile(`^[0-9]{4}-[0-9]{2}-[0-9]{2}(?:` + earlier + `)?$`)

var counts = regexp.MustCompile(`^Of ([0-9]+) kernels that the mirror lists ([0-9]+) were run, ([0-9, -]+), in QEMU [0-9., ]+: ([0-9]+) exact, ([0-9]+) not\.$`)

const head = `# Kernels

` + "`make test-kernels`" + ` wrote this page. It boots each kernel of Debian 11, 12 and 13, of their
backports and of sid that this machine's mirror has, in QEMU (TCG) with one vCPU and KASLR,
and compares what is read from outside with what the guest's own /proc says: live, by the
gdbstub, and in an image that QEMU has dumped. Kernels of flavour 686 run in
qemu-system-i386, all others in qemu-system-x86_64.

A number in the table is how many things were compared, all of which are equal, live and in
the image: lines of /proc/kallsyms, of the kernel and of modules; lines of /proc/modules;
processes, with their parents, users and whether they are zombies; threads; command lines;
and the addresses of the parts of a process's memory, as /proc/PID/stat has them. Hits are
those of a probe at do_sys_openat2 and of one at tun_chr_open in a module, as many as the
guest has made calls. "not known": the kernel doesn't tell, and what reads it says so:
Debian's i386 kernels have no symbols of data and no types, so that of their processes only
ids, names and parents are compared. Probes are not tried on i386. Of some
kernels the mirror has the image and not the modules: "–" stands for these, and only the
first function is probed. Rows of earlier code are of runs before something in it changed.

The processes compared have threads with names such as "a b(c) d" and ones with a newline,
empty and long arguments, another user, a PID namespace of their own; one is a zombie.

`
