//go:build linux

package recovery_test

import (
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/breakpoint"
	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/recovery"
	"github.com/vmprobes/vmprobes/internal/xen"
	"github.com/vmprobes/vmprobes/internal/xentest"
	"github.com/vmprobes/vmprobes/xenctrl"
)

// TestLayout: a journal is of use only to a program that lays the state out as its owner
// did, and only for the vCPUs that it is for. Nothing is done to the guest by another.
func TestLayout(t *testing.T) {
	// headers of the state: the checksum of its layout, and a number of vCPUs.
	const state = 4096
	for name, c := range map[string]struct {
		damage func(b []byte)
		log    bool
		err    error
	}{
		"the owner's version":   {func([]byte) {}, true, nil},
		"another version":       {func(b []byte) { b[state]++ }, true, journal.ErrUnreadable},
		"other vCPUs":           {func(b []byte) { binary.LittleEndian.PutUint32(b[state+4:], 1) }, true, journal.ErrUnreadable},
		"no vCPUs":              {func(b []byte) { binary.LittleEndian.PutUint32(b[state+4:], 0) }, true, journal.ErrUnreadable},
		"many vCPUs":            {func(b []byte) { binary.LittleEndian.PutUint32(b[state+4:], xenctrl.MaxVCPUs) }, true, journal.ErrUnreadable},
		"it had not attached":   {func(b []byte) { clear(b[state:]) }, false, nil},
		"version 0, with a log": {func(b []byte) { binary.LittleEndian.PutUint32(b[state:], 0) }, true, journal.ErrUnreadable},
	} {
		t.Run(name, func(t *testing.T) {
			m := xentest.New(xentest.Config{Kind: xentest.PV, GDBSX: true, VCPUs: 2, Seed: 1})
			hv := m.Hypervisor()
			info, err := hv.Info()
			require.NoError(t, err)
			dir := filepath.Join(t.TempDir(), "vmprobes")
			l, err := recovery.Create(dir, "domain-1", recovery.Identity("a3guest", "", info), 2, xen.StateSize(2))
			require.NoError(t, err)
			if c.log {
				_, err = l.Break(breakpoint.LeftBreak{Addr: m.Insns()[0].VA, Insn: []byte{0x90}}, nil)
				require.NoError(t, err)
			}
			require.NoError(t, l.Close())
			path := journal.Path(dir, "domain-1")
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			c.damage(b)
			require.NoError(t, os.WriteFile(path, b, 0o600))
			f, err := journal.Open(path)
			require.NoError(t, err)
			before := m.Text()
			_, err = recovery.Repair(t.Context(), hv, f, slog.New(slog.DiscardHandler))
			assert.Equal(t, before, m.Text())
			if c.err != nil {
				require.ErrorIs(t, err, c.err)
				assert.FileExists(t, path)
				assert.Zero(t, m.Pauses())
				return
			}
			require.NoError(t, err)
			assert.NoFileExists(t, path)
		})
	}
}
