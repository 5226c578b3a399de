# `make demo` and `make test` set everything up themselves; they need Python >= 3.10, pip and a package index.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
TORCH := .venv/.stamp-torch
STAMP := .venv/.stamp
EXTRAS ?=
COMMA := ,
TOOLS := .venv/.stamp-tools$(addprefix -,$(EXTRAS))
PIP_INSTALL := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test bench venv clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## / - /; s/^/  make /'

demo: venv  ## export the bundled model, verify it, generate with and without the cache
	@$(BIN)/dllm-export demo

test: $(TOOLS)  ## format, lint, types, layers, tests
	@PATH="$(CURDIR)/$(BIN):$$PATH" tools/check

bench: venv  ## measure the runtime on this machine
	@$(BIN)/dllm-export bench

clean:  ## remove .venv, build outputs and caches
	@rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find graphs runtime exporter tools src tests -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP)

# Nothing is compiled ahead: Python compiles what is imported, a small part of what is installed.
$(TORCH): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "make: needs Python >= 3.10, '$(PYTHON)' is missing or older: run make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: '$(PYTHON)' cannot create virtual environments (no ensurepip): install its venv package, on Debian and Ubuntu 'apt install python3-venv'"; exit 1; }
	@echo "set-up: creating .venv ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv .venv
	@echo "set-up: installing torch, CPU build"
	@$(PIP_INSTALL) --no-deps --retries 1 --timeout 20 --index-url $(TORCH_INDEX) torch 2>/dev/null || \
	  echo "set-up: no CPU build of torch at $(TORCH_INDEX); taking the default index's build, on Linux several GB with CUDA"
	@touch $@

$(STAMP): $(TORCH)
	@echo "set-up: installing dllm-export (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[export,onnxruntime]'
	@touch $@

# All at once: what the tools need holds what the package needs.
$(TOOLS): $(TORCH)
	@echo "set-up: installing dllm-export and the tools of the tests (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[export,onnxruntime,tensorrt-rtx,polygraphy,plots,dev$(addprefix $(COMMA),$(EXTRAS))]'
	@# Type stubs: what they depend on cannot be installed, and in site-packages they would pass for TensorRT itself.
	@$(PIP_INSTALL) --no-deps --upgrade --target .venv/stubs tensorrt-stubs
	@touch $(STAMP) $@
