# `make` alone lists the verbs. Everything runs in $(VENV), which `make setup` fills once.
PYTHON ?= python3
VENV ?= .venv
# Test processes side by side: one a core, at most four, each with one thread.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ "$$n" -gt 4 ] && n=4; echo "$$n")
# Where `make gpu-check` leaves its JSON lines.
RESULTS ?= benchmarks/results
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev demo test test-fast lint format bench gpu-check wheel clean

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet
TEST_READY := $(VENV)/.fastdaa-test
DEV_READY := $(VENV)/.fastdaa-dev
PINS := requirements/torch.txt requirements/triton.txt requirements/base.txt requirements/test.txt

# `make gpu-check PYTHON=python3` uses that interpreter as it is, and installs nothing.
ifneq ($(filter command line environment,$(origin PYTHON)),)
GPU_PYTHON := $(PYTHON)
GPU_NEEDS :=
else
GPU_PYTHON := $(BIN)/python
GPU_NEEDS := $(TEST_READY)
endif

help: ## this list
	@echo "fastdaa: make VERB"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) PYTEST_FLAGS= BENCH_FLAGS="

setup: $(TEST_READY) ## make .venv with pinned packages and this checkout (about two minutes, once)

setup-dev: $(DEV_READY) ## the same, with ruff, mypy and pre-commit

$(TEST_READY): $(PINS) setup.py pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "setup: expected Python 3.10 or newer, got " + sys.version.split()[0] + "; name another with PYTHON=")'
	@test -x $(BIN)/python || { echo "[setup 1/5] new environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[setup 2/5] torch (the largest download; its CUDA build is several GB)"
	@$(PIP_INSTALL) -r requirements/torch.txt
	@echo "[setup 3/5] the other packages, pinned"
	@$(PIP_INSTALL) -r requirements/test.txt
	@echo "[setup 4/5] triton, unless torch brought one"
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) -r requirements/triton.txt
	@echo "[setup 5/5] fastdaa itself, from this checkout"
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@
	@echo "[setup done] $$($(BIN)/python --version) in $(VENV)"

$(DEV_READY): $(TEST_READY) requirements/dev.txt
	@echo "[setup dev] ruff, mypy, pre-commit"
	@$(PIP_INSTALL) -r requirements/dev.txt
	@touch $@

demo: $(TEST_READY) ## train, align and plot a small policy on the CPU (under five minutes)
	@$(BIN)/python -m fastdaa.cli demo

test: $(TEST_READY) ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

test-fast: $(TEST_READY) ## the same without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow" $(PYTEST_FLAGS)

lint: $(DEV_READY) ## ruff, its formatter as a check, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_READY) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(TEST_READY) ## the whole training step beside TRL's, on the CPU (about ten minutes)
	OMP_WAIT_POLICY=passive $(BIN)/python -m fastdaa.benchmarks.step_vs_trl $(BENCH_FLAGS)

gpu-check: $(GPU_NEEDS) ## GPU tests and benchmarks on a CUDA machine (PYTHON=... uses that Python as it is)
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-check: expected a CUDA device, torch " + torch.__version__ + " sees none")'
	@mkdir -p $(RESULTS)
	@$(GPU_PYTHON) -c 'import platform, torch; print("gpu-check:", torch.cuda.get_device_name(), "torch", torch.__version__, "Python", platform.python_version())'
	PYTHONPATH=$(CURDIR) timeout 240 $(GPU_PYTHON) -m pytest -m gpu -W default -p no:cacheprovider $(PYTEST_FLAGS)
	PYTHONPATH=$(CURDIR) timeout 240 $(GPU_PYTHON) -m fastdaa.benchmarks.step_vs_trl --device cuda --hidden 2048 --layers 16 --vocab 128256 --output $(RESULTS)/step_cuda.jsonl $(BENCH_FLAGS)

wheel: $(TEST_READY) ## wheel and sdist in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove caches and built files; the environment and results stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
