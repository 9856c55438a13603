package xentest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// Seeds runs f n times with a fresh seed each, as subtests of that name, some of them at
// once: most of their time goes by in waiting. When three have failed no more are begun.
// VMPROBES_SEED is a seed to be used instead (as far as that goes: goroutines have a will
// of their own).
func Seeds(t *testing.T, n, atOnce int, f func(t *testing.T, seed uint64)) {
	var left, failures atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for left.Add(-1) >= 0 && failures.Load() < 3 {
				seed := rand.Uint64()
				if n, err := strconv.ParseUint(os.Getenv("VMPROBES_SEED"), 10, 64); err == nil {
					seed = n
				}
				if !t.Run(fmt.Sprint(seed), func(t *testing.T) { f(t, seed) }) {
					failures.Add(1)
				}
			}
		})
	}
	wg.Wait()
}
