// Package sentinel makes errors that are several things to [errors.Is] and say only
// one: an error that wraps fs.ErrNotExist with %w says "file does not exist" as well,
// of what is no file.
package sentinel

import "errors"

// New returns an error with the given text that errors.Is takes for each of is, too.
func New(text string, is ...error) error { return &kind{errors.New(text), text, is} }

// As returns err, which errors.Is takes for each of is as well. It is nil if err is.
func As(err error, is ...error) error {
	if err == nil {
		return nil
	}
	return &kind{err, err.Error(), is}
}

// Say returns err with another text.
func Say(err error, text string) error { return &kind{err, text, nil} }

type kind struct {
	err  error
	text string
	is   []error
}

func (k *kind) Error() string { return k.text }
func (k *kind) Unwrap() error { return k.err }

func (k *kind) Is(target error) bool {
	for _, err := range k.is {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
