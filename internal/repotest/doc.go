// Package repotest holds what this repository says of itself against what it is:
// ARCHITECTURE.md against the imports, the ledger of skipped tests against the tests
// and the Makefile, and the commands in its pages against the targets and programs
// that there are. It has tests only.
package repotest
