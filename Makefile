# The two commands for users are `make demo` and `make test`; both install what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo demo-kernel test test-kernel test-long interop-table check dev fuzz clean

help:
	@echo "make demo       the main job, in a lab on this machine (root)"
	@echo "make test       all tests that this machine can run (root)"
	@echo "make test-kernel  those that need kernel ESP, in a second kernel (QEMU)"
	@echo "make test-long  the slow ones too, in both kernels"
	@echo "make interop-table  docs/interop.md, from the last runs of both"
	@echo "make demo-kernel  the main job in the second kernel, with the kernel's ESP"
	@echo "make fuzz       the fuzzer, SECONDS=600 for each target in FUZZ"
	@echo "make check      ruff, mypy, import contracts"
	@echo "make dev        a virtual environment with everything, in $(VENV)"

$(VENV)/.oepy: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "oepy: Python 3.11 or later is needed, $(PYTHON) is older: set PYTHON=…" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.oepy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

dev: $(VENV)/.dev

demo:
	@scripts/install-system demo
	@$(MAKE) --no-print-directory $(VENV)/.oepy
	@$(BIN)/oepy lab run $(DEMO)

demo-kernel:
	@scripts/install-system kernel
	@$(MAKE) --no-print-directory $(VENV)/.oepy
	@scripts/second-kernel --cpus 2 $(BIN)/oepy lab run $(DEMO)

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo > .import-contracts.log 2>&1 || { cat .import-contracts.log; exit 1; }
	@rm -f .import-contracts.log

test:
	@scripts/install-system test
	@$(MAKE) --no-print-directory check
	@scripts/run-tests -m "not long and not kernel" $(PYTEST)

test-kernel:
	@scripts/install-system kernel
	@scripts/unpack-peers libreswan openiked
	@$(MAKE) --no-print-directory $(VENV)/.dev
	@scripts/run-kernel-tests "(kernel or any_kernel) and not long" 4800 $(PYTEST)

test-long:
	@scripts/install-system test
	@$(MAKE) --no-print-directory check
	@scripts/run-tests -m "not kernel" $(PYTEST)
	@scripts/install-system kernel
	@scripts/unpack-peers libreswan openiked
	@scripts/run-kernel-tests "kernel or any_kernel" 5700 $(PYTEST)

# From what the last `make test` and `make test-kernel` have seen
interop-table:
	@$(BIN)/python -m tests.interop.matrix.table .interop/interop.jsonl .interop/kernel/interop.jsonl

# Not part of the tests: SECONDS for each target, one after the other. A finding is a file `crash-…`.
SECONDS ?= 600
FUZZ ?= ike ike_sealed ike_session certificates connections records dns_reply dns_chain dns_stream anchor_file esp trap \
  xfrm setkey ipsec_conf manual_section
fuzz: $(VENV)/.dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	@for target in $(FUZZ); do $(BIN)/python -m tests.fuzz.run $$target $(SECONDS) || exit 1; done

clean:
	rm -rf $(VENV) .second-kernel build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .interop
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
