package linux

import "strings"

// Fields are members of a [Task] or a [Module] that need not be known: the types lack
// what they are read from, as those that were inferred do, or it can't be read.
type Fields uint16

// Members.
const (
	FieldPPID Fields = 1 << iota
	FieldUID
	FieldGID
	FieldMM
	FieldExited
	FieldBase
	FieldSize
	FieldState
)

// String returns the members' names, as in "UID, GID".
func (f Fields) String() string {
	var all []string
	for i, name := range []string{"PPID", "UID", "GID", "MM", "Exited", "Base", "Size", "State"} {
		if f&(1<<i) != 0 {
			all = append(all, name)
		}
	}
	return strings.Join(all, ", ")
}
