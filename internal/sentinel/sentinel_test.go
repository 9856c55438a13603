package sentinel

import (
	"errors"
	"fmt"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestKinds(t *testing.T) {
	missing := New("no such thing", fs.ErrNotExist)
	other := New("no such thing", fs.ErrNotExist)
	assert.ErrorIs(t, missing, fs.ErrNotExist)
	assert.ErrorIs(t, fmt.Errorf("x: %w", missing), missing)
	assert.NotErrorIs(t, missing, other)
	assert.NotErrorIs(t, missing, fs.ErrPermission)
	assert.EqualError(t, missing, "no such thing")

	path := &fs.PathError{Op: "open", Path: "/x", Err: fs.ErrPermission}
	err := As(path, missing)
	assert.ErrorIs(t, err, missing)
	assert.ErrorIs(t, err, fs.ErrNotExist)
	assert.ErrorIs(t, err, fs.ErrPermission)
	var p *fs.PathError
	assert.True(t, errors.As(err, &p))
	assert.EqualError(t, err, "open /x: permission denied")
	assert.NoError(t, As(nil, missing))

	err = Say(err, "not allowed")
	assert.EqualError(t, err, "not allowed")
	assert.ErrorIs(t, err, missing)
}
