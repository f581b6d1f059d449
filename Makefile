# One virtual environment, .venv, serves every target. A stamp file for each extra keeps repeated calls quick:
# it is remade when the dependencies change. `make PYTHON=python3.12 VENV=.venv312 test` uses another interpreter.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
# Twice quiet: errors only.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
SPHINX := $(BIN)/python -m sphinx -W --keep-going
# pytest-xdist runs one process for each core; a thread pool in each of them would only fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: help demo test lint slow docs build clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    compress a pretrained sentence encoder and measure what its quality becomes"
	@echo "make test    ruff, pyright and the default tests"
	@echo "make slow    the tests marked slow"
	@echo "make docs    the documentation, warnings being errors, and its doctests"
	@echo "make build   the sdist and the wheel, each installed and imported from outside the checkout"
	@echo "make clean   remove what was built, the virtual environment included"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --editable ".[$*]" --constraint constraints.txt
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/compress_sentence_encoder.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(PYTEST)

slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

# Pages of examples that were renamed or removed would stay, and fail the build: the gallery is made anew.
docs: $(VENV)/.installed-docs
	rm -rf docs/auto_examples
	$(SPHINX) -b html docs docs/_build/html
	$(SPHINX) -b doctest docs docs/_build/doctest

# The wheel is built twice: from the checkout, and from the sdist as an installer without wheels would do it.
build: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --wheel --outdir dist/from-checkout
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python .ci/check_wheels.py dist/*.whl dist/from-checkout/*.whl

clean:
	rm -rf $(VENV) dist build docs/_build docs/auto_examples docs/sg_execution_times.rst
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find structmat kernels tests docs examples -name __pycache__ -type d -prune -exec rm -rf {} +
