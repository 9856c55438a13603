package labguest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestConfigFile(t *testing.T) {
	t.Setenv("VMPROBES_LAB", "hvm")
	t.Setenv("VMPROBES_LAB_CMDLINE", "lpj=1")
	file := Config{Name: "x", VCPUs: 2, Cmdline: "a=b", Extra: []string{"cpus = 1"}}.withDefaults().file()
	for _, want := range []string{
		`name = "x"`, `type = "pvh"`, `kernel = "/lab/kernels/6.1/vmlinux"`, `cmdline = "console=hvc0 quiet rcupdate.rcu_cpu_stall_timeout=60 watchdog_thresh=30 lpj=1 a=b"`,
		"memory = 256", "vcpus = 2", "nomigrate = 1", "cpus = 1",
	} {
		assert.Contains(t, strings.Split(file, "\n"), want)
	}
	t.Setenv("VMPROBES_LAB", "pv")
	assert.Contains(t, Config{}.withDefaults().file(), `type = "pv"`)
}

func TestIs(t *testing.T) {
	for host, want := range map[string][]string{
		"": nil, "pv": {"pv"}, "pv-stock": {"pv-stock"}, "hvm": {"hvm"}, "hvm-amd": {"hvm", "hvm-amd"},
		"pv-4.20": {"pv"}, "pv-stock-4.20": {"pv-stock"}, "hvm-4.20": {"hvm"}, "hvm-9.99": nil,
	} {
		t.Setenv("VMPROBES_LAB", host)
		var got []string
		for _, other := range []string{"pv", "pv-stock", "hvm", "hvm-amd"} {
			if Is(other) {
				got = append(got, other)
				Require(t, "no-such-host", other)
			}
		}
		assert.Equal(t, want, got, "in %q", host)
		kind := PV
		if Is("hvm") {
			kind = PVH
		}
		assert.Equal(t, kind, Config{}.withDefaults().Kind, "in %q", host)
	}
}

func TestRequireOutsideTheLab(t *testing.T) {
	t.Setenv("VMPROBES_LAB", "")
	t.Setenv("VMPROBES_REQUIRE_LAB", "")
	skipped := t.Run("skips", func(t *testing.T) {
		Require(t, "pv")
		t.Fatal("not skipped")
	})
	assert.True(t, skipped)
}

// TestGuest drives a guest of each kernel in this dom0, with one vCPU and two.
func TestGuest(t *testing.T) {
	Require(t)
	for _, kernel := range Kernels() {
		for vcpus := 1; vcpus <= 2; vcpus++ {
			t.Run(fmt.Sprintf("%s/vcpus=%d", kernel, vcpus), func(t *testing.T) { testGuest(t, kernel, vcpus) })
		}
	}
}

func testGuest(t *testing.T, kernel string, vcpus int) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	begin := time.Now()
	g, err := Start(ctx, Config{Name: "driven", Kernel: kernel, VCPUs: vcpus})
	require.NoError(t, err)
	defer func() { assert.NoError(t, g.Destroy()) }()
	t.Logf("domain %d, %s, up in %v", g.DomID(), g.Ready(), time.Since(begin).Round(100*time.Millisecond))
	assert.True(t, strings.HasPrefix(g.Ready(), kernel+"."), g.Ready())
	assert.True(t, strings.HasSuffix(g.Ready(), fmt.Sprint(" ", vcpus)), g.Ready())

	do := func(command string) string {
		t.Helper()
		begin := time.Now()
		reply, err := g.Command(ctx, command)
		require.NoError(t, err)
		t.Logf("%s: %.200s (%v)", command, reply, time.Since(begin).Round(time.Millisecond))
		return reply
	}
	reply := do("open 1000 all")
	assert.Contains(t, reply, fmt.Sprintf("open total=%d ", 1000*vcpus))
	for cpu := range vcpus {
		assert.Contains(t, reply, fmt.Sprintf(" cpu%d=1000 ", cpu))
	}
	assert.Contains(t, reply, "mem=ok")
	assert.NotContains(t, reply, "BAD")
	assert.Contains(t, do("open 7"), "open total=7 cpu0=7 ")
	assert.Contains(t, do("openpath /init"), "calls=1 opened")
	assert.Contains(t, do("int3user 5"), "sent=5 sigtraps=5")
	assert.Contains(t, do("busy 0 all"), fmt.Sprint("cpus=", vcpus))
	do("sleep 500")
	do("count")
	assert.Contains(t, do("stop"), "running=0")
	assert.Contains(t, do("kallsyms do_sys_openat2"), "0xffffffff8")
	assert.Contains(t, do("text do_sys_openat2 16"), "text 0xffffffff8")
	hash := do("texthash")
	assert.Equal(t, hash, do("texthash"))
	do("textkeep")
	assert.Equal(t, "textchanges other=0 own=0", do("textchanges"))
	do("check")
	assert.Contains(t, do("dmesg"), "bad=0")
	_, err = g.Command(ctx, "nonsense")
	require.ErrorContains(t, err, "unknown command")
}
