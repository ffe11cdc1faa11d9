# vhostcache: `make run` shows it, `make test` proves it, `make help` lists the rest. Set-up happens by itself: Debian packages that
# are missing (as root or with sudo), Python packages in .venv, libvhost-user's source, the build, a guest kernel. It is redone only
# when something it depends on has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# Any Python from 3.11 on; Debian 12's own when `python3` is something older.
PYTHON ?= $(shell python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v python3 || echo /usr/bin/python3)
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .cache/stamps
# The installed package is what is tested, never the source tree: that has no compiled engine in it.
export PYTHONSAFEPATH := 1
export PYTHONDONTWRITEBYTECODE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BUILD_PACKAGES := build-essential dpkg-dev pkg-config python3-venv python3-dev liburing-dev libnbd-dev libglib2.0-dev
GUEST_PACKAGES := qemu-system-x86 qemu-utils busybox-static e2fsprogs xfsprogs fio cpio xz-utils kmod
TEST_PACKAGES := cryptsetup-bin nbdkit openssl user-mode-linux dbench util-linux libvirt-daemon-system libvirt-clients libxml2-utils systemd clang-14 libclang-rt-14-dev valgrind
LINT_PACKAGES := clang-14 shellcheck libxml2-utils libvirt-clients

# How long `make soak` works at each of its parts, how often it kills the daemon in each of avocado/kills.py, how long storage is gone in
# avocado/backends.py, and how long `make fuzz` works at each target.
SOAK_SECONDS ?= 600
SOAK_KILLS ?= 100
SOAK_OUTAGE_SECONDS ?= 600
SOAK_SEEDS ?= 1000000
FUZZ_SECONDS ?= 20

SOURCES := $(shell find csrc vhostcache meson.build meson.options pyproject.toml -not -path '*/__pycache__*')
SHELL_SCRIPTS := $(shell grep -slE '^\#!/bin/(ba)?sh' .ci/run scripts/* tests/guest/* examples/*)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-8s%s\n", $$1, $$2}'

# ---------------------------------------------------------------------------------------------------------------- set-up

.PHONY: packages-build packages-guest packages-test packages-lint
packages-build:
	@scripts/install-packages $(BUILD_PACKAGES)
packages-guest:
	@scripts/install-packages $(GUEST_PACKAGES)
packages-test:
	@scripts/install-packages $(BUILD_PACKAGES) $(GUEST_PACKAGES) $(TEST_PACKAGES)
packages-lint:
	@scripts/install-packages $(BUILD_PACKAGES) $(LINT_PACKAGES)

$(STAMPS)/venv: pyproject.toml scripts/python-requirements | packages-build
	@echo "python: $(VENV) from $(PYTHON)"
	@mkdir -p $(STAMPS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python scripts/python-requirements > $(STAMPS)/requirements.txt
	@$(BIN)/python -m pip install -q -r $(STAMPS)/requirements.txt
	@# Lets `tests` be imported from anywhere; it stands behind the installed package on the path.
	@echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vhostcache-tests.pth"
	@touch $@

$(STAMPS)/libvhost-user: scripts/fetch-libvhost-user | packages-build
	@mkdir -p $(STAMPS)
	@scripts/fetch-libvhost-user
	@touch $@

# The meson folder stays, so that only what has changed is compiled again.
$(STAMPS)/install: $(SOURCES) $(STAMPS)/venv $(STAMPS)/libvhost-user
	@echo "build: vhostcache into $(VENV)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps --force-reinstall \
		--config-settings=build-dir=build/release .
	@touch $@

$(STAMPS)/guest: scripts/build-guest tests/guest/init | packages-guest
	@mkdir -p $(STAMPS)
	@scripts/build-guest .cache/guest
	@touch $@

.PHONY: setup setup-guest setup-test
setup: packages-build $(STAMPS)/install ## build and install into .venv
setup-guest: setup packages-guest $(STAMPS)/guest
setup-test: packages-test setup-guest

# ------------------------------------------------------------------------------------------------------------------- use

.PHONY: run shell
run: setup-guest ## a real QEMU guest on a cached disk: hammered, the daemon killed, verified, checked on the host
	@$(BIN)/python scripts/run_guest.py run
shell: setup-guest ## the console of such a guest, with the disk as /dev/vda (Ctrl-A X leaves)
	@$(BIN)/python scripts/run_guest.py shell

# ----------------------------------------------------------------------------------------------------------------- tests

.PHONY: test test-python test-guests test-bench fuzz sanitize
test: test-python test-guests sanitize fuzz test-bench ## everything: pytest, guests under avocado, sanitizers, brief fuzzing, a small bench
test-python: setup-test
	@$(BIN)/pytest tests
test-guests: setup-test
	@$(BIN)/avocado run --max-parallel-tasks=1 --job-results-dir .cache/avocado avocado/
fuzz: setup-test ## each fuzz target for FUZZ_SECONDS
	@FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=1 scripts/fuzz
sanitize: setup-test ## the engine under ASan and UBSan, as the real daemon; all of tests/native with scripts/sanitize
	@scripts/sanitize tests/unit/test_engine.py tests/unit/test_engine_log.py tests/unit/test_engine_backend.py tests/native/test_nbd_engine.py \
		tests/native/test_disconnects.py tests/native/test_malformed_messages.py \
		tests/backend/test_servers.py
test-bench: setup-test
	@$(BIN)/python -m tests.bench --quick

.PHONY: bench policies soak
policies: setup-test ## the read cache's policy beside others, into docs/read-cache.svg
	@$(BIN)/python -m tests.policies --figure docs/read-cache.svg
bench: setup-test ## speed, beside qemu-storage-daemon: docs/performance.md says what is measured
	@$(BIN)/python -m tests.bench
soak: setup-test ## the simulator with SOAK_SEEDS seeds, the random tests and fuzzers with SOAK_SECONDS each
	@$(BIN)/python -m tests.sim --seeds $(SOAK_SEEDS) --first 1000000
	@SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/pytest tests
	@KILLS=$(SOAK_KILLS) $(BIN)/avocado --show app,avocado.test.progress run --max-parallel-tasks=1 \
		--job-results-dir .cache/avocado avocado/kills.py
	@OUTAGE_S=$(SOAK_OUTAGE_SECONDS) $(BIN)/avocado run --max-parallel-tasks=1 --job-results-dir .cache/avocado avocado/backends.py
	@scripts/sanitize
	@FUZZ_SECONDS=$(SOAK_SECONDS) scripts/fuzz

.PHONY: lint
lint: packages-lint $(STAMPS)/install ## ruff, mypy, import-linter, shellcheck, examples, the C with warnings as errors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy scripts tests/guest
	@$(BIN)/lint-imports
	@shellcheck $(SHELL_SCRIPTS)
	@# Warnings are errors in every build; here a second compiler looks.
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; test -d build/lint || CC=clang-14 meson setup build/lint > /dev/null; \
		meson compile -C build/lint > build/lint/log || { cat build/lint/log; exit 1; }
	@virt-xml-validate examples/*.xml domain

.PHONY: clean
clean: ## remove what was built, downloaded and installed here
	rm -rf $(VENV) .cache build build-* dist subprojects/libvhost-user .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
