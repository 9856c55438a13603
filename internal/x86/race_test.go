//go:build race

package x86

// raceEnabled: the race detector makes sync.Pool forget things on purpose.
const raceEnabled = true
