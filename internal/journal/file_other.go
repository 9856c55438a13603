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

// A View is a journal that another process owns.
type View struct{}

// Look fails where there are no journals.
func Look(string) (*View, error) { return nil, errors.ErrUnsupported }

// Guest returns no guest.
func (*View) Guest() Identity { return Identity{} }

// Owner returns nobody.
func (*View) Owner() Owner { return Owner{} }

// State returns nothing.
func (*View) State() []byte { return nil }

// Size returns 0.
func (*View) Size() int64 { return 0 }

// Path returns "".
func (*View) Path() string { return "" }

// Records has none.
func (*View) Records(func(Record) error) error { return nil }

// Removed reports that nobody has the journal.
func (*View) Removed() bool { return true }

// Close does nothing.
func (*View) Close() error { return nil }
