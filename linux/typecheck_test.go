package linux_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/vmprobes/vmprobes/internal/kerneltest"
	"github.com/vmprobes/vmprobes/ktype"
	"github.com/vmprobes/vmprobes/linux"
)

// isf is a symbol file in which the idle task has its right name.
func isf(tb testing.TB, banner string, tasks int) *ktype.Types {
	tb.Helper()
	data := base64.StdEncoding.EncodeToString([]byte(banner))
	t, err := ktype.FromISF(strings.NewReader(fmt.Sprintf(`{
		"base_types": {"pointer": {"size": 8, "kind": "int", "endian": "little"}, "char": {"size": 1, "signed": true, "kind": "char"},
			"int": {"size": 4, "signed": true, "kind": "int"}},
		"user_types": {
			"list_head": {"kind": "struct", "size": 16, "fields": {"next": {"offset": 0, "type": {"kind": "pointer", "subtype": {"kind": "struct", "name": "list_head"}}}}},
			"task_struct": {"kind": "struct", "size": 512, "fields": {
				"tasks": {"offset": %d, "type": {"kind": "struct", "name": "list_head"}},
				"pid": {"offset": %d, "type": {"kind": "base", "name": "int"}},
				"comm": {"offset": %d, "type": {"kind": "array", "count": 16, "subtype": {"kind": "base", "name": "char"}}}}}},
		"symbols": {"linux_banner": {"address": 1, "constant_data": %q}}}`,
		tasks, kerneltest.TaskPID, kerneltest.TaskComm, data)))
	require.NoError(tb, err)
	return t
}

// TestWrongTypes gives types of other kernels, in which the idle task has the right
// name.
func TestWrongTypes(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{})
	types := func(given *ktype.Types, l kerneltest.Layout) (string, error) {
		g := s
		if l != (kerneltest.Layout{}) {
			g = kerneltest.NewSynthetic(l)
		}
		k, err := linux.Discover(t.Context(), g.Machine(), &linux.Options{Types: given})
		if err != nil {
			return "", err
		}
		if _, err := k.Types(); err != nil {
			return "", err
		}
		for _, r := range k.Explain() {
			if r.Name == "types" {
				return r.String(), nil
			}
		}
		return "", nil
	}

	// By the version string.
	const other = "Linux version 9.9.8-synthetic (me@here) #1 SMP"
	said, err := types(isf(t, kerneltest.SyntheticBanner+"\n\x00", kerneltest.TaskTasks), kerneltest.Layout{})
	require.NoError(t, err)
	assert.Contains(t, said, "ISF, as given; of the same version string; ")
	_, err = types(isf(t, other+"\n\x00", kerneltest.TaskTasks), kerneltest.Layout{})
	require.ErrorIs(t, err, linux.ErrWrongTypes)
	require.ErrorContains(t, err, other)
	require.ErrorContains(t, err, kerneltest.SyntheticBanner)

	// By what is in memory, where the file doesn't say.
	said, err = types(isf(t, "", kerneltest.TaskTasks), kerneltest.Layout{})
	require.NoError(t, err)
	assert.Contains(t, said, "nothing in the file says of which kernel they are; the idle task is called swapper by them, and 2 known values")
	_, err = types(isf(t, "", kerneltest.TaskTasks+8), kerneltest.Layout{})
	require.ErrorIs(t, err, linux.ErrWrongTypes)
	require.ErrorContains(t, err, "task_struct.tasks of init_task")

	// Raw BTF is that of the kernel, or another's.
	blob := bytes.Clone(s.Bytes(s.Sym["__start_BTF"])[:s.Sym["__stop_BTF"]-s.Sym["__start_BTF"]])
	raw := func() *ktype.Types {
		r, err := ktype.FromBTF(bytes.NewReader(blob), int64(len(blob)))
		require.NoError(t, err)
		return r
	}
	said, err = types(raw(), kerneltest.Layout{})
	require.NoError(t, err)
	assert.Contains(t, said, "the same as the kernel's own")
	said, err = types(raw(), kerneltest.Layout{NoTypes: true})
	require.NoError(t, err)
	assert.Contains(t, said, "nothing in the file says of which kernel they are")
	blob = bytes.Replace(blob, []byte("\x00euid\x00"), []byte("\x00egid\x00"), 1)
	_, err = types(raw(), kerneltest.Layout{})
	require.ErrorIs(t, err, linux.ErrWrongTypes)
}

// TestFacts holds types that a known value contradicts.
func TestFacts(t *testing.T) {
	s := kerneltest.NewSynthetic(kerneltest.Layout{NoTypes: true})
	layout := func(change func(name string, f *ktype.StructField)) *ktype.Types {
		fields := []ktype.StructField{
			{Name: "tasks", Offset: kerneltest.TaskTasks, Type: "list_head"}, {Name: "pid", Offset: kerneltest.TaskPID, Type: "int"},
			{Name: "real_parent", Offset: kerneltest.TaskParent, Type: "task_struct *"}, {Name: "comm", Offset: kerneltest.TaskComm, Type: "char[16]"},
		}
		for i := range fields {
			change(fields[i].Name, &fields[i])
		}
		r, err := ktype.New("given", 8, ktype.Struct{Name: "list_head", Fields: []ktype.StructField{
			{Name: "next", Type: "list_head *"}, {Name: "prev", Offset: 8, Type: "list_head *"}}}, ktype.Struct{Name: "task_struct", Fields: fields})
		require.NoError(t, err)
		return r
	}
	for _, wrong := range []string{"", "tasks", "pid", "real_parent", "comm"} {
		k, err := linux.Discover(t.Context(), s.Machine(), &linux.Options{Types: layout(func(name string, f *ktype.StructField) {
			if name == wrong {
				f.Offset = kerneltest.TaskCred
			}
		})})
		require.NoError(t, err)
		_, err = k.Types()
		if wrong == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, linux.ErrWrongTypes, wrong)
	}
}
