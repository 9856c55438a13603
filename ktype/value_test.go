package ktype

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const longName = "a name of more than sixty-four bytes, so that it takes more than one read"

// The objects that testdata/oracle.c has filled, read through each kind of types.
func TestValues(t *testing.T) {
	t.Parallel()
	o := runOracle(t)
	variants(t, func(t *testing.T, types *Types) {
		size, err := types.Sizeof("task")
		require.NoError(t, err)
		addr := o.addrs["tasks"] + 2*size
		v := types.At(o.mem, "struct task", addr)
		require.NoError(t, v.Err())
		assert.Equal(t, addr, v.Addr())
		assert.Equal(t, "struct task", v.Type().String())

		for path, want := range map[string]int64{
			"deep": -2, "bits.a": 1, "bits.b": 5, "bits.c": -7, "bits.d": 0xabcde, "bits.e": 0x123456789a,
			"bits.f": 99, "bits.g": 1, "bits.plain": -3, "bits.k": 5,
			"color": 5, "on": 1, "tiny": -1, "utiny": 255, "small": -32768, "negative": -1234567890123,
			"parts[3].s": -3, "deeper[1]": 'b', "ptrs[0].s": -2, "ptrs[0][1].s": -3,
			"parent.deep": -1, "parent->parent.deep": 0, "mac[5]": 6, "ptrs[1]": 0,
			"node.prev.prev": int64(o.addrs["tasks"] + types.must(t, "task.node").Offset),
		} {
			got, err := v.Field(path).Int()
			if assert.NoError(t, err) {
				assert.Equal(t, want, got, path)
			}
		}
		for path, want := range map[string]uint64{"state": 1<<63 + 3, "huge": 1<<64 - 1, "bits.h": 1<<64 - 1} {
			got, err := v.Field(path).Uint()
			if assert.NoError(t, err) {
				assert.Equal(t, want, got, path)
			}
			_, err = v.Field(path).Int()
			assert.ErrorIs(t, err, ErrRange, path)
		}
		for path, want := range map[string]string{"comm": "task/2", "name": longName, "parent.comm": "task/1",
			"deeper": "ab", "parent.parent.comm": "task/0"} {
			got, err := v.Field(path).CString()
			if assert.NoError(t, err) {
				assert.Equal(t, want, got, path)
			}
		}
		if types.must(t, "task.grid").Type.Len() == 3 { // see TestLayouts
			n, err := v.Field("grid[2][3]").Int()
			require.NoError(t, err)
			assert.EqualValues(t, 1099, n)
			n, err = v.Field("grid").Index(1).Index(2).Int()
			require.NoError(t, err)
			assert.EqualValues(t, 599, n)
		}
		s, err := types.At(o.mem, "task", o.addrs["tasks"]+3*size).Field("comm").CString()
		require.NoError(t, err)
		assert.Equal(t, "sixteen bytes!!!", s, "a char array without NUL")
		mac, err := v.Field("mac").Bytes()
		require.NoError(t, err)
		assert.Equal(t, []byte{1, 2, 3, 4, 5, 6}, mac)
		name, err := v.Field("color").EnumName()
		require.NoError(t, err)
		assert.Equal(t, "GREEN", name)
		on, err := v.Field("on").Bool()
		require.NoError(t, err)
		assert.True(t, on)
		assert.EqualValues(t, 5, v.Field("parts").Len())
		short, err := v.Field("ptrs").Index(0).Deref().Field("s").Int()
		require.NoError(t, err)
		assert.EqualValues(t, -2, short)

		for _, c := range []struct {
			path string
			want error
		}{
			{"nope", ErrNoField}, {"deep.x", ErrKind}, {"parts[5]", ErrRange}, {"comm[16]", ErrRange},
			{"state[0]", ErrKind}, {"bits.a.x", ErrKind}, {"ptrs[1].s", ErrNull}, {"decl.x", ErrNoType}, {"parts.", ErrPath},
			{"tiny", ErrRange}, {"parts", ErrKind},
		} {
			_, err := v.Field(c.path).Uint()
			assert.ErrorIs(t, err, c.want, c.path)
			var re *ReadError
			if assert.ErrorAs(t, err, &re) {
				assert.Contains(t, re.Path, "task", c.path)
			}
		}
		_, err = v.Field("state").Pointer()
		assert.ErrorIs(t, err, ErrNotPointer)
		_, err = v.Field("state").EnumName()
		assert.ErrorIs(t, err, ErrKind)
		_, err = v.Field("grid").CString()
		assert.ErrorIs(t, err, ErrKind)
		_, err = v.Field("nope").Field("more").CString()
		assert.ErrorIs(t, err, ErrNoField, "the first error stays")
		assert.ErrorIs(t, v.Field("ptrs[1]").Deref().Err(), ErrNull)
		assert.ErrorIs(t, v.Field("state").Deref().Err(), ErrNotPointer)
		_, err = types.At(o.mem, "task", 16).Field("parent.parent.comm").CString()
		var re *ReadError
		require.ErrorAs(t, err, &re)
		assert.Equal(t, "task.parent", re.Path, "the pointer that can't be read")
		assert.Equal(t, 16+types.must(t, "task.parent").Offset, re.Addr)
		assert.ErrorIs(t, types.At(o.mem, "tusk", 16).Err(), fs.ErrNotExist)
		_, err = Value{}.Field("x").Uint()
		assert.Error(t, err)
		_, err = types.At(o.mem, "task", addr).Field("decl").Deref().Uint()
		assert.Error(t, err)
	})
}

func (t *Types) must(tb testing.TB, path string) Field {
	tb.Helper()
	f, err := t.Offset(path)
	require.NoError(tb, err)
	return f
}

type embedded struct {
	Tiny  int8  `ktype:"tiny"`
	Small int16 `ktype:"small"`
}

type decoded struct {
	embedded
	Ignored  int
	State    uint64    `ktype:"stat|state"`
	Deep     int       `ktype:"deep"`
	C        int8      `ktype:"bits.c"`
	E        uint64    `ktype:"bits.e"`
	On       bool      `ktype:"on"`
	Parent   uintptr   `ktype:"parent"`
	Comm     string    `ktype:"comm"`
	Name     string    `ktype:"name,optional"`
	Color    string    `ktype:"color"`
	Level    string    `ktype:"level"`
	Mac      [6]byte   `ktype:"mac"`
	Grid     [12]int32 `ktype:"grid"`
	Missing  uint64    `ktype:"missing,optional"`
	Null     int       `ktype:"ptrs[1].s,optional"`
	NullDeep string    `ktype:"parent.parent.parent.parent.comm,optional"`
	Up       struct {
		Deep int64  `ktype:"deep"`
		Comm string `ktype:"comm"`
		Bits struct {
			B uint8 `ktype:"b"`
		} `ktype:"bits"`
	} `ktype:"parent"`
	Parts [2]struct {
		S int `ktype:"s"`
	} `ktype:"parts"`
	Ptr int `ktype:"ptrs[0].s"`
}

func TestDecode(t *testing.T) {
	t.Parallel()
	o := runOracle(t)
	variants(t, func(t *testing.T, types *Types) {
		size, err := types.Sizeof("task")
		require.NoError(t, err)
		addr := o.addrs["tasks"] + 2*size
		var d decoded
		d.Ignored = 7
		if strings.HasSuffix(t.Name(), "gcc-gbtf") {
			// gcc 12 has neither the order of dimensions nor the signs of enums.
			var d struct {
				embedded
				State  uint64  `ktype:"stat|state"`
				Deep   int     `ktype:"deep"`
				On     bool    `ktype:"on"`
				Parent uintptr `ktype:"parent"`
				Comm   string  `ktype:"comm"`
				Mac    [6]byte `ktype:"mac"`
			}
			want := d
			want.embedded, want.State, want.Deep, want.On = embedded{-1, -32768}, 1<<63+3, -2, true
			want.Parent, want.Comm, want.Mac = uintptr(addr-size), "task/2", [6]byte{1, 2, 3, 4, 5, 6}
			require.NoError(t, types.Decode(o.mem, "task", addr, &d))
			assert.Equal(t, want, d)
			return
		}
		if types.Source() != "BTF" {
			var grid struct {
				Grid [3][4]int64 `ktype:"grid"`
			}
			require.NoError(t, types.Decode(o.mem, "task", addr, &grid))
			assert.Equal(t, [3][4]int64{{-1, 99, 199, 299}, {399, 499, 599, 699}, {799, 899, 999, 1099}}, grid.Grid)
			err := types.Decode(o.mem, "task", addr, &d)
			require.ErrorIs(t, err, ErrRange, "12 elements of [3]")
			return
		}
		require.NoError(t, types.Decode(o.mem, "task", addr, &d))
		want := decoded{embedded: embedded{-1, -32768}, Ignored: 7, State: 1<<63 + 3, Deep: -2, C: -7, E: 0x123456789a, On: true,
			Parent: uintptr(addr - size), Comm: "task/2", Name: longName, Color: "GREEN", Level: "LOW", Mac: [6]byte{1, 2, 3, 4, 5, 6},
			Grid: [12]int32{-1, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999, 1099}, Ptr: -2}
		want.Up.Deep, want.Up.Comm, want.Up.Bits.B = -1, "task/1", 5
		want.Parts[1].S = -1
		assert.Equal(t, want, d)

		// The first task has no name and no parent.
		d = decoded{}
		err = types.Decode(o.mem, "task", o.addrs["tasks"], &d)
		assert.ErrorIs(t, err, ErrNull)
		var re *ReadError
		require.ErrorAs(t, err, &re)
		assert.Equal(t, "task.parent", re.Path)
		err = types.Decode(o.mem, "task", 1<<40, &d)
		assert.ErrorAs(t, err, &re)

		for name, c := range map[string]struct {
			dst  any
			want error
		}{
			"no pointer": {decoded{}, ErrKind},
			"nil":        {(*decoded)(nil), ErrKind},
			"nothing":    {nil, ErrKind},
			"no struct":  {new(int), ErrKind},
			"missing": {&struct {
				X int `ktype:"nope"`
			}{}, ErrNoField},
			"both missing": {&struct {
				X int `ktype:"nope|neither"`
			}{}, ErrNoField},
			"syntax": {&struct {
				X int `ktype:"a..b"`
			}{}, ErrPath},
			"empty": {&struct {
				X int `ktype:""`
			}{}, ErrPath},
			"option": {&struct {
				X int `ktype:"deep,maybe"`
			}{}, ErrPath},
			"unexported": {&struct {
				x int `ktype:"deep"`
			}{}, ErrPath},
			"int of struct": {&struct {
				X int `ktype:"bits"`
			}{}, ErrKind},
			"string of int": {&struct {
				X string `ktype:"deep"`
			}{}, ErrKind},
			"string of flex": {&struct {
				X string `ktype:"last"`
			}{}, ErrRange},
			"pointer": {&struct {
				X *int `ktype:"deep"`
			}{}, ErrKind},
			"slice": {&struct {
				X []byte `ktype:"mac"`
			}{}, ErrKind},
			"long array": {&struct {
				X [7]byte `ktype:"mac"`
			}{}, ErrRange},
			"array of int": {&struct {
				X [2]int `ktype:"deep"`
			}{}, ErrKind},
			"too many": {&struct {
				X [5000]uint16 `ktype:"last"`
			}{}, ErrRange},
			"overflow int8": {&struct {
				X int8 `ktype:"bits.d"`
			}{}, ErrRange},
			"overflow uint8": {&struct {
				X uint8 `ktype:"bits.d"`
			}{}, ErrRange},
			"overflow int": {&struct {
				X int `ktype:"huge"`
			}{}, ErrRange},
			"negative": {&struct {
				X uint64 `ktype:"deep"`
			}{}, ErrRange},
		} {
			err := types.Decode(o.mem, "task", addr, c.dst)
			assert.ErrorIs(t, err, c.want, name)
		}
		assert.ErrorIs(t, types.Decode(o.mem, "tusk", addr, &d), ErrNoType)
	})
}

// No page is read in which nothing was asked for.
func TestDecodePages(t *testing.T) {
	t.Parallel()
	types, err := New("test", 8, Struct{"big", 0, []StructField{{"a", 100, "u32"}, {"b", 300, "u32"}, {"c", 4090, "u64"}, {"d", 9000, "char *"}}})
	require.NoError(t, err)
	page := func(addr uint64) []byte { return make([]byte, pageSize) }
	m := memory{0x10000: page(0), 0x11000: page(0), 0x12000: page(0)}
	// d points to a string that ends with its page.
	m[0x10000] = append(m[0x10000], m[0x11000]...)
	m[0x10000] = append(m[0x10000], m[0x12000]...)
	delete(m, 0x11000)
	delete(m, 0x12000)
	copy(m[0x10000][9000:], []byte{0xfb, 0x0f, 0x02})
	m[0x20000] = append(make([]byte, pageSize-5), "tail\x00"...)
	var d struct {
		A uint32 `ktype:"a"`
		B uint32 `ktype:"b"`
		C uint64 `ktype:"c"`
		D string `ktype:"d"`
	}
	require.NoError(t, types.Decode(m, "big", 0x10000, &d))
	assert.Equal(t, "tail", d.D)
	s, err := types.At(m, "big.d", 0x10000).CString()
	require.NoError(t, err)
	assert.Equal(t, "tail", s)
}

func TestStringBounds(t *testing.T) {
	t.Parallel()
	types, err := New("test", 8, Struct{"s", 0, []StructField{{"p", 0, "char *"}, {"f", 8, "char[0]"}}})
	require.NoError(t, err)
	m := memory{0x1000: []byte{0, 0x20, 0, 0, 0, 0, 0, 0, 'x', 0}, 0x2000: []byte(strings.Repeat("y", 10000))}
	s, err := types.At(m, "s", 0x1000).Field("p").CString()
	require.NoError(t, err)
	assert.Len(t, s, maxString)
	var d struct {
		P string `ktype:"p"`
	}
	require.NoError(t, types.Decode(m, "s", 0x1000, &d))
	assert.Len(t, d.P, maxString)
	assert.Error(t, func() error { _, err := types.At(m, "s", 0x1000).Field("f").CString(); return err }(), "the memory ends within the first step")
}

// links builds list_heads: at[i] is a node whose next is at[i+1] and prev at[i-1].
func links(at ...uint64) memory {
	m := memory{}
	n := len(at)
	for i, a := range at {
		m[a] = append(le64(at[(i+1)%n]), le64(at[(i+n-1)%n])...)
	}
	return m
}

func le64(v uint64) []byte {
	b := make([]byte, 8)
	for i := range b {
		b[i] = byte(v >> (8 * i))
	}
	return b
}

func TestList(t *testing.T) {
	t.Parallel()
	types, err := New("test", 8, Struct{"item", 64, []StructField{{"pid", 0, "int"}, {"node", 16, "list_head"}, {"h", 32, "hlist_node"}}},
		Struct{"list_head", 16, []StructField{{"next", 0, "list_head *"}, {"prev", 8, "list_head *"}}},
		Struct{"hlist_node", 16, []StructField{{"next", 0, "hlist_node *"}, {"pprev", 8, "hlist_node **"}}})
	require.NoError(t, err)
	collect := func(m Memory, limit int) (got []uint64, err error) {
		for a, e := range types.List(m, 0x100, "item", "node", limit) {
			if e != nil {
				assert.Zero(t, a)
				err = e
				continue
			}
			got = append(got, a)
		}
		return got, err
	}
	m := links(0x100, 0x210, 0x310, 0x410)
	got, err := collect(m, 0)
	require.NoError(t, err)
	assert.Equal(t, []uint64{0x200, 0x300, 0x400}, got)
	got, err = collect(m, 3)
	require.NoError(t, err)
	assert.Len(t, got, 3)
	got, err = collect(m, 2)
	assert.ErrorIs(t, err, ErrLimit)
	assert.Len(t, got, 2)
	got, err = collect(links(0x100), 0)
	require.NoError(t, err)
	assert.Empty(t, got)
	for range types.List(m, 0x100, "item", "node", 0) {
		break // must not go on
	}

	m[0x410] = append(le64(0x210), le64(0x310)...)
	got, err = collect(m, 0)
	assert.ErrorIs(t, err, ErrListCycle)
	assert.Len(t, got, 3)
	m[0x410] = append(le64(0x410), le64(0x310)...)
	_, err = collect(m, 0)
	assert.ErrorIs(t, err, ErrListCycle, "an element that points to itself")
	m[0x410] = append(le64(0x100), le64(0x999)...)
	got, err = collect(m, 0)
	assert.ErrorIs(t, err, ErrListBroken)
	assert.Len(t, got, 3, "the last one is reached from the end")
	delete(m, 0x410)
	got, err = collect(m, 0)
	var re *ReadError
	require.ErrorAs(t, err, &re)
	assert.EqualValues(t, 0x410, re.Addr)
	assert.Len(t, got, 2)
	_, err = collect(memory{}, 0)
	assert.Error(t, err)
	m[0x100] = make([]byte, 16)
	_, err = collect(m, 0)
	assert.Error(t, err, "a head of zeros is no list")
	for _, err := range types.List(m, 0x100, "item", "nope", 0) {
		assert.ErrorIs(t, err, ErrNoField)
	}

	hm := memory{0x100: le64(0x220), 0x220: append(le64(0x320), le64(0x100)...), 0x320: append(le64(0), le64(0x220)...)}
	got = nil
	for a, err := range types.HList(hm, 0x100, "item", "h", 0) {
		require.NoError(t, err)
		got = append(got, a)
	}
	assert.Equal(t, []uint64{0x200, 0x300}, got)
	hm[0x320] = append(le64(0x220), le64(0x220)...)
	var last error
	for _, err := range types.HList(hm, 0x100, "item", "h", 0) {
		last = err
	}
	assert.ErrorIs(t, last, ErrListCycle)
	hm[0x100] = le64(0)
	for range types.HList(hm, 0x100, "item", "h", 0) {
		t.Error("an empty list has no elements")
	}
}

// shifting is memory with a list that changes at every read, as a kernel changes it
// (include/linux/list.h, rculist.h): one store at a time.
type shifting struct {
	memory
	rnd    *rand.Rand
	todo   []func() // stores that are still to be made
	short  []uint64 // elements that come and go
	free   []uint64 // of those, the ones that aren't on the list
	reuse  bool     // a freed element may be on the list again at once
	change int      // of so many reads one changes something
}

const shiftHead = 0x1000

func (m *shifting) put(at, v uint64) { copy(m.memory[at&^15][at&15:], le64(v)) }
func (m *shifting) get(at uint64) uint64 {
	return binary.LittleEndian.Uint64(m.memory[at&^15][at&15:])
}

func (m *shifting) Read(addr uint64, b []byte) error {
	if m.rnd.IntN(m.change) == 0 {
		if len(m.todo) == 0 {
			m.begin()
		}
		if len(m.todo) > 0 {
			m.todo[0]()
			m.todo = m.todo[1:]
		}
	}
	if m.memory[addr] == nil {
		return errors.New("no memory there")
	}
	copy(b, m.memory[addr])
	return nil
}

// begin adds an element at one of the ends, or takes one out.
func (m *shifting) begin() {
	store := func(at, v func() uint64) { m.todo = append(m.todo, func() { m.put(at(), v()) }) }
	is := func(v uint64) func() uint64 { return func() uint64 { return v } }
	if i := m.rnd.IntN(len(m.short)); m.rnd.IntN(2) == 0 {
		e := m.short[i]
		if slices.Contains(m.free, e) {
			return
		}
		next, prev := m.get(e), m.get(e+8)
		store(is(next+8), is(prev))
		store(is(prev), is(next))
		store(is(e+8), is(0xdead000000000122)) // LIST_POISON2
		if !m.reuse {
			store(is(e), is(0xdead000000000100))
		}
		m.todo = append(m.todo, func() { m.free = append(m.free, e) })
		return
	}
	if len(m.free) == 0 {
		return
	}
	e := m.free[0]
	m.free = m.free[1:]
	prev, next := uint64(shiftHead), m.get(shiftHead)
	if m.rnd.IntN(3) > 0 {
		prev, next = m.get(shiftHead+8), shiftHead
	}
	store(is(e), is(next))
	store(is(e+8), is(prev))
	store(is(prev), is(e))
	store(is(next+8), is(e))
}

// A list of which half the elements come and go while it is read: the others are
// yielded, each once and in order, and there is no error.
func TestListShifts(t *testing.T) {
	t.Parallel()
	types, err := New("test", 8, Struct{"list_head", 16, []StructField{{"next", 0, "list_head *"}, {"prev", 8, "list_head *"}}},
		Struct{"e", 0, []StructField{{"n", 0, "list_head"}}})
	require.NoError(t, err)
	for seed := range uint64(3000) {
		m := &shifting{memory: memory{}, rnd: rand.New(rand.NewPCG(seed, 1)), reuse: seed%2 == 0, change: 1 + int(seed%5)}
		all := []uint64{shiftHead}
		var long []uint64
		for i := range uint64(40) {
			at := 0x2000 + i*0x100
			all = append(all, at)
			if m.rnd.IntN(2) == 0 {
				long = append(long, at)
			} else {
				m.short = append(m.short, at)
			}
		}
		for i, at := range all {
			m.memory[at] = append(le64(all[(i+1)%len(all)]), le64(all[(i+len(all)-1)%len(all)])...)
		}
		var got []uint64
		for at, err := range types.List(m, shiftHead, "e", "n", 0) {
			require.NoError(t, err, "seed %d", seed)
			if slices.Contains(long, at) {
				got = append(got, at)
			}
		}
		require.Equal(t, long, got, "seed %d", seed)
	}
}

// The lists that the compiler's program has linked.
func TestListOracle(t *testing.T) {
	t.Parallel()
	o := runOracle(t)
	variants(t, func(t *testing.T, types *Types) {
		size, err := types.Sizeof("task")
		require.NoError(t, err)
		first := o.addrs["tasks"]
		want := []uint64{first, first + size, first + 2*size, first + 3*size}
		var got, hgot []uint64
		for a, err := range types.List(o.mem, o.addrs["head"], "task", "node", 4) {
			require.NoError(t, err)
			got = append(got, a)
		}
		for a, err := range types.HList(o.mem, o.addrs["hhead"], "task", "hnode", 4) {
			require.NoError(t, err)
			hgot = append(hgot, a)
		}
		assert.Equal(t, want, got)
		assert.Equal(t, want, hgot)
	})
}

// A list in memory that changes with every read ends all the same.
type restless struct{ n uint64 }

func (r *restless) Read(_ uint64, b []byte) error {
	r.n += 64
	copy(b, le64(0x1000+r.n))
	if len(b) > 8 {
		copy(b[8:], le64(0x1000+r.n-64))
	}
	return nil
}

func TestListHostile(t *testing.T) {
	t.Parallel()
	types, err := New("test", 8, Struct{"list_head", 16, []StructField{{"next", 0, "list_head *"}, {"prev", 8, "list_head *"}}},
		Struct{"e", 0, []StructField{{"n", 0, "list_head"}}})
	require.NoError(t, err)
	n := 0
	var last error
	for _, err := range types.List(&restless{}, 0x1000, "e", "n", 1000) {
		n++
		last = err
	}
	assert.LessOrEqual(t, n, 1001)
	assert.Error(t, last)
}

// fixed is memory from address 0 on.
type fixed [4096]byte

func (m *fixed) Read(addr uint64, b []byte) error {
	if addr > uint64(len(m)) || uint64(len(b)) > uint64(len(m))-addr {
		return errors.New("no memory there")
	}
	copy(b, m[addr:])
	return nil
}
