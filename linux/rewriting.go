package linux

// Rewriting reports whether the kernel is changing its own code at this moment, as
// far as that can be told: code that does so holds text_mutex (kernel/extable.c; see
// text_poke_bp in arch/x86/kernel/alternative.c). The answer is worth most while the
// guest is stopped.
//
// struct mutex begins with its owner, 0 if there is none (include/linux/mutex_types.h).
// With PREEMPT_RT it begins with the lock of its waiters, which is held for moments
// only: there Rewriting misses most.
func (k *Kernel) Rewriting() bool {
	addr, err := k.symbol("text_mutex")
	if err != nil {
		return false
	}
	owner, err := k.pointer(addr)
	return err == nil && owner != 0
}
