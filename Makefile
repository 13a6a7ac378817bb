# make run     a program in a virtual machine, from nothing: what it needs is installed, built and made on the way
# make test    every check and every test; ends with one line of counts
# make lab     the hypervisors' tests on KVM that works, in a machine that emulates it (docs/internals/lab.md); as root
# make kernel  a small, fast guest kernel out of Debian's source, for this node (10 to 30 minutes, once); its tools are installed
# make lint    formatting, clippy, layers, licences
# make setup   what is missing on a Debian host, installed with apt
# make clean   build results (a node's state stays: it is yours)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.PHONY: run test lab kernel lint setup clean

VISTARA := target/release/vistara
IMAGE := vistara-demo/python3
PROGRAM := import os, platform; print(f"hello from {platform.release()}, {os.cpu_count()} cpu, pid {os.getpid()}")

run: setup
	started=$$(date +%s)
	echo "building Vistara: some minutes the first time, and silent"
	cargo build --release --quiet --package vistara
	$(VISTARA) kernel ls --json | grep '"name"' >/dev/null || { echo "fetching a guest kernel"; $(VISTARA) kernel add debian; }
	if ! $(VISTARA) images ls --json | grep '$(IMAGE)' >/dev/null; then
		archive=$$(cargo xtask demo-image)
		$(VISTARA) images import "$$archive" --name $(IMAGE)
	fi
	echo "$$ vistara run --timings --explain $(IMAGE) -- python3 -c '…'"
	$(VISTARA) run --timings --explain $(IMAGE) -- python3 -c '$(PROGRAM)'
	echo "took $$(( $$(date +%s) - started )) s in all; the next time takes seconds"

test: setup
	cargo xtask test

lab: setup
	cargo xtask lab --tests

kernel:
	scripts/setup kernel
	cargo build --release --quiet --package vistara
	$(VISTARA) kernel build

lint: setup
	cargo xtask lint

setup:
	scripts/setup

clean:
	cargo clean
