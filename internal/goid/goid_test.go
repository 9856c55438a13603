package goid

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestGet(t *testing.T) {
	mine := Get()
	assert.NotZero(t, mine)
	assert.Equal(t, mine, func() uint64 { return Get() }())
	other := make(chan uint64)
	go func() { other <- Get() }()
	assert.NotEqual(t, mine, <-other)
}
