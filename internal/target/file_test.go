package target

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/image"
	"github.com/vmprobes/vmprobes/paging"
)

func TestParseFile(t *testing.T) {
	for in, want := range map[string]struct {
		path string
		opts image.Options
		bad  bool
	}{
		"/x/mem":                  {path: "/x/mem"},
		"/x/mem?raw":              {path: "/x/mem", opts: image.Options{Raw: true}},
		"/x/mem?hole=q35":         {path: "/x/mem", opts: image.Options{RawHole: image.HoleQ35}},
		"/x/mem?raw&hole=pc":      {path: "/x/mem", opts: image.Options{Raw: true, RawHole: image.HolePC}},
		"/x/mem?hole=0xd0000000":  {path: "/x/mem", opts: image.Options{RawHole: image.Hole{Limit: 0xd0000000, Start: 0xd0000000}}},
		"/x/mem?skip=512&hole=pc": {path: "/x/mem", opts: image.Options{RawSkip: 512, RawHole: image.HolePC}},
		"/x/mem?hole=0xd0000001":  {bad: true},
		"/x/mem?hole=0x100000000": {bad: true},
		"/x/mem?hole=0":           {bad: true},
		"/x/mem?skip=-1":          {bad: true},
		"/x/mem?hole=microvm":     {bad: true},
		"/x/mem?raw&somewhere":    {bad: true},
	} {
		path, opts, err := parseFile(in)
		if want.bad {
			assert.Error(t, err, in)
			continue
		}
		require.NoError(t, err, in)
		assert.Equal(t, want.path, path)
		assert.Equal(t, want.opts, *opts)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mem")
	b := make([]byte, 8*paging.PageSize)
	b[5*paging.PageSize] = 42
	require.NoError(t, os.WriteFile(path, b, 0o600))
	g, err := Open(t.Context(), "file:"+path)
	require.NoError(t, err)
	defer g.Close()
	assert.Equal(t, "mem", g.Info().Name)
	n, err := g.(Sized).PhysicalPages()
	require.NoError(t, err)
	assert.EqualValues(t, 8, n)
	page, release, err := g.Page(5, false)
	require.NoError(t, err)
	assert.EqualValues(t, 42, page[0])
	release()
	_, err = g.Attach(t.Context(), Setup{})
	assert.ErrorIs(t, err, ErrImage)

	_, err = Open(t.Context(), "")
	require.ErrorIs(t, err, ErrNoName)
	_, err = Open(t.Context(), "file:")
	require.ErrorIs(t, err, ErrNoName)
	_, err = Open(t.Context(), "file:/no/such/file")
	require.ErrorIs(t, err, os.ErrNotExist)
}
