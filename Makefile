# `make` alone prints this help. `make demo` and `make test` set up what they need themselves:
# Python 3.11 or newer (with venv), git and make are enough.

BIN := .venv/bin
# What `make lock` resolves torch to. It is looked for as this version alone, so that a CPU build
# ("2.13.0+cpu") and the default build both satisfy the lock.
TORCH := 2.13.0
# The interpreter: the one the lock is resolved with first, then newer ones. Override: PYTHON=...
FITS := -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p $(FITS) && { echo $$p; break; }; done)

export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS ?= 120

.DEFAULT_GOAL := help
.PHONY: help python install demo test pytest lint format types contracts matrix bench zoo lock clean

help:  ## print this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: install  ## train, register and audit three small models, and print what came true
	$(BIN)/flataudit demo

test: lint types contracts pytest  ## all checks of a change: lint, types, import contracts, tests

install: .venv/.installed  ## make .venv from requirements.lock; nothing to do while lock and pyproject.toml stand

python:  ## print the Python that install takes, or what is missing
	@test -n "$(PYTHON)" && $(PYTHON) $(FITS) || { echo "expected Python 3.11 or newer with venv and ensurepip;" \
	  "got: $$($(or $(PYTHON),python3) --version 2>&1). Install one as python3.11, python3.12, python3.13 or python3" \
	  "(Debian: apt-get install python3-venv), or name one: make install PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "$(PYTHON)"

# The stamps are written last, and a venv is always made anew: an install that was interrupted starts over.
.venv/.locked: requirements.lock
	@$(MAKE) --no-print-directory -s python >/dev/null
	@echo "Making .venv from requirements.lock with $(PYTHON); this takes a few minutes."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@touch $@

.venv/.installed: .venv/.locked pyproject.toml
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Two processes of one thread each, a file in one of them; WORKERS=0: all in one.
WORKERS := 2
pytest: install  ## the tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow and not gpu and not zoo'

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install  ## mypy, strict
	$(BIN)/mypy

contracts: install  ## import-linter: who may import whom
	$(BIN)/lint-imports

matrix: install  ## measure docs/matrix.md anew: every kind of model against the definitions
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.matrix

bench: install  ## the benchmarks; their results are JSON files in benchmarks/
	set -e; for file in benchmarks/[a-z]*.py; do $(BIN)/python "$$file"; done

# ZOO: options of the passes, as in make zoo ZOO='--quick --data FOLDER'.
zoo: install  ## train, measure and score the zoo of models: benchmarks/zoo
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -e '.[zoo]'
	set -e; export OMP_NUM_THREADS=1; for pass in train measure baselines rivals; do \
	  $(BIN)/python -m benchmarks.zoo.$$pass $(ZOO); done

# Resolves pyproject.toml anew in a venv of its own. torch is pinned by version alone, without the
# mark of a build, and the CUDA packages that some builds bring are left to pip.
lock:  ## resolve pyproject.toml anew and write requirements.lock
	@$(MAKE) --no-print-directory -s python >/dev/null
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(PYTHON) -m venv "$$dir/venv"; \
	"$$dir/venv/bin/python" -m pip install -qq --disable-pip-version-check 'torch==$(TORCH)' -e '.[dev]'; \
	{ echo '# Every package that flataudit runs and is checked with, pinned. Made by `make lock` from pyproject.toml'; \
	  echo '# in a fresh venv; do not edit. torch is pinned by version alone, so that any build of it will do.'; \
	  "$$dir/venv/bin/python" -m pip freeze --all --exclude pip --exclude-editable \
	  | sed -E -e 's/\+cpu$$|\+cu[0-9]+$$//' -e '/^(nvidia-|cuda-|triton)/d'; } > "$$dir/lock"; \
	cp "$$dir/lock" requirements.lock
	@echo "Wrote requirements.lock; conda.yaml names the same versions, tests/test_project.py compares them."

clean:  ## remove .venv, caches and build folders
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
