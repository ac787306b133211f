# One virtual environment, kept beside the sources; VENV=… puts it elsewhere, PYTHON=… and TORCH=… choose (deploy/setup).
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test coverage lint docs bench chaos release
setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml deploy/constraints.txt deploy/setup
	@deploy/setup $(VENV)
	@touch $@

demo: setup
	$(BIN)/radqueue demo $(ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		-m 'not slow and not nightly' $(COVERAGE) $(ARGS)

coverage: COVERAGE := --cov
coverage: test

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python -m tests.docs

bench: setup
	$(BIN)/python -m tests.benchmarks

chaos: setup
	$(BIN)/python -m tests.chaos $(ARGS)
	$(BIN)/python -m tests.chaos.damaged_files

release: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	RADQUEUE_TEST_DIST=dist $(BIN)/python -m pytest -m slow tests/deploy/test_wheel.py
