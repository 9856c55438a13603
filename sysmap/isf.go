package sysmap

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"slices"
	"strconv"
)

// maxISF bounds the bytes of an unpacked symbol file of Volatility. Those of kernels have
// 20 to 60 MB.
const maxISF = 1 << 28

// FromISF reads the symbols of an Intermediate Symbol File of Volatility 3 (schema 6),
// as dwarf2json makes it: JSON. Such a file has one address of each name, whatever the
// kernel has, and doesn't say what a symbol is of: what is between _stext and _etext is
// taken for functions.
func FromISF(r io.Reader) (*Map, error) {
	var f struct {
		Symbols map[string]struct {
			Address json.Number `json:"address"`
			Data    string      `json:"constant_data"` // base64
		} `json:"symbols"`
	}
	l := &io.LimitedReader{R: r, N: maxISF}
	if err := json.NewDecoder(l).Decode(&f); err != nil {
		if l.N <= 0 {
			return nil, formatErr("symbol file of more than %d bytes", maxISF)
		}
		return nil, formatErr("symbol file: %v", err)
	}
	if len(f.Symbols) == 0 {
		return nil, formatErr("symbol file without symbols")
	}
	if len(f.Symbols) > maxSymbols {
		return nil, formatErr("symbol file of more than %d symbols", maxSymbols)
	}
	address := func(name string) (uint64, error) {
		n := f.Symbols[name].Address
		a, err := strconv.ParseUint(n.String(), 10, 64)
		if err != nil {
			return 0, formatErr("symbol file: address %q", clipped(n.String()))
		}
		return a, nil
	}
	start, serr := address("_stext")
	end, eerr := address("_etext")
	text := serr == nil && eerr == nil
	b := newBuilder(len(f.Symbols), 0)
	for _, name := range slices.Sorted(maps.Keys(f.Symbols)) {
		if !printable([]byte(name)) {
			continue
		}
		a, err := address(name)
		if err != nil {
			return nil, err
		}
		typ := byte('d')
		if text && a >= start && a < end {
			typ = 't'
		}
		if msg := b.add(a, typ, []byte(name), nil); msg != "" {
			return nil, formatErr("symbol file: %s", msg)
		}
	}
	if b.len() == 0 {
		return nil, formatErr("symbol file without symbols")
	}
	banner := ""
	if data, err := base64.StdEncoding.DecodeString(f.Symbols["linux_banner"].Data); err == nil && len(data) > 0 {
		banner = bannerAt(data)
	}
	return b.finish(banner), nil
}

// clipped returns a text that an error may show.
func clipped(s string) string { return s[:min(len(s), 64)] }
