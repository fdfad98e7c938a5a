# `make help` lists the targets. Everything happens inside $(VENV); nothing else on the machine is changed.

PYTHON ?= python3
VENV ?= .venv
# Folder of the demo's run, and its number of meta-steps: fewer than the command's own 1500, for a short demo.
OUT ?= runs/demo
ITERATIONS ?= 1000
# Further arguments for pytest, e.g. ARGS="-k plots".
ARGS ?=
# Processes that share out the test files; 0 runs them here, one after another.
JOBS ?= 2
# What the tests need besides what metaft imports.
EXTRAS := dev,vision,export,search,explain,tensorboard,compress

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-faults lint format types check clean

help: ## this list
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) OUT=$(OUT) ITERATIONS=$(ITERATIONS) ARGS=$(ARGS) JOBS=$(JOBS)"

install: $(INSTALLED) ## create the virtual environment and install metaft into it, editable

demo: $(INSTALLED) ## meta-train on glyphs, then adapt to an alphabet never seen (minutes on a CPU, no download)
# The demo owns its default folders and starts afresh there; in any other, the commands refuse to overwrite a run.
ifeq ($(OUT),runs/demo)
	rm -rf runs/demo runs/demo-adapted
endif
	$(BIN)/python -m metaft.meta_train --ways 5 --shots 1 --out $(OUT) --iterations $(ITERATIONS)
	$(BIN)/python -m metaft.adapt --init $(OUT) --data glyphs:Hebrew --shots-per-class 5 --out $(OUT)-adapted

test: $(INSTALLED) ## run the tests and the docstrings' examples, but for the slow ones: under 10 minutes on two slow cores
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not slow' --durations=15 $(ARGS)

test-slow: $(INSTALLED) ## run the slow ones: whole runs, processes of their own, compilers
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow --durations=15 $(ARGS)

test-faults: $(INSTALLED) ## kill, starve and damage runs for real, in full: 15 to 25 minutes (docs/reliability.md)
	METAFT_FAULTS=full $(BIN)/python -m pytest tests/faults tests/test_fuzz.py tests/test_bad_input.py \
	  tests/test_engines.py::test_compiled_agrees_in_float64 tests/test_benchmarks.py tests/test_benchmarks_family.py \
	  tests/test_gpu_benchmark.py \
	  tests/test_training.py::test_cut_off_at_every_moment_of_the_disk_it_ends_with_the_same_bytes $(ARGS)

lint: $(INSTALLED) ## check style and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend what `make lint` can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test test-slow ## all of the above checks

clean: ## remove caches, built files and the demo's run; other runs and $(VENV) stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache runs/demo runs/demo-adapted
	find . -path './.*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# A half-made environment (interrupted, or made without pip) is completed rather than trusted.
$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { $(CHECK_PYTHON) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

CHECK_PYTHON = { $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null || { \
	echo "metaft needs Python 3.10 to 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2> /dev/null || echo not one)." >&2; \
	echo "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; }
