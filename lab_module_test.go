package vmprobes_test

import (
	"bytes"
	"debug/elf"
	encbin "encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes"
	"github.com/vmprobes/vmprobes/internal/cpio"
	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/lab/labguest"
	"github.com/vmprobes/vmprobes/linux"
	"github.com/vmprobes/vmprobes/sysmap"
)

// moduleFile is the file of a module that the guest has loaded: the oracle of what is
// read of it in memory.
type moduleFile struct {
	*elf.File
	symbols []elf.Symbol
	base    map[elf.SectionIndex]uint64 // where sections are in the guest
}

// moduleFiles returns those of the guest's modules, by their names.
func moduleFiles(t labTest, k *linux.Kernel) map[string]*moduleFile {
	var archive []byte
	if labguest.Host() != "" {
		var err error
		archive, err = os.ReadFile(filepath.Join(filepath.Dir(t.g.KernelPath()), "modules.cpio"))
		require.NoError(t, err)
	} else {
		archive = kerneltest.File(t, t.cfg.Kernel, "modules.cpio")
	}
	loaded, err := k.ModuleSymbols()
	require.NoError(t, err)
	mods, err := k.Modules()
	require.NoError(t, err)
	found := make(map[string]*moduleFile)
	for _, m := range mods {
		r, err := cpio.Open(bytes.NewReader(archive), "modules/"+m.Name+".ko")
		require.NoError(t, err, m.Name)
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		f, err := elf.NewFile(bytes.NewReader(b))
		require.NoError(t, err)
		syms, err := f.Symbols()
		require.NoError(t, err)
		file := &moduleFile{f, syms, make(map[elf.SectionIndex]uint64)}
		// A function of a name that there is once tells where its section is.
		for _, s := range syms {
			if elf.ST_TYPE(s.Info) != elf.STT_FUNC || int(s.Section) >= len(f.Sections) {
				continue
			}
			same := func(l sysmap.Symbol) bool { return l.Module == m.Name && l.Name == s.Name }
			i := slices.IndexFunc(loaded, same)
			if i < 0 || slices.IndexFunc(loaded[i+1:], same) >= 0 ||
				slices.IndexFunc(syms, func(o elf.Symbol) bool { return o.Name == s.Name && o != s }) >= 0 {
				continue
			}
			at := loaded[i].Addr - s.Value
			if have, ok := file.base[s.Section]; ok {
				require.Equal(t, have, at, "%s of %s", s.Name, m.Name)
			}
			file.base[s.Section] = at
		}
		found[m.Name] = file
	}
	return found
}

// sites returns where a table of entries leads to by its relocations, those at the
// beginning of each entry, and how many there are in sections that the guest hasn't
// any more.
func (f *moduleFile) sites(t testing.TB, table string, entry uint64) (sites []uint64, gone int) {
	s := f.Section(".rela" + table)
	if s == nil {
		return nil, 0
	}
	b, err := s.Data()
	require.NoError(t, err)
	for ; len(b) >= 24; b = b[24:] { // Elf64_Rela
		le := encbin.LittleEndian
		off, info, addend := le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:])
		if off%entry != 0 {
			continue
		}
		sym := f.symbols[info>>32-1] // Symbols leaves the first one out
		base, ok := f.base[sym.Section]
		if !ok {
			gone++
			continue
		}
		sites = append(sites, base+sym.Value+addend)
	}
	return sites, gone
}

// testModules compares what is known of places in modules with the modules' files:
// every jump label, static call and blacklisted function is refused, every expected
// fault is known, and beside ftrace there is a place.
func testModules(t labTest) {
	s := t.open(nil)
	k := s.Guest().Linux()
	files := moduleFiles(t, k)
	require.NotEmpty(t, files)
	refused := func(addr uint64, what string) {
		t.Helper()
		err := s.Register(&vmprobes.Probe{Addr: vmprobes.Addr(addr)})
		require.ErrorIs(t, err, vmprobes.ErrNotProbeable, "%#x", addr)
		require.NotErrorIs(t, err, linux.ErrUnknownPlaces)
		require.ErrorContains(t, err, what)
	}
	mods, err := k.Modules()
	require.NoError(t, err)
	types, err := k.Types()
	require.NoError(t, err)
	for _, m := range mods {
		name, f := m.Name, files[m.Name]
		jumps, gone := f.sites(t, "__jump_table", 16)
		n, err := types.At(k, "module", m.Addr).Field("num_jump_entries").Uint()
		require.NoError(t, err)
		require.EqualValues(t, len(jumps)+gone, n)
		for _, a := range jumps {
			refused(a, "jump label")
		}
		calls, gone2 := f.sites(t, ".static_call_sites", 8)
		for _, a := range calls {
			refused(a, "static call")
		}
		faults, gone3 := f.sites(t, "__ex_table", 12)
		for _, a := range faults {
			assert.True(t, k.ExpectedFault(a), "%#x", a)
		}
		traced, gone4 := f.sites(t, "__mcount_loc", 8)
		possible := 0
		for _, a := range traced {
			_, ok := k.FtraceSite(a)
			require.True(t, ok, "%#x", a)
			require.False(t, k.ExpectedFault(a))
			at, err := k.ProbePoint(a)
			if err != nil {
				require.ErrorIs(t, err, vmprobes.ErrNotProbeable)
				require.NotErrorIs(t, err, linux.ErrUnknownPlaces)
				continue
			}
			require.Equal(t, a+5, at)
			require.False(t, slices.Contains(jumps, at) || slices.Contains(calls, at))
			if possible++; possible < 3 {
				p := &vmprobes.Probe{Addr: vmprobes.Addr(at)}
				require.NoError(t, s.Register(p))
				require.NoError(t, s.Unregister(p))
			}
		}
		t.Logf("%s: %d jump labels, %d static calls, %d expected faults, %d functions that are traced, %d of which can be probed; %d are gone",
			name, len(jumps), len(calls), len(faults), len(traced), possible, gone+gone2+gone3+gone4)
		if len(traced) > 0 {
			assert.Greater(t, possible, len(traced)*9/10, name)
		}
		if name == "tun" {
			assert.NotEmpty(t, jumps)
			assert.NotEmpty(t, traced)
		}
	}

	// The kernel's own list of what kprobes must not touch.
	head, err := s.Lookup("kprobe_blacklist")
	require.NoError(t, err)
	n := 0
	for at, err := range types.List(k, uint64(head), "kprobe_blacklist_entry", "list", 1<<14) {
		require.NoError(t, err)
		start, err := types.At(k, "kprobe_blacklist_entry", at).Field("start_addr").Uint()
		require.NoError(t, err)
		require.ErrorIs(t, k.Blacklisted(start), vmprobes.ErrNotProbeable, fmt.Sprintf("%#x", start))
		n++
	}
	t.Logf("%d entries on the blacklist", n)
	assert.Greater(t, n, 300)
}

// testBeside compares executions of functions' first instructions with those of the
// places that stand for them.
func testBeside(t labTest) {
	s := t.open(nil)
	k := s.Guest().Linux()
	type pair struct{ first, beside *vmprobes.Probe }
	pairs := make(map[string]pair)
	for _, name := range onThePath[:8] {
		sym, err := k.Symbols().Lookup(name)
		if err != nil {
			continue // inlined in this kernel
		}
		at, err := k.ProbePoint(sym.Addr)
		if err != nil {
			require.ErrorIs(t, err, vmprobes.ErrNotProbeable)
			t.Log(err)
			continue
		}
		p := pair{&vmprobes.Probe{Addr: vmprobes.Addr(sym.Addr)}, &vmprobes.Probe{Addr: vmprobes.Addr(at)}}
		require.NoError(t, s.Register(p.first, p.beside), name)
		pairs[name] = p
	}
	require.Contains(t, pairs, probed)
	var reply string
	serve(t, s, func() { reply = t.ask("open 20 0") })
	executed := 0
	for name, p := range pairs {
		assert.Equal(t, p.first.Stats(), p.beside.Stats(), name)
		if p.first.Stats().Hits > 0 {
			executed++
		}
		t.Logf("%s: %d at %v and at %v", name, p.first.Stats().Hits, p.first.Address(), p.beside.Address())
	}
	assert.Greater(t, executed, 3)
	assert.Equal(t, number(t, reply, "total"), pairs[probed].beside.Stats().Hits)
}
