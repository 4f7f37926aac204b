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

.PHONY: demo test soak programs peers web clean

demo: .venv/.demo
	@test ! -e "$(OUT)" -o -e "$(OUT)/run.json" || { echo "error: $(OUT) is not a run folder; name another OUT" >&2; exit 2; }
	@rm -rf "$(OUT)"
	@$(BIN)/tacit run --out "$(OUT)"

test: .venv/.test programs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 4 --dist loadfile -m "not soak"

soak: .venv/.soak programs
	@$(BIN)/pytest -q -m soak

# What tests drive that is no Python package, as program:Debian-package. Root of a container gets them installed;
# on a machine with services, where a package would start one, they are only named.
PROGRAMS := sshd:openssh-server adb:adb
soak: PROGRAMS += chromium:chromium chromedriver:chromium-driver

programs:
	@missing=; for pair in $(PROGRAMS); do PATH="$$PATH:/usr/sbin" command -v "$${pair%%:*}" >/dev/null || missing+=" $${pair##*:}"; done; \
	test -z "$$missing" || { test "$$(id -u)" = 0 && test ! -d /run/systemd/system && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; } \
	|| { echo "error: tests need$$missing; install it (Debian: apt-get install$$missing)" >&2; exit 7; }

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

# The runtimes that a browser runs, pinned by content; git ignores them, a wheel built afterwards holds them.
web: devices/web/vendor/versions.json

VENDORED := onnxruntime-web@1.30.0 @litertjs/core@2.5.3 @litertjs/wasm-utils@2.5.3
define VENDORED_SHA256
a97660833e9e7e1063c95e12016718881240b14f7438728a2f62785e912d30fd  litertjs-core-2.5.3.tgz
ce2a1f8379c067be49e59752e5a7f40db6be09f6e497f0f11e59f17b515366a7  litertjs-wasm-utils-2.5.3.tgz
d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71  onnxruntime-web-1.30.0.tgz
endef
export VENDORED_SHA256

devices/web/vendor/versions.json: Makefile
	@command -v npm >/dev/null || { echo "error: npm not found; install it (Debian: apt-get install npm)" >&2; exit 7; }
	@rm -rf devices/web/vendor devices/web/.packed
	@mkdir -p devices/web/.packed devices/web/vendor/onnxruntime-web devices/web/vendor/litert/wasm
	@cd devices/web/.packed && npm pack --silent $(VENDORED) >/dev/null && sha256sum --quiet -c <<<"$$VENDORED_SHA256"
	@cd devices/web/.packed && for name in *.tgz; do mkdir "$${name%.tgz}" && tar -xzf "$$name" -C "$${name%.tgz}" --strip-components=1; done
	@cd devices/web/.packed/onnxruntime-web-1.30.0/dist && cp ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm ../../../vendor/onnxruntime-web
	@cd devices/web/.packed && cp litertjs-core-2.5.3/wasm/litert_wasm_{,compat_}internal.{js,wasm} ../vendor/litert/wasm
	@cd devices/web/.packed && cp litertjs-wasm-utils-2.5.3/dist/index.js ../vendor/litert/wasm-utils.js
	@cd devices/web/.packed && sed 's|"@litertjs/wasm-utils"|"./wasm-utils.js"|' litertjs-core-2.5.3/dist/index.js > ../vendor/litert/index.js
	@rm -rf devices/web/.packed
	@echo '{"onnxruntime-web": "1.30.0", "LiteRT.js": "2.5.3"}' > $@

clean:
	rm -rf .venv .venv-peers runs dist build .mypy_cache .ruff_cache
