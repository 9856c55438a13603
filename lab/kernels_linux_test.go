package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/lab/kernels"
)

// TestKernelPackages: kernels are put together from what the lists say, those that are in
// one package and those in two, each once.
func TestKernelPackages(t *testing.T) {
	stable, err := kernelStanzas(strings.NewReader(`Package: linux-image-6.1.0-50-amd64
Source: linux-signed-amd64 (6.1.176+1)
Version: 6.1.176-1
Depends: kmod
Size: 70305560

Package: linux-image-6.1.0-50-amd64-unsigned
Version: 6.1.176-1
Size: 70000000

Package: linux-image-6.1.0-50-amd64-dbg
Version: 6.1.176-1
Size: 700000000

Package: linux-image-amd64
Version: 6.1.176-1
Size: 1492

Package: bash
Version: 5.2
Size: 1492000
`), "bookworm")
	require.NoError(t, err)
	security, err := kernelStanzas(strings.NewReader(`Size: 70305560
Version: 6.1.176-1
Package: linux-image-6.1.0-50-amd64
`), "bookworm-security")
	require.NoError(t, err)
	sid, err := kernelStanzas(strings.NewReader(`Package: linux-binary-7.2.13+deb14-rt-amd64
Version: 7.2.13-1
Size: 14175636

Package: linux-image-7.2.13+deb14-rt-amd64
Version: 7.2.13-1
Size: 1932

Package: linux-modules-7.2.13+deb14-rt-amd64
Version: 7.2.13-1
Size: 108005288

Package: linux-image-7.2.12+deb14-rt-amd64
Version: 7.2.12-1
Size: 1932
`), "sid") // of the last the kernel itself isn't there
	require.NoError(t, err)
	got := kernelPackages(append(append(stable, security...), sid...), "amd64")
	assert.Equal(t, []kernels.Package{
		{
			Release: "6.1.0-50-amd64", Arch: "amd64", Version: "6.1.176-1", Suites: []string{"bookworm", "bookworm-security"},
			Bytes: 70305560, Names: []string{"linux-image-6.1.0-50-amd64"},
		},
		{
			Release: "7.2.13+deb14-rt-amd64", Arch: "amd64", Version: "7.2.13-1", Suites: []string{"sid"},
			Bytes: 14175636 + 108005288, Names: []string{"linux-binary-7.2.13+deb14-rt-amd64", "linux-modules-7.2.13+deb14-rt-amd64"},
		},
	}, got)
	_, err = kernelStanzas(strings.NewReader("Package: linux-image-6.1.0-50-amd64\nVersion: 1\nSize: many\n"), "sid")
	require.Error(t, err)
}

// TestWhyMissing: the name of the mirror isn't told.
func TestWhyMissing(t *testing.T) {
	const update = `Err:16 http://m.example/debian bullseye-backports Release
Err:24 http://m.example/debian trixie-updates/main i386 Packages
  File has unexpected size (720 != 1108). Mirror sync in progress?
E: The repository 'http://m.example/debian bullseye-backports Release' does not have a Release file.
`
	assert.Equal(t, "the mirror has no such suite", whyMissing(update, "bullseye-backports"))
	assert.Equal(t, "the mirror's list of packages is not whole", whyMissing(update, "trixie-updates"))
	assert.Equal(t, "the mirror's list of packages is not whole", whyMissing(update, "backports"))
}
