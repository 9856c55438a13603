package linux

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vmprobes/vmprobes/ktype"
)

// checkOrigin compares what a file with types says of its kernel with what runs: the
// build id, or the version string, or, of raw BTF, the kernel's own. It returns what
// shows that they are the same, or "" if nothing can be compared.
func (k *Kernel) checkOrigin(t *ktype.Types) (why string, err error) {
	o := t.Origin()
	whose := "of another"
	if len(o.Banners) > 0 {
		whose = printable(fmt.Sprintf("%q", o.Banners[0]))
	}
	switch {
	case o.BuildID != "" && k.buildID != "":
		if o.BuildID != k.buildID {
			return "", fmt.Errorf("%w: they are of the build %s, %s, and the guest runs %s, %q", ErrWrongTypes, o.BuildID, whose, k.buildID, k.banner)
		}
		return "of the same build id", nil
	case len(o.Banners) > 0:
		if !slices.Contains(o.Banners, k.banner) {
			return "", fmt.Errorf("%w: they are of %s, and the guest runs %q", ErrWrongTypes, whose, k.banner)
		}
		return "of the same version string", nil
	case t.Source() != "BTF":
		return "", nil
	}
	own, _, err := k.ownBTF()
	if err != nil {
		return "", nil //nolint:nilerr // it has none
	}
	if !t.IsBTF(own) {
		return "", fmt.Errorf("%w: the BTF that it carries itself (%s) is another; without a file that is used", ErrWrongTypes, size(uint64(len(own))))
	}
	return "the same as the kernel's own", nil
}

// checkTypes looks at the idle task, whose name is known.
func (k *Kernel) checkTypes(t *ktype.Types) error {
	if n := t.PointerSize() * 8; n != uint64(k.bits) {
		return fmt.Errorf("%w: they are of a kernel of %d bits", ErrWrongTypes, n)
	}
	init, err := k.initTask()
	if err != nil {
		// A kernel without CONFIG_KALLSYMS_ALL.
		if init, err = k.searchIdle(t); err != nil {
			return fmt.Errorf("%w: no idle task is found by them: %w", ErrWrongTypes, err)
		}
		k.idleAddr.Store(init)
	}
	name, err := t.At(k, "task_struct", init).Field("comm").CString()
	if err != nil || !strings.HasPrefix(name, "swapper") {
		return fmt.Errorf("%w: the idle task would be called %q", errors.Join(ErrWrongTypes, err), name)
	}
	return nil
}

// A fact is a word of the running kernel that is known without types.
type fact struct {
	of     string // a struct
	object string // the symbol of one
	field  string
	want   []string // symbols, one of whose addresses the word is; none: it is zero
	booted bool     // it is so once the kernel has booted
}

// facts are from init/init_task.c, mm/init-mm.c, and setup_arch (arch/x86/kernel/
// setup.c), which sets where the kernel's parts begin and end. Nothing changes them
// later.
var facts = []fact{
	{of: "task_struct", object: "init_task", field: "pid"},
	{of: "task_struct", object: "init_task", field: "tgid"},
	{of: "task_struct", object: "init_task", field: "mm"},
	{of: "task_struct", object: "init_task", field: "exit_state"},
	{of: "task_struct", object: "init_task", field: "real_parent", want: []string{"init_task"}},
	{of: "task_struct", object: "init_task", field: "group_leader", want: []string{"init_task"}},
	{of: "task_struct", object: "init_task", field: "cred", want: []string{"init_cred"}},
	{of: "task_struct", object: "init_task", field: "signal", want: []string{"init_signals"}},
	{of: "task_struct", object: "init_task", field: "nsproxy", want: []string{"init_nsproxy"}},
	{of: "mm_struct", object: "init_mm", field: "pgd", want: []string{"init_top_pgt", "init_level4_pgt", "swapper_pg_dir"}},
	{of: "mm_struct", object: "init_mm", field: "start_code", want: []string{"_text"}, booted: true},
	{of: "mm_struct", object: "init_mm", field: "end_code", want: []string{"_etext"}, booted: true},
	{of: "mm_struct", object: "init_mm", field: "end_data", want: []string{"_edata"}, booted: true},
}

// checkLayout holds types against what is known to be in the kernel's memory, and says
// what it has found. Where their origin is known, the idle task's name is enough: a
// later kernel may have other facts.
func (k *Kernel) checkLayout(t *ktype.Types) (why string, err error) {
	if err := k.checkTypes(t); err != nil {
		return "", err
	}
	const swapper = "the idle task is called swapper by them"
	if k.givenTypes == t && k.typesWhy != "" {
		return k.typesWhy + "; " + swapper, nil
	}
	good := 0
	for _, f := range facts {
		ok, err := k.holds(t, f)
		if err != nil {
			return "", fmt.Errorf("%w: %s.%s of %s: %w", ErrWrongTypes, f.of, f.field, f.object, err)
		}
		if ok {
			good++
		}
	}
	linked, err := k.linked(t)
	if err != nil {
		return "", fmt.Errorf("%w: task_struct.tasks of init_task: %w", ErrWrongTypes, err)
	}
	if linked {
		good++
	}
	why = fmt.Sprintf("%s, and %d known values are where they say", swapper, good)
	if good == 0 {
		why = "nothing in the guest can be compared with them"
	}
	if k.givenTypes == t {
		why = "nothing in the file says of which kernel they are; " + why
	}
	return why, nil
}

// holds reports whether a fact is as types say, or false if that can't be told: the
// kernel lacks a symbol, or the types lack the member.
func (k *Kernel) holds(t *ktype.Types, f fact) (bool, error) {
	at, err := k.symbol(f.object)
	if err != nil {
		return false, nil //nolint:nilerr // not to be compared
	}
	if f.booted && k.booting() != nil {
		return false, nil
	}
	var want []uint64
	for _, name := range f.want {
		if a, err := k.symbol(name); err == nil {
			want = append(want, a)
		}
	}
	if len(f.want) > 0 && len(want) == 0 {
		return false, nil
	}
	v := t.At(k, f.of, at).Field(f.field)
	if err := v.Err(); err != nil {
		return false, lacking(err)
	}
	got, err := v.Uint()
	if errors.Is(err, ktype.ErrKind) {
		got, err = v.Pointer()
	}
	if err != nil {
		return false, err
	}
	if len(f.want) == 0 && got != 0 || len(f.want) > 0 && !slices.Contains(want, got) {
		return false, fmt.Errorf("%#x is there, not %s", got, strings.Join(orZero(f.want), " or "))
	}
	return true, nil
}

// linked reports whether the element behind the idle task, which is init for ever,
// points back to it.
func (k *Kernel) linked(t *ktype.Types) (bool, error) {
	init, err := k.initTask()
	if err != nil {
		return false, nil //nolint:nilerr // not to be compared
	}
	f, err := t.Offset("task_struct.tasks")
	if err != nil {
		return false, lacking(err)
	}
	next, err := k.pointer(init + f.Offset)
	if err != nil {
		return false, err
	}
	back, err := k.pointer(next + uint64(k.bits/8))
	if err != nil {
		return false, err
	}
	if back != init+f.Offset {
		return false, fmt.Errorf("what it points to, %#x, points back to %#x", next, back)
	}
	return true, nil
}

func orZero(names []string) []string {
	if len(names) == 0 {
		return []string{"0"}
	}
	return names
}

// lacking returns nil for the error that types don't have something.
func lacking(err error) error {
	_, err = optional(0, err)
	return err
}
