//go:build unix

package vmprobes_test

import (
	"os/exec"
	"syscall"
)

// asUser has a program run with the rights of a user and of the group of the same number.
func asUser(cmd *exec.Cmd, id uint32) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
}
