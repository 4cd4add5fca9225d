# make demo: the whole job, end to end, on pictures it draws itself.   make test: lint, types, documents, tests.
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
CORE   := tests/test_imports.py tests/test_config.py tests/losses tests/models tests/data tests/runs tests/train/test_step.py \
          tests/train/test_optimizer.py tests/train/input_pipeline tests/e2e/test_main_job.py

.PHONY: demo test test-core test-plan lint types docs bench bench-tpu package release clean

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("lit-fast needs Python 3.11 or newer, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs,test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/lit-fast demo --out demo

# With the reference implementations that the parity tests compare with: torch, timm, transformers, open_clip.
$(VENV)/parity: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[parity]'
	touch $@

# Tests that start processes and servers depend on the time that a busy machine gives them: what failed runs once more,
# alone. Both results are printed. Without CI in the environment pytest shortens long differences.
test: $(VENV)/parity lint types docs
	env -u CI $(BIN)/python -m pytest --numprocesses 2 --dist loadfile || \
	  env -u CI $(BIN)/python -m pytest --numprocesses 0 --last-failed --last-failed-no-failures none

# What depends most on the versions of Python and JAX; for a second interpreter: make test-core VENV=.venv-3.13 PYTHON=python3.13
test-core: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(CORE)

# All tests of `lit-fast plan`, with the compilers of TPUs and GPUs, without which make test skips some. No such device is needed.
test-plan:
	$(MAKE) .venv-plan/installed VENV=.venv-plan
	.venv-plan/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tpu,plan-gpu]'
	JAX_PLATFORMS=cpu .venv-plan/bin/python -m pytest tests/train/plan

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# The pages of docs/, README and benchmarks/ as a site, in site/index.html. A warning, as of a link that leads nowhere, is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The tables of benchmarks/README.md that are measured on this machine. Those that need libtpu: make bench-tpu. Those that need
# given data or hours (learning, neighbours, unlock, towers, faults, fuzz) have their commands there.
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.remote_stream
	$(BIN)/python -m benchmarks.embed --batches 16 32
	$(BIN)/python -m benchmarks.loss
	$(BIN)/python -m benchmarks.step --rows essential
	$(BIN)/python -m benchmarks.evaluate
	$(BIN)/python -m benchmarks.search

# The tables by the compiler of TPUs, which needs no TPU. In an environment of its own, as JAX looks for TPUs where libtpu is.
bench-tpu:
	$(MAKE) .venv-tpu/installed VENV=.venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench,tpu]'
	.venv-tpu/bin/python -m benchmarks.attention_kernels
	.venv-tpu/bin/lit-fast plan siglit_b8_one_day --topology v4:2x2x1 --no-search
	.venv-tpu/bin/lit-fast plan siglip_four_chips --topology v4:2x2x1 --no-search
	.venv-tpu/bin/python -m benchmarks.tpu_step --attention pallas --masked --topologies v4:2x2x1 v5p:2x2x1 v6e:2x2
	.venv-tpu/bin/python -m benchmarks.tpu_step --attention pallas --masked --topologies v5e:2x2 --keep inputs
	.venv-tpu/bin/python -m benchmarks.memory

# sdist and wheel in dist/, tried with each supported interpreter.
package:
	.ci/package

# Tests, package, upload after one confirmation.
release:
	.ci/release

clean:
	rm -rf $(VENV) .venv-* demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
