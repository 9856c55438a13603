//go:build !unix

package guest

func ignoreStop() (end func()) { return func() {} }
