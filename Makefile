# One virtual environment, kept beside the sources; VENV=… puts it elsewhere.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint bench chaos
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml deploy/constraints.txt
	@deploy/check-system $(PYTHON)
	@echo "Setting up $(VENV): downloads about 1 GB, which takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint deploy/constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/radqueue demo $(ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m 'not slow' $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m tests.benchmarks

chaos: setup
	$(BIN)/python -m tests.chaos $(ARGS)
	$(BIN)/python -m tests.chaos.damaged_files
