# `make` lists the commands. Each one prepares .venv first (tools/dev/env.sh), which does nothing when it is ready.
SHELL := /bin/bash
# KAIYUAN_PYTHON names a Python that has torch already, as in NVIDIA's containers: nothing is installed then.
PYTHON_IN_VENV := $(or $(KAIYUAN_PYTHON),.venv/bin/python)
ifdef KAIYUAN_PYTHON
export KAIYUAN_PYTHON
export KAIYUAN_IGNORE_VENV := 1
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
# One thread a process: the tests and the demo start several processes on few cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env demo test gpu-check lint format types check check-slow clean distclean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

env:  ## prepare .venv: find Python 3.12, create, install
	@bash tools/dev/env.sh

test check-slow gpu-check: export KAIYUAN_TESTS := 1

demo: env  ## the main job on real text in minutes, on two CPU cores or the GPUs that are there
	@$(PYTHON_IN_VENV) examples/demo/run_demo.py $(ARGS)

test: env  ## the tests, two files at a time, the long ones first, and those of a GPU where there is one; choose some with ARGS="-k name"
	@failed=0; \
	$(if $(ARGS),,$(PYTHON_IN_VENV) tools/dev/gpu_check.py --where-there-is-one --without-throughput || failed=1;) \
	$(PYTHON_IN_VENV) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS) || failed=1; \
	exit $$failed

gpu-check: env  ## what only a GPU shows, one line a check, and a row of throughput; ARGS="-k name"
	@$(PYTHON_IN_VENV) tools/dev/gpu_check.py $(ARGS)

lint: env  ## ruff: rules and formatting
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .

format: env  ## apply ruff's formatting and its safe fixes
	@$(PYTHON_IN_VENV) -m ruff check --fix .
	@$(PYTHON_IN_VENV) -m ruff format .

types: env  ## mypy --strict
	@$(PYTHON_IN_VENV) -m mypy

# The tests come last: the last line of a run is then pytest's summary.
check: lint types test  ## everything that CI runs

check-slow: env  ## the tests that take minutes, which the others leave out
	@SLOW_TESTS=1 $(PYTHON_IN_VENV) -m pytest -m slow $(ARGS)

clean:  ## remove caches, builds and the demo's output; keep .venv
	@rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and .venv too
	@rm -rf .venv megatron_kaiyuan.egg-info
