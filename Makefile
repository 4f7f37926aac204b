# Two commands: `make demo` trains, compresses, measures and reports; `make test` checks everything.
# Both make .venv when it is missing and work on Debian with python3.11, python3.11-venv, make and git.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT ?= runs/digits
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export ORT_DISABLE_TELEMETRY := 1

.PHONY: demo test soak peers clean

demo: .venv/.demo
	@test ! -e "$(OUT)" -o -e "$(OUT)/run.json" || { echo "error: $(OUT) is not a run folder; name another OUT" >&2; exit 2; }
	@rm -rf "$(OUT)"
	@$(BIN)/tacit run --out "$(OUT)"

test: .venv/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 4 --dist loadfile -m "not soak"

soak: .venv/.soak
	@$(BIN)/pytest -q -m soak

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: python3.11 not found; install it (Debian: apt-get install python3.11 python3.11-venv)" >&2; exit 7; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; install it (Debian: apt-get install python3.11-venv)" >&2; exit 7; }
	@"$(PYTHON)" -m venv .venv

# torch first and pinned: an unpinned one would bring gigabytes of CUDA.
.venv/.demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

.venv/.test: .venv/.demo
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

.venv/.soak: .venv/.test
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev,simulation]'
	@touch $@

# What benchmarks compare with and the product never needs; torch as ours, pfl as its guide installs it.
peers: .venv-peers/.peers

.venv-peers/.peers: Makefile
	@test -n "$(PYTHON)" || { echo "error: python3.11 not found; install it (Debian: apt-get install python3.11 python3.11-venv)" >&2; exit 7; }
	@echo "Installing into .venv-peers (a few minutes)"
	@"$(PYTHON)" -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 numpy
	@.venv-peers/bin/python -m pip install -q --disable-pip-version-check 'pfl[pytorch]==0.6.0'
	@touch $@

clean:
	rm -rf .venv .venv-peers runs dist build .mypy_cache .ruff_cache
