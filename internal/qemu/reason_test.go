package qemu

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
)

// TestReason: the operation and the addresses of a network error are left to the caller,
// who has said them. What the error is to errors.Is stays.
func TestReason(t *testing.T) {
	at := &net.UnixAddr{Name: "/run/vm.gdb", Net: "unix"}
	dns := &net.DNSError{Err: "no such host", Name: "host", Server: "10.0.0.1:53", IsNotFound: true}
	for _, test := range []struct {
		err  error
		want string
		is   error
	}{
		{&net.OpError{Op: "dial", Net: "unix", Addr: at, Err: os.NewSyscallError("connect", syscall.EACCES)}, "permission denied", fs.ErrPermission},
		{&net.OpError{Op: "dial", Net: "unix", Addr: at, Err: syscall.EINVAL}, "invalid argument", syscall.EINVAL},
		{&net.OpError{Op: "read", Net: "unix", Addr: at, Err: os.ErrDeadlineExceeded}, "i/o timeout", os.ErrDeadlineExceeded},
		{&net.OpError{Op: "dial", Net: "tcp", Err: dns}, "no such host", nil},
	} {
		err := reason(test.err)
		assert.EqualError(t, err, test.want)
		if test.is != nil {
			assert.ErrorIs(t, err, test.is)
		}
	}
	other := errors.New("another one")
	assert.Equal(t, other, reason(other))
}
