# `make demo` and `make test` work from a bare clone; each builds what it needs of .venv and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint types tutorials docs clean

install: $(VENV)/.tables

demo: $(VENV)/.core
	$(BIN)/python -m pyro_invman demo --out demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy pyro_invman

tutorials: $(VENV)/.docs
	$(BIN)/python docs/notebooks.py

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.tables: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[tables]'
	touch $@ $(VENV)/.core

$(VENV)/.test: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.core

$(VENV)/.docs: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@ $(VENV)/.core

clean:
	rm -rf docs/_build docs/tutorials $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
