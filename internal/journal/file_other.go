//go:build !linux

package journal

import "errors"

// Create fails where there are no guests to change.
func Create(string, string, Identity, int) (*File, error) { return nil, errors.ErrUnsupported }

// Open fails likewise.
func Open(string) (*File, error) { return nil, errors.ErrUnsupported }

// An Entry is one journal of a folder.
type Entry struct {
	Path  string
	Guest Identity
	Owner Owner
	Hot   bool  // its owner is dead
	Err   error // why nothing else is known
}

// List returns no journals.
func List(string) ([]Entry, error) { return nil, nil }

// Path returns "".
func Path(string, string) string { return "" }

// StartTime fails.
func StartTime(int) (uint64, error) { return 0, errors.ErrUnsupported }
