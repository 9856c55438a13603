package main

import (
	"archive/tar"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/lab/internal/job"
)

// TestReleases checks that each host has a release of Xen with guests, that a host of a
// later release needs what its kind needs, and that what is built for one release is
// never taken for another's.
func TestReleases(t *testing.T) {
	images := map[string]guestKernel{}
	for _, host := range job.Hosts() {
		h, r := job.Find(host), releaseOf(host)
		assert.NotEmpty(t, r.kernels(), host)
		assert.True(t, job.IsA(host, h.Kind), host)
		assert.Equal(t, needsBochs(context.Background(), h.Kind), needsBochs(context.Background(), host), host)
		for _, tool := range tools {
			assert.Equal(t, tool.isFor(h.Kind), tool.isFor(host), "%s on %s", tool.pkg, host)
		}
		_, err := hostArg(host)
		assert.NoError(t, err)
		for _, k := range r.guests {
			if other, ok := images[k.image()]; ok {
				assert.Equal(t, other, k, "two kernels with one name")
			}
			images[k.image()] = k
			// Tests without Xen take the newest image whose name begins so.
			assert.Equal(t, k.debian == debian12, strings.HasPrefix(k.image(), "guest-"), k.image())
		}
	}
	for _, r := range releases {
		for _, list := range [][]string{r.userland(), r.programs(), r.libraries(), r.libraryFolders()} {
			for _, other := range releases {
				assert.Equal(t, other.xen == r.xen, strings.Contains(strings.Join(list, " "), other.xen), "%v", list)
			}
		}
	}
	assert.Equal(t, []string{"6.1", "6.12"}, (&qemu{}).defaultKernels(releaseOf("pv").kernels()))
	assert.Equal(t, []string{"6.1"}, newBochs("hvm").defaultKernels(releaseOf("hvm").kernels()))
	assert.Equal(t, []string{"6.12"}, newBochs("hvm-4.20").defaultKernels(releaseOf("hvm-4.20").kernels()))
}

// TestXenArchive checks that a source that was put into the cache is taken for its
// release and for no other, and that what is built changes with it.
func TestXenArchive(t *testing.T) {
	c := &cache{t.TempDir()}
	r := releaseOf("pv-4.20")
	archive, sum, err := c.xenArchive(r)
	require.NoError(t, err)
	assert.Empty(t, archive+sum)

	dir, err := c.mkdir("sources")
	require.NoError(t, err)
	put := func(name, version string) {
		f, err := os.Create(filepath.Join(dir, name))
		require.NoError(t, err)
		w := tar.NewWriter(f)
		makefile := "xenversion:\n\t@echo " + version + "\n"
		require.NoError(t, w.WriteHeader(&tar.Header{Name: "top/xen/Makefile", Mode: 0o644, Size: int64(len(makefile))}))
		_, err = io.WriteString(w, makefile)
		require.NoError(t, err)
		require.NoError(t, w.Close())
		require.NoError(t, f.Close())
	}
	put("xen-4.2.5.tar", "4.2.5")
	put("xen-4.20.3.tar", "4.20.3")
	archive, sum, err = c.xenArchive(r)
	require.NoError(t, err)
	assert.Equal(t, filepath.Join(dir, "xen-4.20.3.tar"), archive)
	version, err := unpackXen(t.Context(), r, archive, filepath.Join(t.TempDir(), "src"))
	require.NoError(t, err)
	assert.Equal(t, "4.20.3", version)

	put("xen-4.20.3.tar", "4.2.0") // another one, named wrongly
	archive, other, err := c.xenArchive(r)
	require.NoError(t, err)
	assert.NotEqual(t, sum, other)
	_, err = unpackXen(t.Context(), r, archive, filepath.Join(t.TempDir(), "src"))
	assert.ErrorContains(t, err, "4.2.0")
	assert.ErrorContains(t, err, archive)
}
