# make demo : from a fresh clone to a post-trained world model and what it learned, on two CPU cores
# make test : set up and run the tests
# make lint : style, types and import layers
# make constraints : constraints.txt from what .venv has. Newer versions: make clean; make test CONSTRAINTS=/dev/null;
#                    and if the tests pass, make constraints
#
# PYTHON=python3.12          another interpreter (3.11 or newer)
# PIP_ARGS="--index-url ..."       another package index, e.g. one with CPU-only builds of torch and torchvision

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MINIMUM := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c "$(MINIMUM)" 2>/dev/null; then echo $$p; break; fi; done)
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt

.PHONY: demo test lint format setup constraints clean

demo: $(STAMP)
	$(BIN)/python -m persistworld_cli.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup $(VENV): $(STAMP)

# The stamp is written last: an interrupted installation is taken up again, a finished one costs nothing.
$(STAMP): pyproject.toml constraints.txt
	@if ! "$(PYTHON)" -c "$(MINIMUM)" 2>/dev/null; then \
		echo "error: Python 3.11 or newer is needed; '$(PYTHON)' is not one." >&2; \
		echo "  to do: install it (apt install python3.12 python3.12-venv), or: make PYTHON=/path/to/python3.12" >&2; \
		exit 2; \
	fi
	@if ! "$(PYTHON)" -c "import ensurepip, venv" 2>/dev/null; then \
		echo "error: '$(PYTHON)' has no venv module." >&2; \
		echo "  to do: apt install python3-venv" >&2; \
		exit 2; \
	fi
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[dev,sim]'
	@touch $@

# Without the builds (+cpu) and without what torch's CUDA build pins itself, so that it suits every build of torch.
constraints: $(STAMP)
	@{ echo "# Versions known to work together, written by make constraints; make installs with them. Bounds that must hold"; \
		echo "# are in pyproject.toml."; \
		$(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(nvidia|cuda|triton|persistworld)' | sed 's/+.*//'; \
	} > constraints.tmp && mv constraints.tmp constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist
