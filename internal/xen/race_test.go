//go:build race

package xen_test

const raceDetector = true
