//go:build linux

package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var guest = Identity{Name: "a3guest", Kind: "pv", Domain: 7, Handle: []byte{1, 2, 3}, Build: "01d2"}

func made(t *testing.T) (dir string, f *File) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "vmprobes")
	f, err := Create(dir, "domain-7", guest, 100)
	require.NoError(t, err)
	return dir, f
}

func records(t *testing.T, f *File) (all []Record) {
	t.Helper()
	require.NoError(t, f.Records(func(r Record) error {
		all = append(all, Record{r.Kind, bytes.Clone(r.Data)})
		return nil
	}))
	return all
}

func TestOwner(t *testing.T) {
	dir, f := made(t)
	st, err := os.Stat(dir)
	require.NoError(t, err)
	assert.Equal(t, fs.FileMode(0o700), st.Mode().Perm())
	for _, again := range []func() (*File, error){
		func() (*File, error) { return Create(dir, "domain-7", guest, 0) },
		func() (*File, error) { return Open(f.Path()) },
	} {
		_, err = again()
		require.ErrorIs(t, err, ErrBusy)
		var busy *BusyError
		require.ErrorAs(t, err, &busy)
		assert.Equal(t, os.Getpid(), busy.Owner.PID)
		start, err := StartTime(os.Getpid())
		require.NoError(t, err)
		assert.Equal(t, start, busy.Owner.Start)
	}
	other, err := Create(dir, "domain-8", guest, 0)
	require.NoError(t, err)
	require.NoError(t, other.Remove())

	require.NoError(t, f.Close())
	_, err = Create(dir, "domain-7", guest, 0)
	require.ErrorIs(t, err, ErrHot)
	all, err := List(dir)
	require.NoError(t, err)
	require.Len(t, all, 1)
	assert.True(t, all[0].Hot)
	assert.Equal(t, guest, all[0].Guest)

	hot, err := Open(f.Path())
	require.NoError(t, err)
	all, err = List(dir)
	require.NoError(t, err)
	assert.False(t, all[0].Hot, "asking doesn't take the lock, nor does it overlook it")
	require.NoError(t, hot.Remove())
	_, err = Open(f.Path())
	require.ErrorIs(t, err, fs.ErrNotExist)
	all, err = List(dir)
	require.NoError(t, err)
	assert.Empty(t, all)
	all, err = List(dir + "x")
	require.NoError(t, err)
	assert.Empty(t, all)
}

func TestSame(t *testing.T) {
	assert.True(t, guest.Same(guest))
	for _, change := range []func(*Identity){
		func(i *Identity) { i.Kind = "hvm" }, func(i *Identity) { i.Domain++ },
		func(i *Identity) { i.Handle = []byte{1, 2, 4} }, func(i *Identity) { i.Build = "01d3" },
	} {
		other := guest
		change(&other)
		assert.False(t, guest.Same(other), "%+v", other)
	}
	other := guest
	other.Name, other.Build = "renamed", ""
	assert.True(t, guest.Same(other))
}

// TestOutlives has another process write a journal, and kills it.
func TestOutlives(t *testing.T) {
	if dir := os.Getenv("VMPROBES_TEST_JOURNAL"); dir != "" {
		f, err := Create(dir, "domain-7", guest, 100)
		if err != nil {
			panic(err)
		}
		if err := f.Append(Record{1, []byte("one")}, Record{2, nil}); err != nil {
			panic(err)
		}
		copy(f.State(), "state")
		fmt.Println("written")
		select {}
	}
	dir := filepath.Join(t.TempDir(), "vmprobes")
	cmd := exec.Command(os.Args[0], "-test.run=^TestOutlives$")
	cmd.Env = append(os.Environ(), "VMPROBES_TEST_JOURNAL="+dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line := make([]byte, 8)
	_, err = out.Read(line)
	require.NoError(t, err)
	require.Equal(t, "written\n", string(line))
	_, err = Open(Path(dir, "domain-7"))
	var busy *BusyError
	require.ErrorAs(t, err, &busy)
	assert.Equal(t, cmd.Process.Pid, busy.Owner.PID)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	f, err := Open(Path(dir, "domain-7"))
	require.NoError(t, err)
	assert.Equal(t, []Record{{1, []byte("one")}, {2, []byte{}}}, records(t, f))
	assert.Equal(t, "state", string(f.State()[:5]))
	assert.Equal(t, cmd.Process.Pid, f.Owner().PID)
	require.NoError(t, f.Remove())
}

// TestOneWins starts many owners at the same instant, of a guest whose journal comes and
// goes.
func TestOneWins(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vmprobes")
	for range 100 {
		var won, lost atomic.Int64
		begin, tried := make(chan struct{}), make(chan struct{})
		var wg sync.WaitGroup
		var all sync.WaitGroup
		all.Add(8)
		for range 8 {
			wg.Go(func() {
				<-begin
				f, err := Create(dir, "domain-7", guest, 0)
				all.Done()
				switch {
				case err == nil:
					won.Add(1)
					<-tried
					assert.NoError(t, f.Remove())
				case errors.Is(err, ErrBusy):
					lost.Add(1)
				default:
					assert.NoError(t, err)
				}
			})
		}
		close(begin)
		all.Wait()
		close(tried)
		wg.Wait()
		require.EqualValues(t, 1, won.Load())
		require.EqualValues(t, 7, lost.Load())
	}
}

// TestLetsGo: what is stored after Close doesn't reach the next owner, and a file that is
// removed isn't kept by its mapping.
func TestLetsGo(t *testing.T) {
	_, f := made(t)
	copy(f.State(), "mine")
	require.NoError(t, f.Close())
	next, err := Open(f.Path())
	require.NoError(t, err)
	copy(f.State(), "late")
	assert.Equal(t, "mine", string(next.State()[:4]))
	require.NoError(t, next.Remove())
	maps, err := os.ReadFile("/proc/self/maps")
	require.NoError(t, err)
	assert.NotContains(t, string(maps), f.Path())
	copy(next.State(), "later")
}

func TestReplace(t *testing.T) {
	_, f := made(t)
	var want []Record
	for i := range 300 {
		r := Record{uint8(i), bytes.Repeat([]byte{byte(i)}, i)}
		want = append(want, r)
		require.NoError(t, f.Append(r))
	}
	assert.Equal(t, want, records(t, f))
	size := f.Size()
	want = []Record{{9, []byte("all of it")}}
	require.NoError(t, f.Replace(want...))
	assert.Less(t, f.Size(), size)
	assert.Equal(t, want, records(t, f))
	want = append(want, Record{10, []byte("and more")})
	require.NoError(t, f.Append(want[1]))
	require.NoError(t, f.Close())
	f, err := Open(f.Path())
	require.NoError(t, err)
	assert.Equal(t, want, records(t, f))
	want = append(want, Record{11, []byte{}})
	require.NoError(t, f.Append(want[2]))
	assert.Equal(t, want, records(t, f))
	require.NoError(t, f.Replace())
	assert.Empty(t, records(t, f))
	require.NoError(t, f.Remove())
	require.ErrorIs(t, f.Append(want[0]), ErrClosed)
}

// TestTorn cuts a journal off at every byte of its last record: what is before it counts.
func TestTorn(t *testing.T) {
	_, f := made(t)
	first := Record{1, []byte("first")}
	require.NoError(t, f.Append(first))
	end := f.end
	require.NoError(t, f.Append(Record{2, []byte("last")}))
	last := f.end
	require.NoError(t, f.Close())
	whole, err := os.ReadFile(f.Path())
	require.NoError(t, err)
	for n := end; n < last; n++ {
		for _, zeros := range []int{0, 3} { // of a file that was made longer before it was written
			require.NoError(t, os.WriteFile(f.Path(), append(bytes.Clone(whole[:n]), make([]byte, zeros)...), 0o600))
			f, err := Open(f.Path())
			require.NoError(t, err, "%d bytes of it", n-end)
			require.Equal(t, []Record{first}, records(t, f), "%d bytes of it", n-end)
			require.NoError(t, f.Append(Record{3, []byte("after it")}))
			require.Equal(t, []Record{first, {3, []byte("after it")}}, records(t, f))
			require.NoError(t, f.Close())
		}
	}
}

// TestDamaged changes every byte of a journal in turn: it is unreadable, or says what it
// did, but for the end of its last record.
func TestDamaged(t *testing.T) {
	_, f := made(t)
	want := []Record{{1, []byte("first")}, {2, []byte("second")}, {3, []byte("third")}}
	require.NoError(t, f.Append(want...))
	log, end := int64(binary.LittleEndian.Uint64(f.m[offLog:])), f.end
	require.NoError(t, f.Close())
	whole, err := os.ReadFile(f.Path())
	require.NoError(t, err)
	check := func(at int64) {
		for _, flip := range []byte{1, 0x80, 0xff} {
			b := bytes.Clone(whole)
			b[at] ^= flip
			require.NoError(t, os.WriteFile(f.Path(), b, 0o600))
			f, err := Open(f.Path())
			if err != nil {
				require.ErrorIs(t, err, ErrUnreadable, "byte %d", at)
				continue
			}
			got := records(t, f)
			if len(got) == len(want)-1 && at >= end-recordFixed-5 {
				got = append(got, want[len(want)-1])
			}
			require.Equal(t, want, got, "byte %d", at)
			require.NoError(t, f.Close())
		}
	}
	for at := range int64(offInfo + 200) {
		check(at)
	}
	for at := log; at < end; at++ {
		check(at)
	}
}

func TestForeignFiles(t *testing.T) {
	dir, f := made(t)
	require.NoError(t, f.Remove())
	path := Path(dir, "domain-7")
	secret := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(secret, []byte("secret"), 0o600))
	require.NoError(t, os.Symlink(secret, path))
	_, err := Create(dir, "domain-7", guest, 0)
	require.ErrorIs(t, err, syscall.ELOOP, "a link isn't followed")
	_, err = Open(path)
	require.ErrorIs(t, err, syscall.ELOOP)
	b, err := os.ReadFile(secret)
	require.NoError(t, err)
	require.Equal(t, "secret", string(b))
	require.NoError(t, os.Remove(path))

	require.NoError(t, os.WriteFile(path, []byte("something else"), 0o600))
	_, err = Create(dir, "domain-7", guest, 0)
	require.ErrorIs(t, err, ErrUnreadable, "it isn't overwritten")
	_, err = Open(path)
	require.ErrorIs(t, err, ErrUnreadable)
	require.NoError(t, os.WriteFile(path, make([]byte, 2*headerSize), 0o600))
	f, err = Create(dir, "domain-7", guest, 0)
	require.NoError(t, err, "one that was just being made")
	require.NoError(t, f.Remove())

	require.NoError(t, os.Chmod(dir, 0o777))
	_, err = Create(dir, "domain-7", guest, 0)
	require.ErrorContains(t, err, "may be written by everybody")
}

// TestReserved: the state has its space from the beginning. A store to it that finds none
// would end the process.
func TestReserved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vmprobes")
	f, err := Create(dir, "domain-7", guest, 1<<20)
	require.NoError(t, err)
	var st syscall.Stat_t
	require.NoError(t, syscall.Stat(f.Path(), &st))
	assert.GreaterOrEqual(t, st.Blocks*512, int64(headerSize+1<<20)) // stat(2): blocks of 512 bytes
	require.NoError(t, f.Remove())
}

// TestFolderOfAnother: somebody else may have made the folder, where anybody can.
func TestFolderOfAnother(t *testing.T) {
	dir, me := t.TempDir(), os.Geteuid()
	require.NoError(t, checkDir(dir, me))
	if me == 0 {
		require.NoError(t, checkDir(dir, 4321), "root's")
		me = 4321
		require.NoError(t, os.Chown(dir, me, -1))
		require.NoError(t, checkDir(dir, 0), "root has its folder where nobody else makes one")
	}
	require.NoError(t, checkDir(dir, me))
	require.ErrorIs(t, checkDir(dir, me+1), fs.ErrPermission)
	require.NoError(t, os.Chmod(dir, 0o777))
	require.Error(t, checkDir(dir, me))
	_, err := List(dir)
	require.Error(t, err)
	_, err = Open(Path(dir, "domain-7"))
	require.Error(t, err)
	require.NotErrorIs(t, err, fs.ErrNotExist)
}

// TestListForeignFiles: what is no journal doesn't keep List from its end, and a journal
// that is being made isn't one yet.
func TestListForeignFiles(t *testing.T) {
	dir, f := made(t)
	require.NoError(t, syscall.Mkfifo(filepath.Join(dir, "fifo.journal"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "new.journal"), make([]byte, 2*headerSize), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "empty.journal"), nil, 0o600))
	done := make(chan []Entry, 1)
	go func() {
		entries, err := List(dir)
		assert.NoError(t, err)
		done <- entries
	}()
	select {
	case entries := <-done:
		require.Len(t, entries, 2)
		assert.Equal(t, f.Path(), entries[0].Path)
		require.NoError(t, entries[0].Err)
		assert.Error(t, entries[1].Err, "the FIFO")
	case <-time.After(20 * time.Second):
		t.Fatal("List waits for a FIFO")
	}
}

func TestFileName(t *testing.T) {
	assert.Equal(t, "domain-7.journal", fileName("domain-7"))
	assert.Equal(t, "qemu%3a%2frun%2fvm%0a%2esock.journal", fileName("qemu:/run/vm\n.sock"))
	long := "qemu:/" + strings.Repeat("folder/", 50)
	one, other := fileName(long+"gdb"), fileName("x"+long[1:]+"gdb")
	assert.Len(t, one, longName+len(suffix))
	assert.NotEqual(t, one, other, "two that differ at the beginning alone")
	assert.Contains(t, one, "folder%2fgdb"+suffix)
}

// memFile is a file in memory.
type memFile struct{ b []byte }

func (m *memFile) ReadAt(b []byte, off int64) (int, error) {
	return bytes.NewReader(m.b).ReadAt(b, off)
}

func (m *memFile) WriteAt(b []byte, off int64) (int, error) {
	m.b = append(m.b[:off:off], b...)
	return len(b), nil
}

func (m *memFile) sync() error            { return nil }
func (m *memFile) size() (int64, error)   { return int64(len(m.b)), nil }
func (m *memFile) truncate(n int64) error { m.b = m.b[:n]; return nil }
func (m *memFile) reserve(int64) error    { return nil }

func (m *memFile) mapShared(n int) ([]byte, error) { return m.b[:n:n], nil }
func (m *memFile) unmap([]byte) error              { return nil }
func (m *memFile) letGo([]byte) error              { return nil }
func (m *memFile) forget(int64, int64)             {}
func (m *memFile) remove() error                   { return nil }
func (m *memFile) Close() error                    { return nil }

func FuzzOpen(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "vmprobes")
	j, err := Create(dir, "domain-7", guest, 0)
	require.NoError(f, err)
	require.NoError(f, j.Append(Record{1, []byte("first")}, Record{2, []byte("second")}))
	require.NoError(f, j.Close())
	b, err := os.ReadFile(j.Path())
	require.NoError(f, err)
	f.Add(b)
	f.Add(b[:headerSize])
	f.Add(b[:len(b)-3])
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := open(&memFile{bytes.Clone(b)}, "x")
		if err != nil {
			require.ErrorIs(t, err, ErrUnreadable)
			return
		}
		n := len(records(t, j))
		require.NoError(t, j.Append(Record{3, []byte("more")}))
		require.Len(t, records(t, j), n+1)
		require.NoError(t, j.Close())
	})
}
