package kernelimg

import (
	"encoding/base64"
	"io"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What "xz --check=crc32 --x86 --lzma2=dict=64KiB" makes of some calls and
// jumps, near and far ones and such as overlap.
const (
	branches = "f0VMRugR9f//6OUQAADogfD//+l7VjQS6Ojp2f///1VIieXoAP/oA/T//+gtDAAA6DwJAADpgVY0Eujo6bcAAABVSInl6AD/6MME" +
		"AADo5/n//+h58v//6YdWNBLo6OnHAAAAVUiJ5egA/+hI7v//6GoFAADoKggAAOmNVjQS6Ojp1v7//1VIieXoAP/o+QgAAOiD/f//" +
		"6Bz7///pk1Y0Eujo6Tz///9VSInl6AD/6MgAAADobe7//+jl7f//6ZlWNBLo6Onu/v//VUiJ5egA/+geDwAA6A7t///o3QQAAOmf" +
		"VjQS6Ojpsf///1VIieXoAP/oewcAAOhT7v//6DwOAADppVY0Eujo6bf///9VSInl6AD/6H4IAADoMwwAAOjaDwAA6atWNBLo6OnC" +
		"////VUiJ5egA/+iXAgAA6D77///oePr//+mxVjQS6OjpqgAAAFVIieXoAP/oA////+jY7f//6BoHAADpt1Y0Eujo6Q0BAABVSInl" +
		"6AD/6N7y///oXfj//+hw////6b1WNBLo6OlP////VUiJ5egA/+jCAQAA6IUMAADoewcAAOnDVjQS6Ojp2wAAAFVIieXoAP/onvj/" +
		"/+ji////6Kf+///pyVY0Eujo6dMAAABVSInl6AD/6M4MAADopAUAAOgqEgAA6c9WNBLo6On3/v//VUiJ5egA/+g0CwAA6AH8///o" +
		"VwYAAOnVVjQS6OjpfAAAAFVIieXoAP/oivf//+j2AwAA6JcPAADp21Y0Eujo6VMAAABVSInl6AD/6ADy///ojwgAAOgCDQAA6eFW" +
		"NBLo6OlC////VUiJ5egA/+jy9v//6M8NAADoowUAAOnnVjQS6OjpTwAAAFVIieXoAP/ozwsAAOhc7v//6IEKAADp7VY0Eujo6QD/" +
		"//9VSInl6AD/"
	branchesXZ = "/Td6WFoAAAFpIt42AgEEACEBCADSuXTL4AKrAVddAD+RRYRwahxppf9DExxxcr5zHcNRTzWDSotdVsrFBJvWkDRsB+CXXf/o5miL" +
		"wopZQJKsyQBisENtIVhaWY3YO72iItKU0EyS9Ye0PkrGkhN2md2DEifCjHaHwsBh0qWIQRYXlgxSLKHcaZgMoe0gsZkncpzLo6yb" +
		"rFkHq1lTKmDE5kw3BwH9aXDArjeyVnmIvdep1DGKcVcvYiVl9OWVV2o9wthr4xb7GeT057l+7YuVrW2ww7icDpGLuYBu4TM4XTUZ" +
		"rPSdxsffSxdPlWcimATTXoCRkyA6pmfTSb47zDdfyK1Ss69R9gNPWPFsMzPAE5PCJYoVfTxFcFrAhuevg5R9JHMfNAnw/uQHQ01v" +
		"Io4Ekc8P6MsuAbAKYcXLgJEXEmXWtZkCh9zi/NkCMPJVw2WaY9LCl/cJ6sd1vEMeSXxgrEm6W7QlGhwVNtFjCs1xH3xeQk3njZ8A" +
		"AIdA+c4AAe8CrAUAALxK8V8+MA2LAgAAAAABWVo="
)

func decode(t *testing.T, s string) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(s)
	require.NoError(t, err)
	return b
}

func TestBranchFilter(t *testing.T) {
	want, stream := decode(t, branches), decode(t, branchesXZ)
	got, err := ELF(bootImage(stream, len(want)))
	require.NoError(t, err)
	assert.Equal(t, want, got)
}

func TestBrokenXZ(t *testing.T) {
	stream := decode(t, branchesXZ)
	for _, n := range []int{6, 14, 20, 40} {
		_, err := unxz(stream[:n])
		require.ErrorIs(t, err, io.ErrUnexpectedEOF, "%d bytes", n)
	}
	stream[14] = 0x07 // another branch filter
	_, err := unxz(stream)
	require.ErrorIs(t, err, ErrCompression)
}
