# `make demo` and `make test` start from nothing: they create .venv in the checkout first.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed

.PHONY: demo test test-fast lint bench docs clean

demo: $(SETUP)
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/study.py --config recipes/configs/demo.yaml

test: $(SETUP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-fast: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

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

clean:
	rm -rf .venv build
