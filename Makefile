# `make demo` and `make test` start from nothing: they create .venv in the checkout first.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
BIN := .venv/bin
SETUP := .venv/.installed
OLDEST := .venv-oldest

.PHONY: demo test test-fast test-oldest lint bench docs clean

demo: $(SETUP)
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/study.py --config recipes/configs/demo.yaml

test: $(SETUP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

test-fast: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow"

# The core and the integrations with the oldest Python and the oldest versions that we support.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 tests/core tests/integrations

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(SETUP)
	$(BIN)/python -m recipes.lab.bench.loss

docs: $(SETUP)
	HF_HUB_OFFLINE=1 $(BIN)/python -W error -m pdoc --docformat google --output-directory build/docs agsm_loss agsm_loss.integrations

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON_OLDEST) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test,trl]"
	touch $@

clean:
	rm -rf .venv $(OLDEST) build
