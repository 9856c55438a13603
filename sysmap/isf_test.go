package sysmap

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// An ISF file with the symbols of three functions and linux_banner.
var isf = ` {"metadata": {"format": "6.2.0"}, "user_types": {"x": {"size": 1, "kind": "struct", "fields": {}}},
	"symbols": {"_text": {"address": 18446744071578845184}, "_stext": {"address": 18446744071578845184},
	"vfs_read": {"address": 18446744071578845440, "type": {"kind": "base", "name": "void"}}, "not a name": {"address": 1},
	"_etext": {"address": 18446744071578849280}, "init_task": {"address": 18446744071578849296},
	"linux_banner": {"address": 18446744071578849792, "constant_data": "` +
	base64.StdEncoding.EncodeToString([]byte("Linux version 6.1.0 (me@here) #1 SMP\n\x00")) + `"}}}`

func TestISF(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, err := z.Write([]byte(isf))
	require.NoError(t, err)
	require.NoError(t, z.Close())
	for name, data := range map[string][]byte{"plain.json": []byte(isf), "packed.json.gz": packed.Bytes()} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, data, 0o600))
		m, err := ParseFile(path)
		require.NoError(t, err, name)
		assert.Equal(t, 6, m.Len())
		assert.Equal(t, "Linux version 6.1.0 (me@here) #1 SMP", m.Banner())
		s, err := m.Lookup("vfs_read")
		require.NoError(t, err)
		assert.Equal(t, Symbol{Addr: 0xffffffff81000100, Type: 't', Name: "vfs_read"}, s)
		s, err = m.Lookup("init_task")
		require.NoError(t, err)
		assert.Equal(t, Symbol{Addr: 0xffffffff81001010, Type: 'd', Name: "init_task"}, s)
	}
	for name, bad := range map[string]string{
		"cut": isf[:100], "none": `{"symbols": {}}`, "empty": "{}", "array": "[]", "names": `{"symbols": {"a b": {"address": 1}}}`,
		"negative": `{"symbols": {"a": {"address": -1}}}`, "fraction": `{"symbols": {"a": {"address": 1.5}}}`,
		"large": `{"symbols": {"a": {"address": 18446744073709551616}}}`, "no address": `{"symbols": {"a": {}}}`, "text": `{"symbols": {"a": {"address": "x"}}}`,
		"long": `{"symbols": {"` + strings.Repeat("a", 2000) + `": {"address": 1}}}`,
	} {
		_, err := FromISF(strings.NewReader(bad))
		require.ErrorIs(t, err, ErrFormat, name)
	}
}

func FuzzISF(f *testing.F) {
	f.Add([]byte(isf))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := FromISF(bytes.NewReader(data))
		if err != nil {
			require.ErrorIs(t, err, ErrFormat)
			return
		}
		for s := range m.All() {
			_, _ = m.Lookup(s.Name)
			m.Find(s.Addr)
		}
	})
}
