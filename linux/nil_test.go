package linux_test

import (
	"reflect"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/linux"
)

// TestNilKernel calls every method of a kernel that isn't known, with zero arguments:
// each must say so, by its error or by zero.
func TestNilKernel(t *testing.T) {
	k := reflect.ValueOf((*linux.Kernel)(nil))
	require.Greater(t, k.NumMethod(), 30)
	errorType := reflect.TypeFor[error]()
	// What can't be known mustn't be taken for harmless.
	cautious := map[string]bool{"ExpectedFault": true}
	for i := range k.NumMethod() {
		name, m := k.Type().Method(i).Name, k.Method(i)
		t.Run(name, func(t *testing.T) {
			args := make([]reflect.Value, m.Type().NumIn())
			for i := range args {
				args[i] = reflect.Zero(m.Type().In(i))
			}
			call := m.Call
			if m.Type().IsVariadic() {
				call = m.CallSlice
			}
			for _, v := range call(args) {
				switch {
				case v.Type() == errorType:
					err, _ := v.Interface().(error)
					require.ErrorIs(t, err, linux.ErrNoKernel)
				case cautious[name]:
					assert.False(t, v.IsZero())
				default:
					assert.True(t, v.IsZero(), "%v", v)
				}
			}
		})
	}
}
