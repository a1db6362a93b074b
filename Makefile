# The front door.  Each target sets up .venv by itself, from nothing but make and Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
# The stamp holds the folder it was made in: scripts inside a virtual environment name their own path, so a moved or
# copied checkout sets up anew.
STAMP := .venv/.set-up
HERE := $(shell pwd)
PINS := requirements/dev.txt
PACKAGES := packages/llm-daemon packages/llm-daemon-bench
SETUP_FROM := $(PINS) $(PACKAGES:=/pyproject.toml)
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup run check test llama-server soak bench bench-matrix format pins clean

ifneq ($(shell cat $(STAMP) 2>/dev/null),$(HERE))
.PHONY: $(STAMP)
endif

help:
	@echo 'make setup   .venv with everything pinned (all others do this by themselves)'
	@echo 'make run     ask the starter model a question'
	@echo 'make check   format, lint, types and the tests of the core: what takes a minute or two'
	@echo 'make test    everything that must pass, real engine included'
	@echo 'make llama-server   build llama.cpp programs for tests and benchmarks (some minutes, once)'
	@echo 'make soak    the tests that take minutes'
	@echo 'make bench   our own speed, against peers'
	@echo 'make bench-matrix   three server applications, two models, three quantizations (about 40 minutes, undisturbed)'
	@echo 'make format  put the code into its form'
	@echo 'make pins    resolve requirements/dev.txt anew'
	@echo 'make clean   remove .venv, caches and builds'

setup: $(STAMP)
	@:

# The stamp goes first and comes last, so an interrupted setup starts over.
$(STAMP): $(SETUP_FROM)
	@command -v $(PYTHON) >/dev/null || { echo 'Python is missing: apt-get install python3 python3-venv, or make PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: name a newer one, make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo 'Python cannot make virtual environments here: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Setting up .venv (pinned packages, about a minute; once)' >&2
	@if [ "$$(cat $@ 2>/dev/null)" != '$(HERE)' ]; then $(PYTHON) -m venv --clear .venv; fi
	@rm -f $@
	@$(BIN)/python -m pip install -qq --no-deps --require-hashes -r $(PINS)
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation $(addprefix -e ,$(PACKAGES))
	@echo '$(HERE)' >$@

run: $(STAMP)
	@$(BIN)/llm-daemon run smollm2-135m "Why is the sky blue? Answer in one sentence." </dev/null

check: $(STAMP)
	@$(BIN)/ruff format --check --quiet --output-format concise || { echo 'not formatted: make format' >&2; exit 1; }
	@$(BIN)/ruff check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/pytest packages/llm-daemon/tests/core

# A llama-server that was built before is tested too.  Most tests wait for processes, so two at a time cost little more.
test: $(STAMP)
	@LLM_DAEMON_TEST_LLAMA_SERVER="$${LLM_DAEMON_TEST_LLAMA_SERVER:-$$($(BIN)/python tools/build_llama_server.py --path)}" \
	  $(BIN)/pytest -m 'not slow' -n $(WORKERS) --dist worksteal

llama-server: $(STAMP)
	@$(BIN)/python tools/build_llama_server.py

# SECONDS=600 make soak takes ten minutes.
soak: $(STAMP)
	@SECONDS="$(or $(SECONDS),120)" $(BIN)/pytest -m slow --timeout 7200

bench: $(STAMP)
	@LLM_DAEMON_TEST_LLAMA_SERVER="$${LLM_DAEMON_TEST_LLAMA_SERVER:-$$($(BIN)/python tools/build_llama_server.py --path)}" \
	  $(BIN)/python benchmarks/run.py

bench-matrix: $(STAMP)
	@$(BIN)/python tools/bench_matrix.py

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format --quiet

# Hashes and no addresses: whoever installs uses the package index of their own configuration.
pins: $(STAMP)
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-find-links --no-emit-package llm-daemon --all-extras $(PACKAGES:=/pyproject.toml) \
	  requirements/dev.in -o $(PINS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist packages/*/dist
	find packages tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
