//go:build !linux

package guardian

import (
	"log/slog"
	"time"
)

// Start does nothing where there are no guests to look after.
func Start(*slog.Logger) error { return nil }

// Watch fails there.
func Watch(string, time.Duration) error { return ErrNoGuardian }

// Ring fails there.
func Ring(string) error { return ErrNoGuardian }
