package xentest

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// Check compares the guest's counters with each other: every call of every
// function must have been counted as often as the main loops and interrupts
// that led to it. It holds while the vCPUs are parked.
func (m *Machine) Check() error {
	m.lock()
	defer m.mu.Unlock()
	if m.oops != "" {
		return fmt.Errorf("xentest: the guest went wrong: %s", m.oops)
	}
	names := map[int]string{ctrMain: "main", ctrIRQ: "event_entry", ctrInt3: "int3_entry"}
	for _, s := range m.prog.syms {
		if _, ok := names[s.counter]; !ok {
			names[s.counter] = s.Name
		}
	}
	for _, f := range m.prog.funcs {
		for end, c := range map[string]int{"returns": f.returned, "unwinds": f.unwound, "deaths": f.died} {
			if _, ok := names[c]; !ok {
				names[c] = end + " of " + f.name
			}
		}
	}
	var inc, xadd uint64
	for _, v := range m.v {
		loops, irqs := m.counter(v, ctrMain), m.counter(v, ctrIRQ)
		for i := range ctrMax {
			want := m.perMain[i]*loops + m.perIRQ[i]*irqs
			got := m.counter(v, i)
			if got != want {
				return fmt.Errorf("xentest: vcpu %d executed %s %d times, must be %d", v.id, names[i], got, want)
			}
			switch names[i] {
			case "inc_mem":
				inc += got
			case "lock_xadd":
				xadd += got
			}
		}
	}
	if got := m.read64(DataBase + dInc); got != inc {
		return fmt.Errorf("xentest: shared counter incremented %d times, must be %d", got, inc)
	}
	if got := m.read64(DataBase + dXadd); got != xadd {
		return fmt.Errorf("xentest: shared counter added to %d times, must be %d", got, xadd)
	}
	return nil
}

// Verify fails t unless the guest is as if no tool had ever been there: its text
// is textBefore (from Text), nothing went wrong, its counters agree, no vCPU is
// stuck or single-stepped, and all make progress. Whether debugger or monitor
// are still attached is not looked at. The machine is left parked and running as
// it was before.
func Verify(t testing.TB, m *Machine, textBefore []byte) {
	t.Helper()
	text := m.Text()
	for i := range textBefore {
		if text[i] != textBefore[i] {
			t.Errorf("text at %#x is %#02x, was %#02x", TextBase+uint64(i), text[i], textBefore[i])
			break
		}
	}
	if s := m.Oops(); s != "" {
		t.Errorf("oops: %s", s)
		return
	}
	if s := m.Stuck(); len(s) != 0 {
		t.Errorf("stuck vCPUs %v: %s", s, m.State())
		return
	}
	m.lock()
	was := m.park
	for _, v := range m.v {
		if v.single {
			t.Errorf("vcpu %d is left single-stepping", v.id)
		}
		flags := v.flags
		if v.setRegs != nil { // from a response that the vCPU has not acted on yet
			flags = v.setRegs.RFLAGS
		}
		if flags&flTF != 0 {
			t.Errorf("vcpu %d is left with TF", v.id)
		}
	}
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for round := range 2 {
		if err := m.Quiesce(ctx); err != nil {
			t.Error(err)
			return
		}
		if err := m.Check(); err != nil {
			t.Error(err)
		}
		if round == 1 {
			break
		}
		before := make([]uint64, len(m.v))
		for i := range before {
			before[i] = m.Counter(i)
		}
		m.Release()
		for i := 0; i < len(before); {
			if m.Counter(i) >= before[i]+2 {
				i++
				continue
			}
			if m.Oops() != "" || ctx.Err() != nil {
				t.Errorf("vcpu %d makes no progress: %s %s", i, m.Oops(), m.State())
				return
			}
			if m.Started() {
				time.Sleep(20 * time.Microsecond)
			} else if m.Run(500) == 0 {
				t.Errorf("vcpu %d makes no progress: %s", i, m.State())
				return
			}
		}
	}
	if !was {
		m.Release()
	}
}
