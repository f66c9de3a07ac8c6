# Every target does its own set-up: a clone, make and Python 3.11 or newer are enough.
#   make PYTHON=/path/to/python3.12 test     choose the interpreter
#   make VENV=/tmp/venv test                 put the environment elsewhere
#   make test-single ARGS="-k ema"           pass arguments on (also to the demo, the benchmarks)

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2

# A candidate has to run (version managers leave shims that do not), carry venv and pip, and be a version
# for which jaxlib has wheels.
PYTHON_OK := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    if $$p -c '$(PYTHON_OK)' >/dev/null 2>&1; then echo $$p; break; fi; done)

# Python compiles what is imported at its first import; compiling every dependency here takes half the set-up.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check
METADATA := setup.cfg setup.py pyproject.toml
RUFF_PATHS := .

# Collectives on forced host devices deadlock unless XLA's thread pool has two threads per device.
MULTI_DEVICE_ENV := NPROC=16 XLA_FLAGS="$(XLA_FLAGS) --xla_force_host_platform_device_count=8"
# Each worker begins with half of the tests in their order, so that most files have their shared trainers made once.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal --durations=20

# What `make quick` runs: the shape of the package, every step and the loop around it, data, checkpoints, messages.
QUICK := tests/project/test_architecture.py tests/project/test_import.py tests/project/test_tested.py tests/core \
    tests/data tests/checkpoint tests/step tests/loop/test_hooks.py tests/trainer

# Where the tree that passed `make test` is noted, and what keeps a run from counting as one: anything given that
# leaves out tests or overlooks their failure.
NOTE := $(VENV)/.tested
IN_PART = $(strip $(ARGS) $(PYTEST_ADDOPTS) $(findstring i,$(firstword -$(MAKEFLAGS))) \
    $(filter-out VENV=% PYTHON=% WORKERS=%,$(MAKEOVERRIDES)))

.DEFAULT_GOAL := help
.PHONY: help demo test tested quick lint types test-single test-multi coverage slow slurm mpi fused same faults format \
    docs bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.stamp-demo ## train a CNN on scikit-learn's digits; logs in runs/digits
	$(BIN)/python examples/digits.py $(ARGS)

test: $(VENV)/.stamp-dev ## everything CI runs: lint, types, tests; notes the tree that passed
	@.ci/tested begin $(NOTE)
	@$(MAKE) --no-print-directory lint types test-single test-multi
	@.ci/tested $(if $(IN_PART),partly,passed) $(NOTE)

tested: ## whether make test passed on what is committed; takes no time
	@.ci/tested check $(NOTE)

quick: lint types ## what to run before each commit: lint, types, and the tests that catch most mistakes
	$(PYTEST) $(QUICK) $(ARGS)

lint: $(VENV)/.stamp-dev ## ruff: rules and format
	$(BIN)/ruff check $(RUFF_PATHS)
	$(BIN)/ruff format --check $(RUFF_PATHS)

types: $(VENV)/.stamp-dev ## pyright on trainkit/
	$(BIN)/pyright --pythonpath $(BIN)/python

test-single: $(VENV)/.stamp-dev ## the tests that need one device
	$(PYTEST) --ignore=tests/multi_device $(ARGS)

test-multi: $(VENV)/.stamp-dev ## the tests in tests/multi_device, on 8 forced host devices
	$(MULTI_DEVICE_ENV) $(PYTEST) tests/multi_device $(ARGS)

coverage: $(VENV)/.stamp-dev ## the same tests, with what they cover; takes a quarter longer
	@rm -f .coverage .coverage.*
	$(PYTEST) --cov --cov-report= --ignore=tests/multi_device $(ARGS)
	$(MULTI_DEVICE_ENV) $(PYTEST) --cov --cov-report= --cov-append tests/multi_device $(ARGS)
	@$(BIN)/coverage report

slow: $(VENV)/.stamp-dev ## the tests marked slow, which `make test` leaves out
	$(MULTI_DEVICE_ENV) $(BIN)/python -m pytest -m slow tests/multi_device $(ARGS)
	$(BIN)/python -m pytest -m slow --ignore=tests/multi_device $(ARGS)

slurm: $(VENV)/.stamp-dev ## the example under a SLURM cluster that this starts and stops; wants root, slurm-wlm and munge
	$(BIN)/python -m pytest -rs -m slow tests/multi_process/test_slurm.py $(ARGS)

mpi: $(VENV)/.stamp-dev ## the example under Open MPI; wants openmpi-bin
	$(BIN)/python -m pytest -rs -m slow tests/multi_process/test_mpi.py $(ARGS)

fused: $(VENV)/.stamp-dev ## the tests once more, with seven training steps in one call wherever a test leaves that open
	TRAINKIT_TEST_STEPS_PER_CALL=7 $(PYTEST) --ignore=tests/multi_device $(ARGS)
	TRAINKIT_TEST_STEPS_PER_CALL=7 $(MULTI_DEVICE_ENV) $(PYTEST) tests/multi_device $(ARGS)

same: $(VENV)/.stamp-dev ## the same runs by this tree and by BASE=<commit>, compared bit for bit; for refactorings
	@test -n "$(BASE)" || { echo "make same BASE=<commit>: name the commit whose numbers are the right ones." >&2; exit 1; }
	$(BIN)/python -m tests.same --base $(BASE) $(ARGS)

faults: $(VENV)/.stamp-dev ## kill a run a hundred times, and signal it; compare what comes of it
	$(BIN)/python -m tests.faults.kill --kills 100 $(ARGS)
	$(BIN)/python -m tests.faults.kill --kills 20 --signal SIGTERM
	$(BIN)/python -m tests.faults.kill --kills 20 --signal SIGINT

format: $(VENV)/.stamp-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix $(RUFF_PATHS)
	$(BIN)/ruff format $(RUFF_PATHS)

docs: $(VENV)/.stamp-dev ## build the documentation into docs/_build; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo "docs/_build/index.html"

bench: $(VENV)/.stamp-dev ## run every benchmark
	@set -e; for file in benchmarks/[a-z]*.py; do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

clean: ## remove the environment, caches and build products; runs/ is kept
	rm -rf $(VENV) build dist *.egg-info docs/_build .pytest_cache .ruff_cache .coverage .coverage.*
	find trainkit tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 with venv and pip was found among python3, python3.13," \
	    "python3.12 and python3.11. Install one (on Debian also its -venv package), or name it: make PYTHON=..." >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make the second call quick; a change of the metadata installs again.
$(VENV)/.stamp-demo: $(METADATA) | $(BIN)/python
	$(PIP_INSTALL) -e ".[examples,tensorboard]"
	@touch $@

$(VENV)/.stamp-dev: $(METADATA) | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.stamp-demo
