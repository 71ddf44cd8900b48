# What can be made: `make help`. Needs python3 (3.11 or newer), a POSIX shell and a network that reaches the package index.

ACCEL ?= auto
PYTHON ?= python3
# Workers of the tests: one more than a small machine has cores, since some tests wait for processes.
JOBS ?= 3
BIN = .venv/bin
INSTALL = PYTHON="$(PYTHON)" tools/install.sh
LOCK = uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --no-header --no-annotate \
       --generate-hashes --quiet --output-file requirements.lock

# The first interpreter that is exactly Python $(1), from PATH or pyenv; empty where there is none.
find_python = $(shell for python in python$(1) $(HOME)/.pyenv/versions/$(1)*/bin/python python3; do \
    $$python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$(1)')" >/dev/null 2>&1 && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help install demo docs plan-env test-plan test test-slow test-latest launch-env test-launch test-host lint format \
    peers lock clean clean-all

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo "  ACCEL=auto|cpu|tpu|cuda chooses the accelerator (now $(ACCEL)), PYTHON=... the interpreter (now $(PYTHON))"

install: ## .venv from requirements.lock; ACCEL=auto looks for a TPU or GPU
	@$(INSTALL) .venv $(ACCEL)

demo: install ## train SASRec on MovieLens-100K, under five minutes on two cores
	$(BIN)/jaxops train rec/movielens_sasrec --cpu-devices 8

docs: ## build/docs/index.html, in an environment of its own; a warning is an error
	@$(INSTALL) .venv-docs cpu
	@.venv-docs/bin/python -c "import myst_nb, sphinx_book_theme" 2>/dev/null || \
	    .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	.venv-docs/bin/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html is ready"

plan-env: ## .venv-plan, with the compiler for TPUs that `jaxops plan` asks (Linux x86; 1.5 GB)
	@$(INSTALL) .venv-plan tpu

test-plan: plan-env ## the checks that compile for TPUs that are not here (an hour on two cores)
	.venv-plan/bin/python -m pytest -m slow tests/plan tests/launch/test_accelerators.py

test: install ## the test suite
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: install ## the long checks
	$(BIN)/python -m pytest -m slow

launch-env: .venv-launch/.installed ## .venv-launch: xpk, SkyPilot, Ray and Kubernetes' types, which check what launches render (1.5 GB)

.venv-launch/.installed: tests/launch/tools.txt
	@echo "making .venv-launch (minutes) ..."
	@$(PYTHON) -m venv --clear .venv-launch
	@.venv-launch/bin/python -m pip install --quiet --disable-pip-version-check -r tests/launch/tools.txt
	@touch $@

test-launch: install launch-env ## the long checks of launches, with the tools of others
	$(BIN)/python -m pytest -m slow tests/launch

test-host: ## launch/setup_host.sh with this lock file, for a new home: what images and bare hosts run
	@home="$$(mktemp -d)" && trap 'rm -rf "$$home"' EXIT && \
	env -u VIRTUAL_ENV -u PYTHONPATH HOME="$$home" PYTHON="$(PYTHON)" ACCEL=cpu \
	    sh launch/setup_host.sh requirements.lock "$$home/env" && \
	JAX_PLATFORMS=cpu PYTHONPATH=. "$$home/env/bin/python" -m jaxops --version

test-latest: ## a smoke set on the newest jax, where a Python 3.12 is found
	@python="$(call find_python,3.12)"; \
	if [ -z "$$python" ]; then \
	    echo "test-latest: no Python 3.12 in PATH or among pyenv's versions: nothing was run"; \
	else \
	    PYTHON="$$python" tools/install.sh .venv-latest cpu && .venv-latest/bin/python -m pytest -m latest; \
	fi

lint: install ## formatting, rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## rewrite files as lint wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

peers: .peers/recbole/.installed .peers/transformers/.installed .peers/trl/.installed ## separate environments in which benchmarks run peers

# RecBole asks for a ray that newer Pythons cannot install and that we stub, hence --no-deps.
.peers/recbole/.installed: benchmarks/peers/recbole.txt
	@python="$(or $(call find_python,3.11),$(call find_python,3.12))"; \
	if [ -z "$$python" ]; then echo "error: RecBole needs Python 3.11 or 3.12 (numpy<2): none was found" >&2; exit 2; fi; \
	echo "making .peers/recbole with $$($$python --version) (about a minute, torch is large) ..."; \
	$$python -m venv --clear .peers/recbole
	@.peers/recbole/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/recbole.txt
	@.peers/recbole/bin/python -m pip install --quiet --disable-pip-version-check --no-deps recbole==1.2.1
	@touch $@

.peers/transformers/.installed .peers/trl/.installed: .peers/%/.installed: benchmarks/peers/%.txt
	@echo "making .peers/$* (about a minute, torch is large) ..."
	@$(PYTHON) -m venv --clear .peers/$*
	@.peers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/$*.txt
	@touch $@

lock: ## regenerate requirements.lock (UPGRADE=1 for the newest versions)
	@command -v uv >/dev/null || { echo "error: make lock needs uv: python3 -m pip install uv" >&2; exit 2; }
	$(LOCK) $(if $(UPGRADE),--upgrade)

clean: ## remove caches and built packages
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .compiled-tests
	find jaxops tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

clean-all: clean ## remove the virtual environments too
	rm -rf .venv .venv-docs .venv-latest .venv-plan .venv-launch .peers
