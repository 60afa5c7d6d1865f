# `make demo` and `make test` do all the set-up themselves; `make help` lists the rest.
VENV ?= .venv
PYTHON ?= python3
RUNTIME ?= ray
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: help demo test test-fast check format install clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## the virtual environment with the pinned packages

# torch comes first and alone: DeepSpeed's build reads it, and an open range would fetch another build of it
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $$(grep -E '^(torch|numpy|setuptools|wheel|ninja|packaging|py-cpuinfo)==' requirements.lock)
	DS_BUILD_OPS=0 $(RUN) -m pip install --quiet --no-build-isolation -r requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP) ## CLIP and a VQA model trained and served, a reward model, PPO, a sweep, a report (RUNTIME=local: without Ray)
ifeq ($(RUNTIME),local)
	$(RUN) -m fmray.cli demo --recipe demo_local run.fresh=true
else
	$(RUN) -m fmray.cli demo run.fresh=true
endif

test: $(STAMP) ## all tests
	$(RUN) -m pytest -q --durations=15

test-fast: $(STAMP) ## the tests that need no Ray and no patience
	$(RUN) -m pytest -q -m "not slow and not ray"

check: $(STAMP) ## formatting, lint, types, architecture
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q tests/test_architecture.py

format: $(STAMP) ## write the formatting
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean: ## remove the environment and the runs
	rm -rf $(VENV) runs .parity
