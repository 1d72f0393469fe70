# make quickstart   the three steps on a tiny embedded model, on a CPU
# make test         lint, and a fast core of the tests: every room, all steps, 1 and 2 ranks
# make test-slow    lint, and the tests that `make test` leaves out
# make test-all     lint, and both
# make test-gpu     tests/gpu, on the first GPU
# make gpu-day      speed and memory of every program on the first GPU: build/gpu_day
# make faults       kill, fill up, damage and stop hundreds of runs: an hour, it may be interrupted
# make docs         the documentation as a site: build/site; stops at a broken link
# make release-check  wheel and sdist, and the quickstart from the wheel alone: build/release
# make lint         check format, style and types
# make format       rewrite the sources in the house format
# make clean        remove builds and caches; the environment stays, `rm -r .venv` removes it
#
# No test needs a network, and only `make test-gpu` and `make gpu-day` a GPU.
# Another interpreter: make PYTHON=python3.12. Options for every pip install: PIP_OPTIONS="...".

PYTHON ?= python3
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt
# Processes for the tests, a file by one of them, in the order of conftest; each takes about 1 GB.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder

.PHONY: quickstart test test-slow test-all test-gpu gpu-day faults docs release-check lint format clean
.DEFAULT_GOAL := quickstart

# torch first and pinned, so that nothing after it asks for another build. DeepSpeed comes as
# source; DS_BUILD_OPS=0 leaves its kernels to be compiled when first used.
$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	DS_BUILD_OPS=0 $(PIP_INSTALL) -e '.[test]'
	touch $@

quickstart: $(STAMP)
	$(BIN)/python e2e_rlhf.py

test: lint
	$(PYTEST) -m "not slow"

test-slow: lint
	$(PYTEST) -m slow

test-all: lint
	$(PYTEST)

# DeepSpeed has one device a process: these tests run by themselves.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest --gpu tests/gpu

# Random weights of up to 8 billion parameters: 40 GB of disk.
gpu-day: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_day

# Goes on where it was interrupted; build/faults holds the results, and what failed.
faults: $(STAMP)
	$(BIN)/python -m tests.faults --jobs 2 --write build/faults/counts.json

# To read it: python -m http.server -d build/site
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

# Some ten minutes: another environment, and a training in it.
release-check: $(STAMP)
	PYTHON=$(abspath $(BIN))/python PIP_OPTIONS="$(PIP_OPTIONS)" .ci/release

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
