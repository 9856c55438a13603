//go:build !race

package ktype

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Not under the race detector, which makes sync.Pool forget things on purpose.
func TestAllocations(t *testing.T) {
	types, err := New("test", 8, Struct{"item", 64, []StructField{{"pid", 0, "int"}, {"up", 8, "item *"}, {"b", 16, "char[4]"}}})
	require.NoError(t, err)
	m := fixed{}
	copy(m[8:], le64(0))
	var d struct {
		Pid int     `ktype:"pid"`
		B   [4]byte `ktype:"b"`
		Up  struct {
			Pid int `ktype:"pid"`
		} `ktype:"up,optional"`
	}
	var f Field
	assert.Zero(t, testing.AllocsPerRun(100, func() { f, err = types.Offset("item.up") }))
	require.NoError(t, err)
	assert.EqualValues(t, 8, f.Offset)
	var mem Memory = &m
	assert.Zero(t, testing.AllocsPerRun(100, func() { err = errors.Join(err, types.Decode(mem, "item", 0, &d)) }))
	require.NoError(t, err)
}
