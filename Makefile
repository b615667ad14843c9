# `make run` draws the catalog, `make test` checks the project. Both set up .venv first.
#
# PIP_FLAGS goes to every pip install: index options, a proxy, a wheel folder.
# .ci/install_torch.sh chooses the build of PyTorch; TORCH names one in its place.

PYTHON ?= python3
PIP_FLAGS ?=
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

PIP := $(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt $(PIP_FLAGS)

.PHONY: run test quick lint help clean

run: $(VENV)/.installed
	$(BIN)/sensebatch run manifests/catalog.yaml --redraw

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov=sensebatch

quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

help:
	@echo "make run   set up .venv and draw manifests/catalog.yaml into outputs/catalog"
	@echo "make lint  set up .venv and run ruff and mypy"
	@echo "make quick lint, and the tests that are not marked slow"
	@echo "make test  lint, and all tests with their coverage"
	@echo "make clean remove .venv and caches; outputs stay"

clean:
	rm -rf $(VENV) build dist .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sensebatch needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sensebatch into $(VENV) (once; a few minutes)"
	@if [ -n "$(TORCH)" ]; then $(PIP) "$(TORCH)"; \
	  else PIP="$(PIP)" sh .ci/install_torch.sh $(TORCH_VERSION); fi
	@$(PIP) hatchling
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@
