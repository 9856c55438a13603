// Package kernels compares what vmprobes reads of every kernel that Debian has with what
// the kernel says itself. "make test-kernels" runs its test, which boots one after the
// other in QEMU and writes docs/kernels.md.
package kernels

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A List is what the mirror of this machine has.
type List struct {
	Packages []Package
	Missing  []Missing
}

// A Package is a kernel.
type Package struct {
	Release string   // as uname -r says: "6.1.0-57-cloud-amd64"
	Arch    string   // Debian's: "amd64" or "i386"
	Version string   // of the package
	Suites  []string // that have it
	Bytes   int64    // to download
	// Names are those of the Debian packages that have the kernel's image and its modules:
	// one, or from 6.19 on two.
	Names []string
}

// A Missing is a suite that the mirror doesn't have, or not all of it.
type Missing struct {
	Suite, Arch, Why string
}

// releaseName matches the releases of the flavours that are tested.
var releaseName = regexp.MustCompile(`^([0-9]+\.[0-9]+)[^-]*(?:-[0-9][^-]*)?-((?:cloud-|rt-)?amd64|(?:rt-)?686(?:-pae)?)$`)

// Known reports whether a release is of a flavour that is tested. Meta packages and those
// for signing are not.
func Known(release string) bool { return releaseName.MatchString(release) }

// Series is that of the release, as "6.1", Flavour the rest, as "cloud-amd64".
func (p Package) Series() string { s, _ := split(p.Release); return s }

// Flavour is how the kernel was configured: "cloud-amd64".
func (p Package) Flavour() string { _, f := split(p.Release); return f }

func split(release string) (series, flavour string) {
	m := releaseName.FindStringSubmatch(release)
	if m == nil {
		return release, ""
	}
	return m[1], m[2]
}

// HasModules reports whether the package of the kernel's modules can be had. Of some
// kernels in several packages the mirror has but the image.
func (p Package) HasModules() bool {
	return slices.ContainsFunc(p.Names, func(n string) bool { return !strings.HasPrefix(n, "linux-binary-") })
}

// Family has the kernels that differ in little: one series, one flavour, one compiler,
// which is that of the Debian it was built for.
func (p Package) Family() string {
	suite := ""
	if len(p.Suites) > 0 {
		suite, _, _ = strings.Cut(p.Suites[0], "-")
	}
	return p.Series() + " " + suite + " " + p.Flavour()
}

// Order sorts kernels so that a run that is ended early has seen most: the newest of each
// family, then the second of each …
func Order(all []Package) []Package {
	families := map[string][]Package{}
	for _, p := range all {
		families[p.Family()] = append(families[p.Family()], p)
	}
	type ranked struct {
		Package
		rank int
	}
	var list []ranked
	for _, f := range families {
		slices.SortFunc(f, func(a, b Package) int {
			return cmp.Or(natural(b.Version, a.Version), strings.Compare(a.Release, b.Release))
		})
		for i, p := range f {
			list = append(list, ranked{p, i})
		}
	}
	slices.SortFunc(list, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), compare(a.Package, b.Package))
	})
	out := make([]Package, len(list))
	for i, r := range list {
		out[i] = r.Package
	}
	return out
}

// compare orders kernels as the table does: by architecture, version and flavour.
func compare(a, b Package) int {
	return cmp.Or(strings.Compare(a.Arch, b.Arch), natural(a.Release, b.Release), natural(a.Version, b.Version))
}

// natural compares two texts, the numbers in them by value.
func natural(a, b string) int {
	for a != "" && b != "" {
		x, y := part(a), part(b)
		a, b = a[len(x):], b[len(y):]
		m, merr := strconv.Atoi(x)
		n, nerr := strconv.Atoi(y)
		c := strings.Compare(x, y)
		if merr == nil && nerr == nil {
			c = cmp.Compare(m, n)
		}
		if c != 0 {
			return c
		}
	}
	return cmp.Compare(len(a), len(b))
}

// part returns the digits that s begins with, or all up to the first digit.
func part(s string) string {
	digit := func(c byte) bool { return c >= '0' && c <= '9' }
	for i := range len(s) {
		if digit(s[i]) != digit(s[0]) {
			return s[:i]
		}
	}
	return s
}
