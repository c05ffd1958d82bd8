# `make help` lists the commands. They need Python 3.10 or newer, git and make, and install everything
# else into .venv once. They are optional if you have an environment with PyTorch and Detectron2.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-lowest gpu-check lint format pretrain venv clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(READY) ## fine-tune the shipped detector on new classes, evaluate, draw
	$(BIN)/python tools/quickstart.py

test: $(READY) lint ## formatting, lint and the whole test suite
	$(BIN)/python -m pytest

test-all: $(READY) lint ## the same, with the tests that take minutes each
	$(BIN)/python -m pytest -m "long or not long"

LOWEST := .venv-lowest
test-lowest: ## the test suite at the lowest supported versions, in .venv-lowest
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet \
	    --constraint tests/lowest.txt --editable '.[test]'
	$(LOWEST)/bin/python -c 'import detectron2' 2>/dev/null || \
	    $(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet ./packaging/detectron2
	$(LOWEST)/bin/python -m pytest

# Without .venv, PYTHON must have PyTorch, Detectron2 and the packages of the tests.
gpu-check: ## tests, benchmark and a profile on a GPU, in ten minutes; results in output/gpu_check
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.gpu_check $(ARGS)

lint: $(READY) ## formatting and lint only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## apply formatting and the safe fixes of the linter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pretrain: $(READY) ## train the shipped detector from scratch, or continue its training
	$(BIN)/python tools/make_scenes.py
	$(BIN)/python train_net.py --config-file configs/quickstart/pretrain.yaml \
	    --num-processes 2 --resume

venv: $(READY) ## set up .venv only

# The stamp is written last, so that an interrupted set-up is repeated.
$(READY): setup.py pyproject.toml $(wildcard packaging/detectron2/*.toml packaging/detectron2/*/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is not Python 3.10 or newer; use another one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable '.[test]'
	$(BIN)/python -c 'import detectron2' 2>/dev/null || $(PIP) install --quiet ./packaging/detectron2
	touch $@

clean: ## remove .venv and all output
	rm -rf $(VENV) $(LOWEST) output datasets build *.egg-info .pytest_cache .ruff_cache .hypothesis
