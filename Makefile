# make demo   a Linux guest in QEMU, and every file that it opens
# make test   everything a contributor should see pass
# make help   the rest

GO          = $(shell tools/go)
# Programs written in Go that check this one: their versions are in tools/go.mod, so
# that nobody who uses the library has them among its dependencies.
TOOL        = $(GO) tool -modfile=tools/go.mod
LAB         = bin/lab
# The lab calls plain "go", and tools/go may have found one that isn't on PATH.
RUN_LAB     = PATH="$(dir $(GO)):$$PATH" $(LAB)
# Hosts of the lab. Those of LATER_HOSTS have Debian 13's Xen: make test-all runs on them
# too, unless it is told HOSTS.
HOSTS       = pv pv-stock hvm hvm-amd
LATER_HOSTS = pv-stock-4.20 hvm-4.20 pv-4.20
FUZZTIME    = 20s

# What the machine must have, as Debian packages: a compiler for cgo, objdump as
# the tests' oracle, and Xen's headers for the binding's check. The lab adds its own.
PACKAGES = git make gcc libc6-dev binutils libxen-dev ca-certificates

export CGO_ENABLED = 1

.PHONY: help
help:
	@echo 'make demo        boot Linux in QEMU, run vmprobebio on it'
	@echo 'make demo-xen    the same with a PV guest on a real Xen (HOST=hvm: PVH)'
	@echo 'make test        check, then QEMU guests and the lab in short, and fuzz beside them'
	@echo 'make test-all    the whole matrix: every guest in QEMU and on each host of the lab, $(LATER_HOSTS) too'
	@echo 'make check       what needs no emulator (6 minutes)'
	@echo 'make test-oracles  what needs debug kernels, pahole and bpftool (300 MB to fetch)'
	@echo 'make test-kernels  every kernel of Debian 11 to 13, backports and sid (KERNELS=pattern, KERNELS_EACH=1, KERNELS_FOR=1h): hours'
	@echo 'make test-qemu   Linux guests in QEMU'
	@echo 'make lab-short   one guest on each host of the lab (HOSTS=$(HOSTS))'
	@echo 'make lab-test    every guest on each host (HOSTS=$(HOSTS), GUESTS=pattern)'
	@echo 'make lab-shell   a dom0 prompt (HOST=pv, hvm or hvm-amd)'
	@echo 'make vm          a Linux guest in QEMU to try things on'
	@echo 'make fuzz        fuzz every target for FUZZTIME=$(FUZZTIME)'
	@echo 'make interleave  INTERLEAVINGS=$(INTERLEAVINGS) interleavings on the simulated Xen (hours)'
	@echo 'make kill        KILLS=$(KILLS) tools killed on the simulated Xen, and their guests repaired (hours)'
	@echo 'make bench       benchmarks (BENCH=pattern); with BASE=revision, compared with it'
	@echo 'make bench-lab   hits a second beside a minimal C loop, on a real Xen (HOST=pv or hvm)'
	@echo 'make deps        install the Debian packages that all this needs'
	@echo 'make clean       remove what was built here (the cache stays)'

# --- what the machine needs

.PHONY: deps deps-go deps-check deps-lab
deps: deps-check deps-lab
deps-go:
	@tools/go >/dev/null 2>&1 || tools/install golang-go ca-certificates
deps-check:
	@tools/install $(PACKAGES) $$(tools/go >/dev/null 2>&1 || echo golang-go)
deps-lab: deps-check $(LAB)
	@$(LAB) install

# --- without an emulator

.PHONY: check build lint vet-all unit headers headers-all
check: deps-check lint build headers unit

build:
	$(GO) build ./...
	CGO_ENABLED=0 $(GO) build ./...

lint:
	@fmt=$$($$($(GO) env GOROOT)/bin/gofmt -l .); if [ -n "$$fmt" ]; then echo "gofmt would change:" $$fmt; exit 1; fi
	$(GO) vet ./...
	CGO_ENABLED=0 $(GO) vet ./...
	GOOS=darwin CGO_ENABLED=0 $(GO) vet ./...
	$(TOOL) staticcheck ./...
	@tools/gofix "$(GO)"

# Other systems, each with a standard library to compile first, and the oldest Go that
# go.mod says is enough.
vet-all: deps-go
	GOTOOLCHAIN=go$$(awk '$$1 == "go" { print $$2 }' go.mod) $(GO) vet ./...
	GOOS=windows CGO_ENABLED=0 $(GO) vet ./...
	GOOS=freebsd CGO_ENABLED=0 $(GO) vet ./...
	GOARCH=arm64 CGO_ENABLED=0 $(GO) vet ./...

# The binding's own declarations against Xen's headers. A cache of its own: Go's
# doesn't notice when headers are installed.
headers:
	$(GO) test -count=1 -tags xenheaders ./xenctrl

# And against those of each release of Xen that the lab has.
XEN_RELEASES = 4.17 4.20
headers-all: deps-lab
	@for r in $(XEN_RELEASES); do \
		dir=$$($(RUN_LAB) headers $$r) && echo "== Xen $$r: $$dir" && \
		CGO_CFLAGS="-I$$dir" $(GO) test -count=1 -tags xenheaders ./xenctrl || exit 1; \
	done

unit: export VMPROBES_REQUIRE_LAB =
unit: export VMPROBES_REQUIRE_QEMU =
unit:
	$(GO) test -race -short ./...
	$(GO) test ./...

# What compares with kernels' debug information, with pahole and bpftool, and with what a
# guest says of itself beside its memory: 300 MB to fetch the first time.
.PHONY: test-oracles
test-oracles: deps-lab
	@$(LAB) install demo
	@tools/install binutils busybox-static pahole bpftool gcc-multilib xz-utils
	@$(RUN_LAB) build guests
	@tools/oracles "$(GO)"

# Every kernel that Debian has, beside what it says of itself: hours, and some 20 GB to
# fetch, of which 5 are kept. What this very code has run already isn't run again. It
# writes docs/kernels.md after each kernel.
KERNELS      = .
KERNELS_FOR  = 0
# How many of each family: of one series, flavour and Debian. 0: all.
KERNELS_EACH = 0
KERNELS_PAGE = docs/kernels.md
.PHONY: test-kernels
test-kernels: deps-lab
	@$(LAB) install demo
	PATH="$(dir $(GO)):$$PATH" VMPROBES_LAB=$(CURDIR)/$(LAB) $(GO) test -count=1 -timeout 48h -v -run '^TestKernels$$' ./lab/kernels \
		-args -kernels '$(KERNELS)' -for $(KERNELS_FOR) -each $(KERNELS_EACH) -write $(CURDIR)/$(KERNELS_PAGE)

.PHONY: fuzz fuzz-beside bench
fuzz:
	@mkdir -p bin && rm -f bin/fuzz.failed
	@tools/fuzz "$(GO)" $(FUZZTIME) bin/fuzz.failed
fuzz-beside:
	@nice $(MAKE) fuzz

# BASE=REVISION compares with it, by benchstat.
BENCH = .
COUNT = $(if $(BASE),6,1)
bench:
	@tools/bench "$(GO)" '$(BENCH)' $(COUNT) $(BASE)

# Random operations and failures on the simulated Xen, with fresh seeds: the nightly
# form of a test that "make check" runs in short.
INTERLEAVINGS = 1000000
# How often to kill a tool on the simulated Xen.
KILLS = 1000000
.PHONY: kill
kill: deps-go
	VMPROBES_KILLS=$(KILLS) $(GO) test -count=1 -timeout 24h -run '^TestKilled(WithRing)?$$' ./internal/recovery

.PHONY: interleave
interleave: deps-go
	VMPROBES_INTERLEAVINGS=$(INTERLEAVINGS) $(GO) test -count=1 -timeout 24h -run '^TestInterleaved$$' -v ./internal/breakpoint

# --- the lab

HOST = pv

.PHONY: FORCE
FORCE:

# As the lab builds what it needs, so that the standard library is compiled once.
$(LAB): deps-go FORCE
	@[ -x $@ ] || echo "compiling bin/lab, and Go's standard library with it: half a minute the first time"
	@CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./lab

# Without debug information: the emulator has to load all of it.
STRIP = -ldflags="-s -w"

bin/vmprobes.test: FORCE
	@$(GO) test -c $(STRIP) -o $@ .
bin/xenctrl.test: FORCE
	@$(GO) test -c $(STRIP) -o $@ ./xenctrl
bin/vmprobebio: FORCE
	@$(GO) build $(STRIP) -o $@ ./examples/vmprobebio
bin/demo: FORCE
	@$(GO) build $(STRIP) -o $@ ./lab/demo
bin/opens: FORCE
	@$(GO) build $(STRIP) -o $@ ./examples/opens
bin/image.test: FORCE
	@$(GO) test -c $(STRIP) -o $@ ./image
bin/process-list: FORCE
	@$(GO) build $(STRIP) -o $@ ./examples/process-list
bin/module-list: FORCE
	@$(GO) build $(STRIP) -o $@ ./examples/module-list

PROGRAMS = vmprobebio opens process-list module-list
IN_DOM0  = $(LAB) bin/vmprobes.test bin/xenctrl.test bin/demo $(PROGRAMS:%=bin/%)
FILES    = $(foreach p,$(PROGRAMS) xenctrl.test,--file bin/$(p):/bin/$(p))

.PHONY: demo demo-xen vm
demo vm: $(LAB)
	@$(LAB) install demo
	@$(RUN_LAB) $@

demo-xen: deps-lab $(IN_DOM0)
	@$(RUN_LAB) build $(HOST)
	@$(RUN_LAB) run $(HOST) $(FILES) -- bin/demo

.PHONY: test test-all test-emulators test-qemu test-qemu-guests test-qemu-driver lab-build lab-short lab-test lab-image lab-shell bench-lab
# Emulators leave part of a second processor: fuzzing gets that.
test: check
	@$(MAKE) -j2 test-emulators fuzz-beside || { cat bin/fuzz.failed 2>/dev/null; exit 1; }
test-emulators: test-qemu
	@$(MAKE) lab-short

test-all: HOSTS := $(HOSTS) $(LATER_HOSTS)
test-all: vet-all headers-all lab-test lab-image
	@$(MAKE) test-qemu test-qemu-driver QEMU_GUESTS=.
	@$(MAKE) test-qemu-guests QEMU_TESTS='^TestQEMUReturns$$' QEMU_GUESTS=.
	@$(MAKE) test-kernels KERNELS_EACH=1 KERNELS_PAGE=bin/kernels.md

# What xl dump-core writes, read by package image.
lab-image: deps-lab bin/image.test
	@$(RUN_LAB) build pv
	@$(IN_LAB) pv -- bin/image.test -test.v -test.run Xl

# Guests in QEMU, by default the oldest and the newest kernel.
QEMU_GUESTS = 6.1-1vcpu|6.12-2vcpu
QEMU_TESTS = ^TestQEMU(Boot|Locks|Reset|Ftrace)?$$
test-qemu test-qemu-guests test-qemu-driver: export VMPROBES_REQUIRE_LAB =
test-qemu: deps-lab
	@$(RUN_LAB) build guests
	VMPROBES_REQUIRE_QEMU=1 $(GO) test -count=1 -race -short -timeout 20m ./internal/qemu
	VMPROBES_REQUIRE_QEMU=1 $(GO) test -count=1 -timeout 20m ./linux ./xenaccess ./image ./internal/kerneltext ./examples
	@$(MAKE) test-qemu-guests

test-qemu-guests: deps-lab
	@$(RUN_LAB) build guests
	VMPROBES_REQUIRE_QEMU=1 $(GO) test -count=1 -timeout 30m -run '$(QEMU_TESTS)/($(QEMU_GUESTS))' .

# What the driver's tests leave out in short, too.
test-qemu-driver: deps-lab
	@$(RUN_LAB) build guests
	VMPROBES_REQUIRE_QEMU=1 $(GO) test -count=1 -timeout 20m ./internal/qemu

lab-build: deps-lab $(IN_DOM0)
	@for h in $(HOSTS); do $(RUN_LAB) build $$h || exit 1; done

IN_LAB = VMPROBES_REQUIRE_LAB=$(VMPROBES_REQUIRE_LAB) $(RUN_LAB) run
lab-short: lab-build
	@for h in $(HOSTS); do \
		echo "== lab: $$h, in short"; \
		$(IN_LAB) $$h $(FILES) -- bin/vmprobes.test -test.v -test.short -test.run "$$(tools/labtests $$h short)" || exit 1; \
	done

# Guests to test, of a host's: all.
GUESTS = .
lab-test: lab-build
	@for h in $(HOSTS); do \
		echo "== lab: $$h, guests $(GUESTS)"; \
		$(IN_LAB) $$h --timeout 120m --kernels 6.1,6.12 $(FILES) -- bin/vmprobes.test -test.v -test.timeout 120m -test.run "$(or $(TESTS),$$(tools/labtests $$h))/($(GUESTS))" || exit 1; \
	done

# Ours beside a minimal C loop, in one boot.
bin/bench: FORCE
	@$(GO) build $(STRIP) -o $@ ./lab/bench
bin/cloop: lab/bench/cloop/loop.c
	@mkdir -p bin
	$(CC) -O2 -std=gnu11 -Wall -o $@ $< -lxenctrl -lxenevtchn -lxenforeignmemory
bench-lab: deps-lab bin/bench bin/cloop
	@$(RUN_LAB) build $(HOST)
	@$(RUN_LAB) run $(HOST) --kernels 6.1 --file bin/cloop:/bin/cloop -- bin/bench

lab-shell: deps-lab $(IN_DOM0)
	@$(RUN_LAB) build $(HOST)
	@$(RUN_LAB) shell $(HOST)

.PHONY: clean
clean:
	rm -rf bin
