# `make bench` and `make test` are the two commands of the README; each sets up .venv first, once.
#
#   PYTHON=/path/to/python   the Python to build the environment from; a working torch that it has is used, not replaced
#   TORCH=cpu                install PyTorch's CPU build into the environment, whatever the machine has
#   VENV=folder              where the environment goes
#   ONLY='*-fp[13]*'        of the binaries for sm_90a, check only those with such names
#   BENCH="--grid small"     options for `flashcore bench`;  TEST="-x -k merge"  options for pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= auto
VENV ?= .venv
BENCH ?=
ONLY ?= *
TEST ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install
# The CPU build is pinned: where its index cannot be reached, the plain index must give the same release.
CPU_TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Exits 0 where torch is there, new enough (pyproject.toml says which) and works.
HAS_TORCH := import torch; torch.ones(1).add(1); assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
HAS_TRITON := import importlib.metadata as m; m.version("triton")
# What a system Python's torch needs to be seen from the environment.
VENV_FLAGS ?= $(shell [ "$(TORCH)" = auto ] && $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null && echo --system-site-packages)

.PHONY: help bench test lint check binaries wheel clean

help:
	@echo "make bench   time attention on this machine, ours beside PyTorch's (needs no GPU)"
	@echo "make test    run the tests (needs no GPU)"
	@echo "make lint    ruff and mypy"
	@echo "make check   lint, the machine-code gate and the evidence check"
	@echo "make wheel   build the binaries that a wheel holds, then the wheel, into dist/"
	@echo "make clean   remove the environment, builds and caches in this folder"

bench: $(VENV)/.ready
	$(BIN)/flashcore bench $(BENCH)

# One thread each: the two workers share the cores, and most tests are too small to gain from more.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every shipped binary for a GPU that there is evidence of, unless ONLY says less; of the others one arch for each dtype.
check: lint $(VENV)/.ready-build
	$(BIN)/flashcore inspect --arch sm_90a --only '$(ONLY)' --gate
	$(BIN)/flashcore inspect --arch sm_89 --only '*-fp[13]*' --gate
	$(BIN)/flashcore inspect --arch sm_80 --only '*-bf16*' --gate
	$(BIN)/flashcore inspect --arch sm_100a,sm_120a --only 'portable_forward-fp[13]*' --gate
	$(BIN)/flashcore evidence --check $(if $(filter-out *,$(ONLY)),--only '$(ONLY)')

binaries: $(VENV)/.ready-build
	$(BIN)/flashcore build

wheel: binaries
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) dist build src/flashcore/binaries .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# torch, and what `flashcore bench` needs
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "FlashCore needs Python 3.10 or later; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "setting up $(VENV) (the first time this takes a minute or more)" >&2
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@if $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null; then \
		echo "using the PyTorch that is there" >&2; \
	elif [ "$(TORCH)" = auto ] && command -v nvidia-smi >/dev/null; then \
		$(PIP) torch; \
	else \
		$(PIP) --index-url $(CPU_INDEX) --retries 0 --timeout 10 "$(CPU_TORCH)" 2>/dev/null || $(PIP) "$(CPU_TORCH)"; \
	fi
	$(PIP) --editable '.[plot]'
	@touch $@

# and what the tests need. A Triton that torch brought stays; where there is none, the one that the evidence names.
$(VENV)/.ready-dev: $(VENV)/.ready
	@$(BIN)/python -c '$(HAS_TRITON)' 2>/dev/null || $(PIP) --editable '.[build]'
	$(PIP) --editable '.[dev]'
	@touch $@

# and the Triton whose binaries the evidence names: no other makes the same bytes
$(VENV)/.ready-build: $(VENV)/.ready-dev
	@$(BIN)/python -c 'import importlib.metadata as m; wanted = next(r for r in m.requires("flashcore") if r.startswith("triton==")).split(";")[0].strip(); found = "triton==" + m.version("triton"); exit(0 if found == wanted else f"this needs {wanted}, and {found} came with the PyTorch in $(VENV): make $(MAKECMDGOALS) VENV=.venv-build TORCH=cpu")'
	@touch $@
