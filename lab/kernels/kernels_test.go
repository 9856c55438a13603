package kernels

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestOrder(t *testing.T) {
	var all []Package
	for _, p := range []Package{
		{Release: "6.1.0-50-686-pae", Arch: "i386", Version: "6.1.176-1", Suites: []string{"bookworm"}},
		{Release: "6.1.0-9-amd64", Arch: "amd64", Version: "6.1.9-1", Suites: []string{"bookworm"}},
		{Release: "6.1.0-50-amd64", Arch: "amd64", Version: "6.1.176-1", Suites: []string{"bookworm", "bookworm-security"}},
		{Release: "6.1.0-57-amd64", Arch: "amd64", Version: "6.1.192-3", Suites: []string{"bookworm-security"}},
		{Release: "6.1.0-0.deb11.52-rt-amd64", Arch: "amd64", Version: "6.1.180-1~deb11u1", Suites: []string{"bullseye-security"}},
		{Release: "6.12.90+deb13.1-cloud-amd64", Arch: "amd64", Version: "6.12.90-2", Suites: []string{"trixie-security"}},
	} {
		assert.True(t, Known(p.Release), p.Release)
		all = append(all, p)
	}
	for _, r := range []string{"amd64", "6.1-amd64-signed-template", "6.1.0-57-amd64-unsigned", "6.1.0-57-amd64-dbg", "6.1.0-57-arm64"} {
		assert.False(t, Known(r), r)
	}
	assert.Equal(t, "6.12 trixie cloud-amd64", all[5].Family())
	assert.Equal(t, "6.1 bullseye rt-amd64", all[4].Family())
	var got []string
	for _, p := range Order(all) {
		got = append(got, p.Release)
	}
	assert.Equal(t, []string{
		"6.1.0-0.deb11.52-rt-amd64", "6.1.0-57-amd64", "6.12.90+deb13.1-cloud-amd64", "6.1.0-50-686-pae", // the newest of each family
		"6.1.0-50-amd64", "6.1.0-9-amd64",
	}, got)
}

// TestTable: what is rendered has the right form, and what has been changed by hand hasn't.
func TestTable(t *testing.T) {
	p := Package{Release: "6.1.0-57-amd64", Arch: "amd64", Version: "6.1.192-3", Suites: []string{"bookworm-security"}}
	q := Package{Release: "6.1.0-50-686", Arch: "i386", Version: "6.1.176-1", Suites: []string{"bookworm"}}
	left := Package{Release: "6.1.0-47-686", Arch: "i386", Version: "6.1.170-3", Suites: []string{"bookworm"}}
	list := List{Packages: []Package{q, p, left}, Missing: []Missing{{"sid", "i386", "the mirror has no such suite"}}}
	good := Result{Package: p, Day: "2026-11-30", QEMU: "7.2.22", Cells: map[string]string{}}
	for i, a := range Aspects {
		good.Cells[a] = strconv.Itoa(i + 1)
	}
	bad := Result{Package: q, Day: "2026-11-29", Earlier: true, QEMU: "7.2.22", Cells: map[string]string{"symbols": Differs, "layout": NotKnown}, Wrong: []string{"symbols, live: 1 said but not read"}}
	text := Table(list, []Result{bad, good})
	for _, line := range []string{
		"Of 3 kernels that the mirror lists 2 were run, 2026-11-29, 2026-11-30, in QEMU 7.2.22: 1 exact, 1 not.",
		"| 6.1.0-57-amd64 | bookworm-security | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 2026-11-30 |",
		"| 6.1.0-50-686 | bookworm | **≠** | – | – | – | – | – | not known | – | 2026-11-29, earlier code |",
		"- 6.1.0-50-686: symbols, live: 1 said but not read",
		"- 6.1 bookworm 686: 1",
		"- sid (i386): the mirror has no such suite",
	} {
		assert.Contains(t, text, line+"\n")
	}
	releases, err := Check(text)
	require.NoError(t, err)
	assert.Equal(t, []string{p.Release, q.Release}, releases)
	for _, c := range []struct{ old, new string }{
		{"1 exact, 1 not", "2 exact, 0 not"},
		{"2 were run", "3 were run"},
		{"| 1 | 2 |", "| about 1 | 2 |"},
		{"| 1 | 2 |", "| 2 |"},
		{"- 6.1.0-50-686: symbols, live", "- nothing"},
		{"| 6.1.0-57-amd64 |", "| 6.1 |"},
		{"2026-11-29, earlier code |", "yesterday |"},
		{"# Kernels", "# kernels"},
	} {
		require.Contains(t, text, c.old)
		_, err := Check(strings.ReplaceAll(text, c.old, c.new))
		require.ErrorIs(t, err, ErrForm, c.new)
	}
}

// TestPage checks the form of the page that a run has written.
func TestPage(t *testing.T) {
	b, err := os.ReadFile("../../docs/kernels.md")
	require.NoError(t, err)
	releases, err := Check(string(b))
	require.NoError(t, err)
	assert.NotEmpty(t, releases)
}
