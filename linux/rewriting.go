package linux

// Rewriting reports whether the kernel is changing its own code at this moment, as
// far as that can be told: whoever does so holds text_mutex (kernel/extable.c; see
// text_poke_bp in arch/x86/kernel/alternative.c). The guest should stand still.
//
// struct mutex begins with its owner, 0 if there is none (include/linux/mutex_types.h).
// With PREEMPT_RT it begins with a spin lock, which tells less.
func (k *Kernel) Rewriting() bool {
	addr, err := k.symbol("text_mutex")
	if err != nil {
		return false
	}
	owner, err := k.pointer(addr)
	return err == nil && owner != 0
}
