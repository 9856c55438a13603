package linux

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/sysmap"
)

// Errors of making a function return early.
var (
	// ErrNotInjectable: the kernel doesn't list the function among those that may fail
	// without having done anything.
	ErrNotInjectable = errors.New("not among the functions that the kernel lists for error injection")
	// ErrNoErrorInjection: the kernel has no such list. It wraps ErrNotInjectable.
	ErrNoErrorInjection = fmt.Errorf("%w: it has no list (CONFIG_FUNCTION_ERROR_INJECTION)", ErrNotInjectable)
	// ErrReturnValue: the function may fail, but its callers know no such value of it.
	ErrReturnValue = errors.New("the function doesn't fail with this value")
)

const (
	maxInjectable = 1 << 13 // functions; system calls make up most of them
	maxErrno      = 4095    // MAX_ERRNO, include/linux/err.h
)

// What a function returns when it fails (EI_ETYPE_NULL and on, include/asm-generic/
// error-injection.h). In kernels up to 6.1, and maybe some later ones, EI_ETYPE_NONE comes
// before these, so that all are greater by one: see firstKind.
const (
	injectNull      = iota // NULL
	injectErrno            // -ERRNO
	injectErrnoNull        // -ERRNO or NULL
	injectTrue             // true
	injectKinds
)

// injectable is a function that may be made to fail.
type injectable struct {
	start uint64
	kind  uint32 // by the kernel's own number
}

// Injectable returns nil if the kernel expects that the function that begins at fn is made to
// return value, at its first instruction, instead of being executed: if its error
// injection may do so (error_injection_list in lib/error-inject.c). Otherwise the error wraps
// ErrNotInjectable or, if only the value is wrong, ErrReturnValue.
func (k *Kernel) Injectable(fn, value uint64) error {
	if k == nil {
		return ErrNoKernel
	}
	o := k.begin("functions for error injection")
	list, err := o.injectable()
	if errors.Is(err, sysmap.ErrNotFound) && !o.has([]string{"within_error_injection_list"}) {
		return fmt.Errorf("%#x: %w", fn, ErrNoErrorInjection)
	}
	if err != nil {
		return fmt.Errorf("%#x: %w: the list can't be read: %w", fn, ErrNotInjectable, err)
	}
	first, known := k.firstKind(list)
	for _, e := range list {
		if e.start != fn {
			continue
		}
		kind := e.kind - first
		switch {
		case !known || kind >= injectKinds:
			return fmt.Errorf("%#x: %w: its kind, %d, isn't known", fn, ErrNotInjectable, e.kind)
		case value == 0 && (kind == injectNull || kind == injectErrnoNull):
		case value == 1 && kind == injectTrue:
		case -value-1 < maxErrno && (kind == injectErrno || kind == injectErrnoNull):
		default:
			return fmt.Errorf("%#x: %w: %#x, but %s", fn, ErrReturnValue, value,
				[...]string{"NULL", "-ERRNO", "-ERRNO or NULL", "true"}[kind])
		}
		return nil
	}
	return fmt.Errorf("%#x: %w", fn, ErrNotInjectable)
}

// firstKind returns the kernel's number of the first kind: system calls are of the second
// one (SYSCALL_DEFINEx, arch/x86/include/asm/syscall_wrapper.h).
func (k *Kernel) firstKind(list []injectable) (first uint32, known bool) {
	for _, e := range list {
		if sym, off, ok := k.syms.Find(e.start); ok && off == 0 && strings.HasPrefix(sym.Name, "__x64_sys_") && (e.kind == injectErrno || e.kind == injectErrno+1) {
			return e.kind - injectErrno, true
		}
	}
	return 0, false
}

// injectable reads error_injection_list: struct ei_entry { list_head list; unsigned long
// start_addr, end_addr; int etype; void *priv } (lib/error-inject.c, since 4.16).
func (o *op) injectable() ([]injectable, error) {
	head, err := o.symbol("error_injection_list")
	if err != nil {
		return nil, err
	}
	word := uint64(o.bits / 8)
	types, err := ktype.New("usual layout", word, listHead(word), ktype.Struct{Name: "ei_entry", Size: 6 * word, Fields: []ktype.StructField{
		{Name: "list", Offset: 0, Type: "list_head"},
		{Name: "start_addr", Offset: 2 * word, Type: "unsigned long"},
		{Name: "etype", Offset: 4 * word, Type: "int"},
	}})
	if err != nil {
		return nil, err
	}
	if t, err := o.Types(); err == nil && t.HasField("ei_entry.etype") && t.HasField("ei_entry.start_addr") && t.HasField("ei_entry.list") {
		types = t
	}
	return again(o, func() ([]injectable, error) {
		var list []injectable
		for at, err := range types.List(o, head, "ei_entry", "list", maxInjectable) {
			if err != nil {
				return nil, err
			}
			v := types.At(o, "ei_entry", at)
			start, err := v.Field("start_addr").Uint()
			if err != nil {
				return nil, err
			}
			kind, err := v.Field("etype").Uint()
			if err != nil {
				return nil, err
			}
			list = append(list, injectable{start, uint32(kind)})
		}
		return list, nil
	})
}
