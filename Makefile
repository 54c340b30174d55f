# Every target sets up .venv first; make demo and make test are where to start.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup build flashinfer test demo generate bench bench-rivals docs lint wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | generate | test | bench | bench-rivals | setup | build | flashinfer | docs | lint | wheel | clean"

# The package is installed editable: Python files are used in place, ffi/ is compiled again when it
# changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.built: pyproject.toml CMakeLists.txt $(wildcard ffi/* cmake/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@$(BIN)/python -m jax_gemma_arf --extension
	@touch $@

# What an extra of pyproject.toml brings, without building the package again.
$(VENV)/.extra-%: $(VENV)/.built
	$(BIN)/python -m pip install --quiet 'jax-gemma-arf[$*]'
	@touch $@

setup: $(VENV)/.built

build: $(BIN)/python
	rm -f $(VENV)/.built
	$(MAKE) setup

# implementation="flashinfer" as well: FlashInfer's headers are downloaded unless they are installed.
flashinfer: $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . \
		--config-settings cmake.define.JAX_GEMMA_ARF_FLASHINFER=ON
	@$(BIN)/python -m jax_gemma_arf --extension
	@touch $(VENV)/.built

# A process for each core; tests/conftest.py keeps to one where there is a GPU.
test: $(VENV)/.extra-test build/cuda_plugin
	$(BIN)/pytest --numprocesses auto --dist worksteal

# JAX's CUDA plugin, for tests that compile for GPUs. Apart, since JAX would look for a GPU with it.
build/cuda_plugin: $(VENV)/.extra-test
	rm -rf $@
	version=$$($(BIN)/python -c "import jax; print(jax.__version__)"); \
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
		jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version

demo: setup
	$(BIN)/python examples/demo.py

generate: $(VENV)/.extra-gemma
	$(BIN)/python -m pip install --quiet --group generate
	$(BIN)/python -W ignore::DeprecationWarning examples/generate.py $(ARGS)

# On whatever there is: several GPUs, one GPU (all ranks on it) or a CPU (psum alone).
# BENCH_ARGS= for the full runs, minutes each. Ends with the paths of the pictures.
BENCH_ARGS ?= --quick
bench: $(VENV)/.extra-bench
	@if command -v nvcc > /dev/null; then $(MAKE) bench-rivals; fi
	@mkdir -p build && touch build/.bench
	$(BIN)/python bench/op.py $(BENCH_ARGS)
	$(BIN)/python bench/block.py $(BENCH_ARGS)
	$(BIN)/python bench/profile_compare.py $(BENCH_ARGS)
	@echo "Pictures:" && find "$${OUT:-bench/records}" -name '*.png' -newer build/.bench

# FlashInfer's kernels, which op.py compares with; needs nvcc.
bench-rivals: build/rivals/.built

build/rivals/.built: $(wildcard bench/rivals/* cmake/*) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/rivals ./bench/rivals
	@touch $@

lint: $(VENV)/.extra-test
	$(BIN)/python -m pip install --quiet --group dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(wildcard ffi/*.* ffi/flashinfer/* examples/*.cu bench/rivals/*.cc bench/rivals/*.cu bench/rivals/*.h)
	$(BIN)/pyright

# The reference, in build/docs/index.html.
docs: $(VENV)/.extra-test
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo build/docs/index.html

wheel: setup
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/wheel-test
	build/wheel-test/bin/python -m pip install --quiet dist/*.whl
	cd build && wheel-test/bin/python -m jax_gemma_arf --extension

clean:
	rm -rf $(VENV) build dist
