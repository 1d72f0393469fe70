# make quickstart   the three steps on a tiny embedded model, on a CPU
# make test         lint, and the tests that need neither a network nor a GPU
# make test-all     the same with the slow ones
# make format       rewrite the sources in the house format
#
# Another interpreter: make PYTHON=python3.12. Options for every pip install: PIP_OPTIONS="...".

PYTHON ?= python3
PIP_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS) -c constraints.txt

.PHONY: quickstart test test-all lint format clean
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
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The environment stays: removing it by hand is `rm -r .venv`.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
