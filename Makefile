# make demo   a real Xen with a real guest, and every file that the guest opens
# make test   everything a contributor should see pass
# make help   the rest

GO          = $(shell tools/go)
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
LAB         = bin/lab
# Hosts of the lab on which every test is known to pass; hvm isn't there yet: see
# lab-hvm.
HOSTS       = pv pv-stock
FUZZTIME    = 5s

# What the machine must have, as Debian packages: a compiler for cgo, objdump as
# the tests' oracle, and Xen's headers for the binding's check. The lab adds its own.
PACKAGES = git make gcc libc6-dev binutils libxen-dev ca-certificates

export CGO_ENABLED = 1

.PHONY: help
help:
	@echo 'make demo        boot the lab, run vmprobebio on its guest'
	@echo 'make demo HOST=hvm   the same with a PVH guest'
	@echo 'make test        check, then the lab in short'
	@echo 'make check       what needs no emulator (2 minutes)'
	@echo 'make lab-test    the whole matrix of PV guests in the lab'
	@echo 'make lab-hvm     a PVH guest in the lab'
	@echo 'make lab-shell   a dom0 prompt (HOST=pv or hvm)'
	@echo 'make fuzz        fuzz every target for FUZZTIME=$(FUZZTIME)'
	@echo 'make bench       benchmarks'
	@echo 'make deps        install the Debian packages that all this needs'
	@echo 'make clean       remove what was built here (the cache stays)'

# --- what the machine needs

.PHONY: deps deps-check deps-lab
deps: deps-check deps-lab
deps-check:
	@tools/install $(PACKAGES) $$(tools/go >/dev/null 2>&1 || echo golang-go)
deps-lab: deps-check $(LAB)
	@$(LAB) install

# --- without an emulator

.PHONY: check build lint unit headers
check: deps-check lint build headers unit

build:
	$(GO) build ./...
	CGO_ENABLED=0 $(GO) build ./...

lint:
	@fmt=$$($$($(GO) env GOROOT)/bin/gofmt -l .); if [ -n "$$fmt" ]; then echo "gofmt would change:" $$fmt; exit 1; fi
	$(GO) vet ./...
	CGO_ENABLED=0 $(GO) vet ./...
	GOOS=darwin CGO_ENABLED=0 $(GO) vet ./...
	GOOS=windows CGO_ENABLED=0 $(GO) vet ./...
	GOARCH=arm64 CGO_ENABLED=0 $(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

# The binding's own declarations against Xen's headers. A cache of its own: Go's
# doesn't notice when headers are installed.
headers:
	$(GO) test -count=1 -tags xenheaders ./xenctrl

unit: export VMPROBES_REQUIRE_LAB =
unit:
	$(GO) test -race -short ./...
	$(GO) test ./...

.PHONY: fuzz bench
fuzz:
	@for pkg in $$($(GO) list ./...); do \
		dir=$$($(GO) list -f '{{.Dir}}' $$pkg); \
		for f in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$dir/*_test.go 2>/dev/null | cut -c6-); do \
			echo "== $$pkg $$f"; \
			$(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$pkg || exit 1; \
		done; \
	done

bench:
	$(GO) test -run '^$$' -bench . -benchmem ./...

# --- the lab

HOST = pv

.PHONY: FORCE
FORCE:

$(LAB): FORCE
	@$(GO) build -o $@ ./lab

bin/vmprobes.test: FORCE
	@$(GO) test -c -o $@ .
bin/xenctrl.test: FORCE
	@$(GO) test -c -o $@ ./xenctrl
bin/vmprobebio: FORCE
	@$(GO) build -o $@ ./examples/vmprobebio
bin/demo: FORCE
	@$(GO) build -o $@ ./lab/demo
bin/opens: FORCE
	@$(GO) build -o $@ ./examples/opens

IN_DOM0 = $(LAB) bin/vmprobes.test bin/xenctrl.test bin/vmprobebio bin/opens bin/demo
FILES   = --file bin/vmprobebio:/bin/vmprobebio --file bin/opens:/bin/opens --file bin/xenctrl.test:/bin/xenctrl.test

.PHONY: demo demo-xen
demo demo-xen: deps-lab $(IN_DOM0)
	@$(LAB) build $(HOST)
	@$(LAB) run $(HOST) $(FILES) -- bin/demo

.PHONY: test lab-build lab-short lab-test lab-shell
test: check lab-short

lab-build: deps-lab $(IN_DOM0)
	@for h in $(HOSTS); do $(LAB) build $$h || exit 1; done

lab-short: lab-build
	@for h in $(HOSTS); do \
		echo "== lab: $$h, in short"; \
		VMPROBES_REQUIRE_LAB=$(VMPROBES_REQUIRE_LAB) $(LAB) run $$h $(FILES) -- bin/vmprobes.test -test.v -test.short -test.run "$$(tools/labtests $$h)" || exit 1; \
	done

lab-test: lab-build
	@for h in $(HOSTS); do \
		echo "== lab: $$h"; \
		VMPROBES_REQUIRE_LAB=$(VMPROBES_REQUIRE_LAB) $(LAB) run $$h --timeout 40m --kernels 6.1,6.12 $(FILES) -- bin/vmprobes.test -test.v -test.timeout 40m -test.run "$$(tools/labtests $$h)" || exit 1; \
	done

# The monitor route on a PVH guest, in short. Its emulator is slow (a quarter of an
# hour), and the guest doesn't always come up.
.PHONY: lab-hvm
lab-hvm: deps-lab $(IN_DOM0)
	@$(LAB) build hvm
	@$(LAB) run hvm $(FILES) -- bin/vmprobes.test -test.v -test.short -test.run "$$(tools/labtests hvm)"

lab-shell: deps-lab $(IN_DOM0)
	@$(LAB) build $(HOST)
	@$(LAB) shell $(HOST)

.PHONY: clean
clean:
	rm -rf bin
