# Tenon. Everything a newcomer needs is one word; see README.md.
BIN     := bin
PROGS   := tenon tenond tenon-shim tenon-dns tenon-vmm tenon-lazy tenon-oci tenon-build

.PHONY: all build run stop clean-state test test-v2 vet fuzz bench install help
all: build

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

build: ## the programs, into bin/
	@BIN=$(BIN) scripts/build

run: ## install what is missing, build, start the daemon, run real containers
	@scripts/run

stop: ## stop all containers and the daemon, leave nothing behind
	@scripts/stop

clean-state: ## remove the state (images, volumes, containers) of a stopped daemon
	@scripts/clean-state

test: ## install what the tests need and run all of them
	@scripts/test

test-v2: build ## the end-to-end tests on Debian 12's kernel and cgroup v2, in QEMU (a quarter of an hour)
	@TENON_BIN=$(CURDIR)/$(BIN) test/cgroupv2/run

vet: ## formatting and static checks
	@scripts/vet

fuzz: ## each fuzzer for a while (FUZZTIME=30s)
	@scripts/fuzz

bench: build ## compare with peers, installing them first
	@bench/run

install: build ## into PREFIX (default /usr/local), with the systemd unit
	@BIN=$(BIN) PREFIX=$(PREFIX) DESTDIR=$(DESTDIR) scripts/install
