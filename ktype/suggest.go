package ktype

import (
	"cmp"
	"iter"
	"slices"
	"strings"
)

const (
	maxSuggest = 3  // names in an error
	maxCompare = 64 // bytes of a name that is compared
)

// suggest returns " (near: a, b)" with the names closest to one that doesn't exist,
// or "".
func suggest(name string, names iter.Seq[string]) string {
	if len(name) > maxCompare {
		return ""
	}
	type near struct {
		name string
		d    int
	}
	most := min(2, len(name)/3)
	var found []near
	for n := range names {
		if n == "" || len(n) > maxCompare || n == name {
			continue
		}
		d := most + 1
		if abs(len(n)-len(name)) <= most {
			d = distance(name, n)
		}
		if trim(n) == trim(name) {
			d = 0 // __state for state
		}
		if d > most {
			continue
		}
		i, dup := slices.BinarySearchFunc(found, near{n, d}, func(a, b near) int {
			return cmp.Or(a.d-b.d, strings.Compare(a.name, b.name))
		})
		if !dup {
			found = slices.Insert(found, i, near{n, d})
			found = found[:min(len(found), maxSuggest)]
		}
	}
	if len(found) == 0 {
		return ""
	}
	var b strings.Builder
	for i, f := range found {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(f.name)
	}
	return " (near: " + b.String() + ")"
}

func trim(s string) string { return strings.ToLower(strings.Trim(s, "_")) }

func abs(n int) int { return max(n, -n) }

// distance returns the Levenshtein distance of two names of at most maxCompare bytes.
func distance(a, b string) int {
	var row [maxCompare + 1]int
	for j := range len(b) + 1 {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// fieldNames yields the names that member finds, at most maxVisited.
func (t *Type) fieldNames() iter.Seq[string] {
	return func(yield func(string) bool) {
		queue := []*Type{t}
		for budget := maxVisited; len(queue) > 0 && budget > 0; queue = queue[1:] {
			u := queue[0]
			if u.load() != nil {
				continue
			}
			for _, m := range u.members {
				if budget--; budget == 0 {
					return
				}
				if m.name != "" {
					if !yield(m.name) {
						return
					}
				} else if m.typ != nil {
					queue = append(queue, m.typ.Underlying())
				}
			}
		}
	}
}
