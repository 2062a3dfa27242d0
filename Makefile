# Needs python3 (3.11 or newer) with pip and venv, and make. Everything else is set up here, in .venv.
.DEFAULT_GOAL := help
.PHONY: help uptrain test test-gpu lint format clean

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
JOBS   ?= 2

PY := $(VENV)/bin/python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter; ARGS='key=value ...' goes to attnzoo uptrain"

uptrain: $(VENV)/.ready ## the whole main job: convert a real model to one KV head, uptrain it, report what was won
	$(PY) -m attnzoo.cli uptrain $(ARGS)

test: lint ## lint, types and tests: what CI runs
	@status=0; export OMP_NUM_THREADS=1; \
	$(PY) -m pytest -q -m "serial and not gpu" || status=$$?; \
	$(PY) -m pytest -q -m "not serial and not gpu" -n $(JOBS) || status=$$?; \
	exit $$status

test-gpu: $(VENV)/.ready-dev ## the tests that need a GPU, and the ops' tests natively
	$(PY) -m pytest -q tests/ops $(wildcard tests/gpu)

lint: $(VENV)/.ready-dev ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.ready-dev ## let ruff put the code in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and the tools' caches; runs and checkpoints stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis attnzoo.egg-info
	find attnzoo recipes conf tests scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp appears when its installation has ended. While one is under way .unfinished lies there: where it is found,
# or .created is missing, an earlier set-up was interrupted and the environment is made afresh. Modules are compiled when
# they are first imported: most of the packages' never are, and pip takes a minute or more for all of them.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "attnzoo needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@if [ ! -e $(VENV)/.created ] || [ -e $(VENV)/.unfinished ] || ! $(PY) -c 'import pip' 2>/dev/null; then \
	  echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV) && touch $(VENV)/.created; fi
	@echo "installing into $(VENV); the first time takes some minutes"
	@touch $(VENV)/.unfinished
	@$(PY) -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e '$(1)'
	@rm -f $(VENV)/.unfinished
	@touch $@
endef

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call install,.)

$(VENV)/.ready-dev: pyproject.toml constraints.txt
	$(call install,.[dev])
