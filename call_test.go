package vmprobes

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestIsText(t *testing.T) {
	for _, c := range []struct {
		typ, name string
		want      bool
	}{
		{"const char *", "filename", true},
		{"const char __user *", "pathname", true},
		{"const char*", "s", true},
		{"const char *", "buf", false},
		{"char *", "name", false},
		{"const char **", "argv", false},
		{"const char __user *", "u_buf", false},
		{"int", "fd", false},
	} {
		assert.Equal(t, c.want, isText(c.typ, c.name), "%s %s", c.typ, c.name)
	}
}
