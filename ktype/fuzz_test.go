package ktype

import (
	"bytes"
	"io"
	"strings"
	"testing"
)

// use asks types that may be damaged for everything.
func use(types *Types) {
	names := []string{"task"}
	for name := range types.names() {
		if len(names) == 20 {
			break
		}
		names = append(names, name)
	}
	m := &fixed{}
	for _, name := range names {
		_ = types.Print(io.Discard, name)
		_, _ = types.Sizeof(name)
		_, _ = types.Offset(name + ".a.b[1]")
		_, _ = types.Prototype(name)
		_, _ = types.Variable(name)
		_, _ = types.Enum(name)
		typ, err := types.Type(name)
		if err != nil {
			continue
		}
		_ = typ.String()
		_ = typ.Format(1 << 63)
		v := types.At(m, name, 64)
		for field, f := range typ.Fields() {
			if size, _ := typ.Size(); f.Offset+f.Size > size {
				panic("a member beyond its struct")
			}
			w := v.Field(field)
			_, _ = w.Uint()
			_, _ = w.Int()
			_, _ = w.CString()
			_, _ = w.EnumName()
			_ = w.Index(2).Err()
			_ = w.Deref().Field("a").Err()
		}
		for range types.List(m, 8, name, "node", 10) {
		}
	}
}

func FuzzBTF(f *testing.F) {
	f.Add(buildBTF(f))
	f.Add(blob("\x00s\x00", rawType(1, btfInt, 0, 4, 32), rawType(1, btfStruct, 2, 4, 0, 1, 0, 1, 3, 0), rawType(0, btfPointer, 0, 2)))
	f.Add(blob("\x00s\x00", rawType(1, btfTypedef, 0, 1), rawType(0, btfArray, 0, 0, 2, 1, 9), rawType(1, btfEnum64, 1, 8, 1, 1, 1),
		rawType(1, btfFunc, 0, 5), rawType(0, btfFuncProto, 1, 0, 1, 1), rawType(1, btfDeclTag, 0, 4, 0), rawType(1, btfFwd, 0, 0)))
	f.Fuzz(func(t *testing.T, data []byte) {
		types, err := fromBTF(data)
		if err != nil {
			return
		}
		use(types)
		if with, err := types.WithModule("m", data); err == nil {
			use(with)
		}
	})
}

func FuzzISF(f *testing.F) {
	f.Add([]byte(`{"base_types":{"pointer":{"size":8,"kind":"int","endian":"little"},"int":{"size":4,"signed":true,"kind":"int"}},
		"user_types":{"task":{"kind":"struct","size":8,"fields":{"a":{"offset":4,"type":{"kind":"base","name":"int"}},
		"b":{"offset":0,"type":{"kind":"bitfield","bit_position":3,"bit_length":5,"type":{"kind":"base","name":"int"}}},
		"u":{"offset":0,"anonymous":true,"type":{"kind":"union","name":"un"}}}},"un":{"kind":"union","size":8,"fields":{
		"p":{"offset":0,"type":{"kind":"pointer","subtype":{"kind":"struct","name":"task"}}},
		"arr":{"offset":0,"type":{"kind":"array","count":2,"subtype":{"kind":"enum","name":"e"}}}}}},
		"enums":{"e":{"size":4,"base":"int","constants":{"A":1,"B":18446744073709551615}}},
		"symbols":{"init_task":{"address":1,"type":{"kind":"struct","name":"task"}}}}`))
	f.Add([]byte(`{"user_types":{"task":{"kind":"struct","size":99999999999999,"fields":{"x":{"offset":-1}}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if types, err := FromISF(bytes.NewReader(data)); err == nil {
			use(types)
		}
	})
}

func FuzzPath(f *testing.F) {
	types, err := fromBTF(buildBTF(f))
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{"task.comm[3]", "struct task.parent->parent.node.next", "task.parent[1].comm", "a:b.c", "->[0", "task.comm[4294967295]", "..", "twice.only"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		field, err := types.Offset(path)
		if err == nil && (!types.HasField(path) || field.Type == nil) {
			t.Errorf("%q has an offset, but no field", path)
		}
		if hops, err := parseHops(path); err == nil {
			// What was read can be written, and read again.
			var b strings.Builder
			for _, h := range hops {
				if h.name != "" {
					b.WriteByte('.')
				}
				b.WriteString(h.String())
			}
			again, err := parseHops(b.String())
			if err != nil && b.Len() <= maxPath || err == nil && len(again) != len(hops) {
				t.Errorf("%q read as %v, then as %v (%v)", path, hops, again, err)
			}
		}
		_, _ = types.At(&fixed{}, path, 0).Uint()
	})
}

// hostileMemory repeats its bytes through the whole address space; every third
// read fails if they begin with an odd one.
type hostileMemory struct {
	data []byte
	n    int
}

func (m *hostileMemory) Read(addr uint64, b []byte) error {
	if m.n++; len(m.data) == 0 || m.data[0]&1 != 0 && m.n%3 == 0 {
		return io.ErrUnexpectedEOF
	}
	for i := range b {
		b[i] = m.data[(addr+uint64(i))%uint64(len(m.data))]
	}
	return nil
}

func FuzzDecode(f *testing.F) {
	types, err := fromBTF(buildBTF(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{0}, uint64(0), "pid|comm", "comm")
	f.Add([]byte("0123456789abcdef"), ^uint64(0)-8, "parent.b2", "name")
	f.Fuzz(func(t *testing.T, data []byte, addr uint64, a, b string) {
		m := &hostileMemory{data: data}
		var d struct {
			Pid    int8     `ktype:"pid,optional"`
			B1     uint8    `ktype:"b1"`
			B2     int16    `ktype:"b2"`
			Comm   string   `ktype:"comm"`
			Raw    [16]byte `ktype:"comm"`
			Kind   string   `ktype:"kind"`
			Name   string   `ktype:"name,optional"`
			Parent struct {
				On   bool   `ktype:"on"`
				Comm string `ktype:"parent.comm,optional"`
			} `ktype:"parent"`
		}
		if err := types.Decode(m, "task", addr, &d); err == nil && len(d.Name) > maxString {
			t.Error("long string")
		}
		v := types.At(m, "task", addr)
		_, _ = v.Field(a).Int()
		_, _ = v.Field(b).CString()
		n := 0
		for range types.List(m, addr, "task", "node", 50) {
			n++
		}
		for range types.HList(m, addr, "task", "node", 50) {
			n++
		}
		if n > 102 {
			t.Errorf("%d elements", n)
		}
	})
}
