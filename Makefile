# `make run` draws the catalog, `make test` checks the project. Both set up .venv first.
#
# PIP_FLAGS goes to every pip install: index options, a proxy, a wheel folder.
# TORCH is what is asked of pip; Linux without an NVIDIA driver asks for the CPU build, because
# the other one brings gigabytes of CUDA libraries that such a machine cannot use.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

ifeq ($(shell uname -s)-$(shell command -v nvidia-smi),Linux-)
TORCH ?= torch==$(TORCH_VERSION)+cpu
else
TORCH ?= torch==$(TORCH_VERSION)
endif

PIP := $(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt $(PIP_FLAGS)

define NO_TORCH

pip found no $(TORCH) for this Python. Name an index that has it, as on PyTorch's install page:
    make run PIP_FLAGS="--extra-index-url ADDRESS"
or take another build (the one with CUDA needs several gigabytes of disk):
    make run TORCH=torch==$(TORCH_VERSION)

endef
export NO_TORCH

.PHONY: run test help clean

run: $(VENV)/.installed
	$(BIN)/sensebatch run manifests/catalog.yaml

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

help:
	@echo "make run   set up .venv and draw manifests/catalog.yaml into outputs/catalog"
	@echo "make test  set up .venv and run ruff, mypy and pytest"
	@echo "make clean remove .venv and caches; outputs stay"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sensebatch needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sensebatch into $(VENV) (once; a few minutes)"
	@$(PIP) "$(TORCH)" || { echo "$$NO_TORCH" >&2; exit 1; }
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@
