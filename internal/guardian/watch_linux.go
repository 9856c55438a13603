package guardian

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmprobes/vmprobes/internal/journal"
	"github.com/vmprobes/vmprobes/internal/target"
)

// request asks a guardian to watch the guest whose journal is at path.
type request struct {
	path  string
	limit time.Duration
}

const requestWord = "watch "

// String returns the line in which it is sent.
func (r request) String() string { return fmt.Sprintf("%s%d %s\n", requestWord, r.limit, r.path) }

func parseRequest(line string) (r request, err error) {
	rest, ok := strings.CutPrefix(line, requestWord)
	limit, path, ok2 := strings.Cut(rest, " ")
	n, err := strconv.ParseInt(limit, 10, 64)
	if !ok || !ok2 || err != nil || n <= 0 {
		return r, fmt.Errorf("%q is no request", line)
	}
	return request{path, time.Duration(n)}, nil
}

// A guest is one that is watched: target.Watch, but for tests.
type guest interface {
	Owner() journal.Owner
	// Over: its owner has left it.
	Over() bool
	// Beats grows as long as the owner answers.
	Beats() (uint64, error)
	// Waits says for what of its owner the guest waits, or "".
	Waits() (why string, err error)
	Close() error
}

// look opens the guest whose journal is at a path.
var look = func(path string) (guest, error) { return target.Look(path) }

// A warden ends a process whose guest waits for it in vain.
type warden struct {
	owner int    // its process number
	began uint64 // its start time
	look  func(path string) (guest, error)
	log   func() (*slog.Logger, func())

	process int // a pidfd, if guests isn't nil
	guests  []*ward
	ticker  *time.Ticker
	every   time.Duration // of the ticker
	last    time.Time     // when it had looked last
	ended   bool          // the process was sent SIGKILL
}

// ward is a guest of a warden's.
type ward struct {
	guest
	request
	beats  uint64
	why    string
	waited time.Duration // for which the guest has been seen to wait for the same answer
	told   string        // the last trouble
}

// A guest is looked at so many times within its limit, but not more often than slowest
// and fastest say.
const (
	looks   = 8
	fastest = 10 * time.Millisecond
	slowest = time.Second
)

// add begins to watch a guest.
func (w *warden) add(line string) error {
	r, err := parseRequest(line)
	if err != nil {
		return err
	}
	if w.guests == nil {
		if w.process, err = openProcess(w.owner, w.began); err != nil {
			return fmt.Errorf("process %d couldn't be ended: %w", w.owner, err)
		}
		debug.SetGCPercent(100) // to look at a guest that waits takes memory
		w.guests = []*ward{}
	}
	g, err := w.look(r.path)
	if err != nil {
		return err
	}
	if o := g.Owner(); o.PID != w.owner || o.Start != w.began {
		return errors.Join(fmt.Errorf("%s is of %v", r.path, o), g.Close())
	}
	beats, err := g.Beats()
	if err != nil {
		return errors.Join(err, g.Close())
	}
	w.guests = append(w.guests, &ward{guest: g, request: r, beats: beats})
	w.pace()
	return nil
}

// openProcess returns a pidfd of the process with that number and start time. It goes on
// meaning that one.
func openProcess(pid int, began uint64) (fd int, err error) {
	fd, err = unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, os.NewSyscallError("pidfd_open", err)
	}
	// A process that has the number now and began then had it when it was opened.
	if now, err := journal.StartTime(pid); err != nil || now != began {
		return -1, errors.Join(errors.New("it is another one"), err, unix.Close(fd))
	}
	return fd, nil
}

// pace sets the ticker as fast as the shortest limit wants it.
func (w *warden) pace() {
	if len(w.guests) == 0 {
		if w.ticker != nil {
			w.ticker.Stop()
			w.ticker, w.every = nil, 0
		}
		return
	}
	every := slowest
	for _, g := range w.guests {
		every = min(every, max(g.limit/looks, fastest))
	}
	switch {
	case every == w.every:
		return
	case w.ticker == nil:
		w.ticker = time.NewTicker(every)
	default:
		w.ticker.Reset(every)
	}
	w.every, w.last = every, time.Now()
}

// ticks says when to look.
func (w *warden) ticks() <-chan time.Time {
	if w.ticker == nil || w.ended {
		return nil
	}
	return w.ticker.C
}

// tick looks at the guests, and ends their owner if one has waited for too long.
func (w *warden) tick() {
	// If this process was stopped, or the whole machine, the other one hadn't this time
	// either.
	passed := min(time.Since(w.last), 2*w.every)
	defer func() { w.last = time.Now() }() // what is seen by now may have begun just now
	left := w.guests[:0]
	for _, g := range w.guests {
		if g.Over() {
			_ = g.Close()
			continue
		}
		left = append(left, g)
		if err := g.see(passed); err != nil {
			w.trouble(g, "look at a guest", err)
		}
		if g.waited < g.limit || w.ended {
			continue
		}
		log, done := w.log()
		log.Error("a guest waits for a process that doesn't answer, which is ended", "pid", w.owner, "program", g.Owner().Program,
			"journal", g.path, "for", g.limit, "guest", g.why)
		done()
		// It is dead when its end of the connection is closed, and can't change the guest
		// any more when the journal's lock is free.
		if err := unix.PidfdSendSignal(w.process, unix.SIGKILL, nil, 0); err != nil {
			w.trouble(g, "end the process", os.NewSyscallError("pidfd_send_signal", err))
		} else {
			w.ended = true
		}
	}
	clear(w.guests[len(left):])
	w.guests = left
	w.pace()
}

// see looks whether the guest waits, as it did at the last look.
func (g *ward) see(passed time.Duration) error {
	beats, err := g.Beats()
	if err != nil || beats != g.beats {
		g.beats, g.waited, g.why = beats, 0, ""
		return err
	}
	why, err := g.Waits()
	if err != nil || why == "" {
		g.waited, g.why = 0, ""
		return err
	}
	if again, err := g.Beats(); err != nil || again != beats { // it answers at this moment
		g.beats, g.waited, g.why = again, 0, ""
		return err
	}
	// What it waits for began after the last look, if it didn't wait then.
	if g.why != "" {
		g.waited += passed
	}
	g.why = why
	return nil
}

// trouble says once what keeps a warden from its work.
func (w *warden) trouble(g *ward, what string, err error) {
	if msg := err.Error(); msg != g.told {
		g.told = msg
		log, done := w.log()
		defer done()
		log.Error(what, "journal", g.path, "err", err)
	}
}
