# `make` alone lists the verbs. Everything runs in $(VENV), which `make setup` fills once.
PYTHON ?= python3
VENV ?= .venv
# Test processes side by side: one a core, at most four, each with one thread.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ "$$n" -gt 4 ] && n=4; echo "$$n")
# Where `make gpu-check` leaves its JSON lines, and `make bench` its own and their page.
RESULTS ?= benchmarks/results
BENCH_OUTPUT ?= bench_output
# Seconds for the timed steps of `make bench`, which it spreads over its cases.
STEP_BUDGET ?= 200
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
BENCH_READY := $(VENV)/.fastdaa-bench
PINS := requirements/torch.txt requirements/triton.txt requirements/base.txt requirements/test.txt

# `make gpu-check PYTHON=python3` uses that interpreter as it is, and installs nothing.
ifneq ($(filter command line environment,$(origin PYTHON)),)
GPU_PYTHON := $(PYTHON)
GPU_NEEDS :=
else
GPU_PYTHON := $(BIN)/python
GPU_NEEDS := $(BENCH_READY)
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

$(BENCH_READY): $(TEST_READY) requirements/bench.txt
	@echo "[setup peers] liger-kernel, cut-cross-entropy, bitsandbytes"
	@$(PIP_INSTALL) --no-deps -r requirements/bench.txt
	@touch $@

demo: $(TEST_READY) ## a small over-optimisation sweep, its law and its page (a minute and a half)
	@$(BIN)/python -m fastdaa.cli demo

test: $(BENCH_READY) ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

test-fast: $(BENCH_READY) ## the same without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow" $(PYTEST_FLAGS)

lint: $(DEV_READY) ## ruff, its formatter as a check, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_READY) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every benchmark runs, whatever the others did; Ctrl-C keeps finished rows and ends all.
bench: $(BENCH_READY) ## head, loss, step, memory, accuracy beside their peers, and a page (under ten minutes)
	@cases=$$($(BIN)/python -c "import torch; print('gpu' if torch.cuda.is_available() else 'cpu')"); \
	failed=; for kind in head loss memory accuracy step; do echo "[bench] $$kind"; \
	  what="--selection $$cases"; code=0; \
	  [ $$kind != step ] || what="--budget $(STEP_BUDGET)"; \
	  OMP_WAIT_POLICY=passive $(BIN)/python -m fastdaa.cli bench $$kind $$what \
	    --output $(BENCH_OUTPUT)/$$kind.jsonl $(BENCH_FLAGS) || code=$$?; \
	  [ $$code -ne 130 ] || exit 130; [ $$code -eq 0 ] || failed="$$failed $$kind"; \
	done; \
	$(BIN)/python -m fastdaa.cli bench report $(BENCH_OUTPUT)/*.jsonl --output $(BENCH_OUTPUT)/page; \
	[ -z "$$failed" ] || { echo "bench: failed:$$failed" >&2; exit 1; }

gpu-check: $(GPU_NEEDS) ## GPU tests and benchmarks on a CUDA machine (PYTHON=... uses that Python as it is)
	PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m fastdaa.benchmarks.gpu_check --results $(RESULTS) $(BENCH_FLAGS)

wheel: $(TEST_READY) ## wheel and sdist in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove caches and built files; the environment and results stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
