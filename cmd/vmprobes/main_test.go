package main

import (
	"bytes"
	"errors"
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/vmprobes/vmprobes/internal/terminal"
)

func TestExitStatus(t *testing.T) {
	for _, c := range []struct {
		args   []string
		status int
		stdout string // that it has to have
		stderr string
	}{
		{nil, 0, "recover", ""},
		{[]string{"--help"}, 0, "recover", ""},
		{[]string{"recover", "--help"}, 0, "GUEST [--from FILE] | --all", ""},
		{[]string{"status", "x"}, usage, "", `vmprobes: unknown command "x" for "vmprobes status"`},
		{[]string{"recover"}, usage, "", "vmprobes: which guest? (or --all)"},
		{[]string{"recover", "a", "--all"}, usage, "", "either a guest or --all"},
		{[]string{"recover", "a", "b"}, usage, "", "which guest?"},
		{[]string{"recover", "--all", "--from", "vmlinuz"}, usage, "", "--from is for one guest"},
		{[]string{"recover", "a", "--force"}, usage, "", "--force is for --from"},
		{[]string{"recover", "qemu:/run/vm.gdb", "--from", "vmlinuz"}, failed, "", "not the name of a guest"},
		{[]string{"recove"}, usage, "", `unknown command "recove"`},
		{[]string{"recover", "--al"}, usage, "", "unknown flag: --al"},
		{[]string{"recover", "/no/such.journal"}, 0, "/no/such.journal: needs no repair\n", ""},
	} {
		var stdout, stderr bytes.Buffer
		assert.Equal(t, c.status, run(c.args, &stdout, &stderr), "%q: %s", c.args, &stderr)
		assert.Contains(t, stdout.String(), c.stdout, "%q", c.args)
		assert.Contains(t, stderr.String(), c.stderr, "%q", c.args)
	}
}

func TestQuote(t *testing.T) {
	assert.Equal(t, "a3guest", quote("a3guest"))
	assert.Equal(t, `"a\x1b[2J"`, quote("a\x1b[2J"), "a guest's name doesn't reach the terminal")
	assert.Equal(t, `""`, quote(""))
	assert.Equal(t, `process 7 ("/usr/bin/tool")`, quote(`process 7 ("/usr/bin/tool")`))
	assert.Equal(t, "a?[2J", terminal.Harmless("a\x1b[2J"))
}

func TestTell(t *testing.T) {
	var b bytes.Buffer
	assert.NoError(t, tell(&b, "a", true, nil))
	assert.NoError(t, tell(&b, "b", false, nil))
	assert.Equal(t, "a: repaired\nb: needs no repair\n", b.String())
	assert.EqualError(t, tell(&b, "c", false, errors.New("why")), "c: why")
}
