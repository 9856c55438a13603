package xenaccess_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/paging"
	"github.com/vmprobes/vmprobes/sysmap"
	"github.com/vmprobes/vmprobes/xenaccess"
)

// opened opens a flat image with a kernel in it.
func opened(t *testing.T) (*xenaccess.Guest, *kerneltest.Guest) {
	t.Helper()
	k, err := kerneltest.Load(kerneltest.File(t, "6.1", "vmlinux"))
	require.NoError(t, err)
	g, err := xenaccess.Open(t.Context(), "file:"+k.WriteImage(t), &xenaccess.Options{Config: "-", Cache: "-"})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, g.Close()) })
	return g, k
}

func TestSpaces(t *testing.T) {
	g, k := opened(t)
	assert.Equal(t, "memory", g.Name())
	require.NoError(t, g.Err())
	banner, err := g.Symbol("linux_banner")
	require.NoError(t, err)
	_, err = g.Symbol("no_such_symbol")
	require.ErrorIs(t, err, sysmap.ErrNotFound)

	// One place by all the ways there are.
	tr, err := g.Kernel().Translate(banner)
	require.NoError(t, err)
	phys := uint64(tr.Phys())
	want := k.RAM[phys:]
	for name, c := range map[string]struct {
		s    xenaccess.Space
		addr uint64
	}{
		"kernel":   {g.Kernel(), banner},
		"physical": {g.Physical(), phys},
		"machine":  {g.Machine(), phys},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := c.s.ReadString(c.addr, 4096)
			require.NoError(t, err)
			assert.Equal(t, strings.TrimSpace(k.Symbols.Banner()), strings.TrimSpace(s))
			short, err := c.s.ReadString(c.addr, 5)
			require.ErrorIs(t, err, xenaccess.ErrNoTerminator)
			assert.Equal(t, "Linux", short)
			at, err := c.s.Translate(c.addr)
			require.NoError(t, err)
			assert.Equal(t, tr.Phys(), at.Phys())
			b := make([]byte, 3*paging.PageSize)
			n, err := c.s.Read(c.addr, b)
			require.NoError(t, err)
			assert.Equal(t, len(b), n)
			assert.True(t, bytes.Equal(want[:len(b)], b))
			v8, err := c.s.Uint8(c.addr)
			require.NoError(t, err)
			assert.Equal(t, want[0], v8)
			v16, err := c.s.Uint16(c.addr)
			require.NoError(t, err)
			assert.Equal(t, binary.LittleEndian.Uint16(want), v16)
			v32, err := c.s.Uint32(c.addr)
			require.NoError(t, err)
			assert.Equal(t, binary.LittleEndian.Uint32(want), v32)
			v64, err := c.s.Uint64(c.addr)
			require.NoError(t, err)
			assert.Equal(t, binary.LittleEndian.Uint64(want), v64)
			var st struct {
				A uint16
				B [3]uint32
			}
			require.NoError(t, c.s.Decode(c.addr, &st))
			assert.Equal(t, binary.LittleEndian.Uint16(want), st.A)
			assert.Equal(t, binary.LittleEndian.Uint32(want[10:]), st.B[2])
			words := make([]uint64, 600)
			require.NoError(t, c.s.Decode(c.addr, words))
			assert.Equal(t, binary.LittleEndian.Uint64(want[599*8:]), words[599])
			require.Error(t, c.s.Decode(c.addr, new(string)))
			page, off, release, err := c.s.Page(c.addr)
			require.NoError(t, err)
			assert.EqualValues(t, c.addr%paging.PageSize, off)
			assert.Equal(t, want[0], page[off])
			release()
			_, err = c.s.Write(c.addr, []byte{1})
			require.Error(t, err, "an image is read-only")
		})
	}

	size, err := g.PhysicalSize()
	require.NoError(t, err)
	assert.EqualValues(t, len(k.RAM)+paging.PageSize, size)
	b := make([]byte, 16)
	n, err := g.Physical().Read(size-8, b)
	require.Error(t, err)
	assert.Equal(t, 8, n)
	n, err = g.Physical().Read(1<<64-8, b)
	require.Error(t, err)
	assert.Zero(t, n)
	n, err = g.Kernel().Read(0xffffc90000000000, b)
	require.ErrorIs(t, err, paging.ErrNotMapped)
	assert.Zero(t, n)
	_, err = g.Kernel().Uint64(1 << 62)
	require.ErrorIs(t, err, paging.ErrNonCanonical)
	_, err = g.User(1)
	require.ErrorIs(t, err, linux.ErrNoProcess)
	_, err = g.User(0)
	require.ErrorIs(t, err, linux.ErrNoMemory, "the idle task")
}

// TestProcess reads the memory of a process, in a guest that needs no kernel file.
func TestProcess(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	g, err := xenaccess.Open(t.Context(), "file:"+s.WriteImage(t), &xenaccess.Options{Config: "-", Cache: "-"})
	require.NoError(t, err)
	defer g.Close()
	assert.Equal(t, kerneltest.SyntheticBanner, g.Linux().Banner())
	user, err := g.User(1)
	require.NoError(t, err)
	arg, err := user.ReadString(kerneltest.SyntheticUser+0x100, 64)
	require.NoError(t, err)
	assert.Equal(t, kerneltest.SyntheticArgs[0], arg)
	_, err = user.Uint8(kerneltest.SyntheticUser + paging.PageSize)
	require.ErrorIs(t, err, paging.ErrNotMapped)
	_, err = g.User(2)
	require.ErrorIs(t, err, linux.ErrNoMemory)
	_, err = g.User(99)
	require.ErrorIs(t, err, linux.ErrNoProcess)
	task, err := g.Symbol("init_task")
	require.NoError(t, err)
	pid, err := g.Kernel().Uint32(task + kerneltest.TaskPID)
	require.NoError(t, err)
	assert.Zero(t, pid)
}

// TestLax opens what holds no kernel.
func TestLax(t *testing.T) {
	path := filepath.Join(t.TempDir(), "noise")
	require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte("noise..."), 4096), 0o600))
	_, err := xenaccess.Open(t.Context(), "file:"+path, &xenaccess.Options{Config: "-"})
	require.ErrorIs(t, err, linux.ErrNoKernel)
	g, err := xenaccess.Open(t.Context(), "file:"+path, &xenaccess.Options{Config: "-", Lax: true})
	require.NoError(t, err)
	defer g.Close()
	require.ErrorIs(t, g.Err(), linux.ErrNoKernel)
	assert.Nil(t, g.Linux())
	v, err := g.Physical().Uint64(8)
	require.NoError(t, err)
	assert.Equal(t, "noise...", string(binary.LittleEndian.AppendUint64(nil, v)))
	_, err = g.Kernel().Uint64(0xffffffff81000000)
	require.ErrorIs(t, err, linux.ErrNoKernel)
	_, _, _, err = g.Kernel().Page(0xffffffff81000000)
	require.ErrorIs(t, err, linux.ErrNoKernel)
	_, err = g.Symbol("x")
	require.ErrorIs(t, err, linux.ErrNoKernel)
	_, err = g.User(1)
	require.ErrorIs(t, err, linux.ErrNoKernel)
	_, err = g.Kernel().Translate(0)
	require.ErrorIs(t, err, linux.ErrNoKernel)
}

// TestConfigured takes symbols and types from where a configuration file says.
func TestConfigured(t *testing.T) {
	vmlinux := kerneltest.File(t, "6.1", "vmlinux")
	k, err := kerneltest.Load(vmlinux)
	require.NoError(t, err)
	image := k.WriteImage(t)
	dir := t.TempDir()
	kernel := filepath.Join(dir, "vmlinux")
	require.NoError(t, os.WriteFile(kernel, vmlinux, 0o600))
	stub := filepath.Join(dir, "System.map")
	require.NoError(t, os.WriteFile(stub, []byte("ffffffffffffffff B The real System.map is in the linux-image-6.1-dbg package\n"), 0o600))
	conf := filepath.Join(dir, "xenaccess.conf")
	open := func(text string) (*xenaccess.Guest, error) {
		require.NoError(t, os.WriteFile(conf, []byte(text), 0o600))
		return xenaccess.Open(t.Context(), "file:"+image, &xenaccess.Options{Config: conf, Cache: "-"})
	}
	g, err := open(`memory { ostype = "Linux"; sysmap = "` + kernel + `"; }`)
	require.NoError(t, err)
	assert.Contains(t, g.Linux().Explain()[2].String(), "as given")
	require.NoError(t, g.Close())
	g, err = open(`other { sysmap = "/no/such/file"; }`)
	require.NoError(t, err, "another guest's")
	require.NoError(t, g.Close())
	_, err = open(`memory { sysmap = "` + stub + `"; }`)
	require.ErrorIs(t, err, sysmap.ErrStub)
	_, err = open(`memory { ostype = "Windows"; }`)
	require.ErrorContains(t, err, "only Linux")
	_, err = open(`memory { sysmap = `)
	require.ErrorIs(t, err, xenaccess.ErrConfig)
	_, err = xenaccess.Open(t.Context(), "file:"+image, &xenaccess.Options{Config: filepath.Join(dir, "none"), Cache: "-"})
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = xenaccess.Open(t.Context(), "file:"+image, &xenaccess.Options{Config: "-", Cache: "-", Types: stub})
	require.Error(t, err)
	t.Setenv("VMPROBES_SYMBOLS", kernel)
	g, err = xenaccess.Open(t.Context(), "file:"+image, &xenaccess.Options{Config: "-", Cache: "-"})
	require.NoError(t, err)
	assert.Contains(t, g.Linux().Explain()[2].String(), "as given")
	require.NoError(t, g.Close())
}

// TestSymbolPlaces opens a guest whose kernel has no symbols, and whose System.map
// is here, as in /boot.
func TestSymbolPlaces(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{NoSymbols: true})
	path := s.WriteImage(t)
	opts := &xenaccess.Options{Config: "-", Cache: "-"}
	dir := t.TempDir()
	defer xenaccess.SetSymbolPlaces(dir+"/System.map-%s", dir+"/vmlinuz-%s")()
	_, err := xenaccess.Open(t.Context(), "file:"+path, opts)
	require.ErrorIs(t, err, linux.ErrNoSymbols)
	assert.ErrorContains(t, err, "VMPROBES_SYMBOLS")

	require.NoError(t, os.WriteFile(dir+"/System.map-9.9.9-synthetic", s.SystemMap(), 0o600))
	g, err := xenaccess.Open(t.Context(), "file:"+path, opts)
	require.NoError(t, err)
	defer g.Close()
	at, err := g.Symbol("init_task")
	require.NoError(t, err)
	assert.Equal(t, s.Sym["init_task"], at)
}

// TestWarnings: what is wrong with an image is told, whether a kernel is found or not.
func TestWarnings(t *testing.T) {
	opts := &xenaccess.Options{Config: "-", Cache: "-"}
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	path := s.WriteImage(t)
	whole, err := os.ReadFile(path)
	require.NoError(t, err)
	g, err := xenaccess.Open(t.Context(), "file:"+path, opts)
	require.NoError(t, err)
	assert.Empty(t, g.Warnings())
	require.NoError(t, g.Close())

	require.NoError(t, os.WriteFile(path, append(whole, make([]byte, 100)...), 0o600))
	g, err = xenaccess.Open(t.Context(), "file:"+path, opts)
	require.NoError(t, err)
	require.Len(t, g.Warnings(), 1)
	assert.Contains(t, g.Warnings()[0], "no multiple of a page")
	require.NoError(t, g.Close())

	other := kerneltest.NewSynthetic(kerneltest.Layout{})
	other.SetClock(1800000000)
	ram, cr3 := other.Behind(s.RAM)
	page := make([]byte, paging.PageSize)
	for _, root := range []uint64{s.CR3, cr3} {
		copy(page, fmt.Sprintf("OSRELEASE=1\nSYMBOL(swapper_pg_dir)=%x\nNUMBER(phys_base)=0\n", 0xffffffff80000000+root))
		ram = append(ram, page...)
	}
	require.NoError(t, os.WriteFile(path, ram, 0o600))
	g, err = xenaccess.Open(t.Context(), "file:"+path, opts)
	require.NoError(t, err)
	require.Len(t, g.Warnings(), 1)
	assert.Contains(t, g.Warnings()[0], "1 more in memory")
	require.NoError(t, g.Close())

	require.NoError(t, os.WriteFile(path, make([]byte, 10000), 0o600))
	_, err = xenaccess.Open(t.Context(), "file:"+path, opts)
	require.ErrorIs(t, err, linux.ErrNoKernel)
	assert.ErrorContains(t, err, "no multiple of a page")
}
