package x86

import (
	"encoding/hex"
	"testing"
)

func TestStringOp(t *testing.T) {
	for code, want := range map[string]StringOp{
		"f3a4":     {Kind: Movs, Size: 1, Equal: true},
		"f348a5":   {Kind: Movs, Size: 8, Equal: true},
		"f3a6":     {Kind: Cmps, Size: 1, Equal: true},
		"f2a7":     {Kind: Cmps, Size: 4},
		"66f3ab":   {Kind: Stos, Size: 2, Equal: true},
		"65f3ac":   {Kind: Lods, Size: 1, Segment: 0x65, Equal: true},
		"2ef3ac":   {Kind: Lods, Size: 1, Equal: true},
		"f266ae":   {Kind: Scas, Size: 1},
		"f26648af": {Kind: Scas, Size: 8},
		"a4":       {}, // doesn't repeat
		"67f3a4":   {}, // ECX
		"f36c":     {}, // INS
		"f36e":     {}, // OUTS
		"f390":     {}, // PAUSE
		"f30fa4c0": {},
	} {
		b, err := hex.DecodeString(code + "90")
		if err != nil {
			t.Fatal(err)
		}
		in, err := Decode(b)
		if err != nil {
			t.Fatal(code, err)
		}
		got, ok := in.StringOp()
		if got != want || ok != (want != StringOp{}) {
			t.Errorf("%s (%s): %+v %v, want %+v", code, &in, got, ok, want)
		}
	}
	var none Insn
	if _, ok := none.StringOp(); ok {
		t.Error("the zero Insn")
	}
}
