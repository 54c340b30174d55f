# Every target sets up .venv first; make demo and make test are where to start.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= test

.PHONY: help setup build test demo generate lint wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | generate | test | build | lint | wheel | clean"

# The package is installed editable: Python files are used in place, ffi/ is compiled again when it
# changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.built: pyproject.toml CMakeLists.txt $(wildcard cmake/* ffi/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@$(BIN)/python -m jax_gemma_arf --extension
	@touch $@

setup: $(VENV)/.built

build: $(BIN)/python
	rm -f $(VENV)/.built
	$(MAKE) setup

test: setup
	$(BIN)/pytest

demo: setup
	$(BIN)/python examples/demo.py

generate: setup
	$(BIN)/python -m pip install --quiet --group generate
	$(BIN)/python -W ignore::DeprecationWarning examples/generate.py $(ARGS)

lint: setup
	$(BIN)/python -m pip install --quiet --group dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(wildcard ffi/*)
	$(BIN)/pyright

wheel: setup
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/wheel-test
	build/wheel-test/bin/python -m pip install --quiet dist/*.whl
	cd build && wheel-test/bin/python -m jax_gemma_arf --extension

clean:
	rm -rf $(VENV) build dist
