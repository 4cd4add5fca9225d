# make demo: the whole job, end to end, on pictures it draws itself.   make test: lint, types, tests.
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test lint types parity bench clean

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("lit-fast needs Python 3.11 or newer, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/lit-fast demo --out demo

test: $(VENV)/installed lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# The tests against timm and transformers; needs a torch and a torchvision that fit each other.
parity: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[parity]'
	$(BIN)/python -m pytest -k 'timm or transformers or huggingface or torch'

# The tables of benchmarks/README.md, but for those that take hours (learning) or libtpu (memory).
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[bench]'
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.embed
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.evaluate
	$(BIN)/python -m benchmarks.search

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
