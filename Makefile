# Two commands matter: `make up` runs Sluice on embedded parts, `make test` proves it on real ones.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# Tests wait for real parts more than they compute: more of them at once than a small machine has cores.
WORKERS ?= 3
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help install install-dev up test conformance check services bench lock clean

help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/bin/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y python3-venv; }
	@$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python requirements.lock pyproject.toml
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.run requirements-dev.lock
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@

install: .venv/.run ## Make .venv with what is needed to run; .venv/bin/sluice is the command

install-dev: .venv/.dev ## The same, and what is needed to check and test

up: install ## Install, then run everything in one process on embedded parts
	@exec $(BIN)/sluice up

services: ## Start a real Kafka, TimescaleDB and Mosquitto on loopback
	@deploy/local/services start

test: install-dev ## Install, start the real parts, run every test
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable

conformance: install-dev ## schemathesis against the running API, 10,000 cases and more
	@$(BIN)/python -m tests.system.conformance

check: install-dev ## Lint, types, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: install-dev ## Micro benchmarks, then the pipeline on the real parts
	@$(BIN)/python -m pytest bench --benchmark-only --benchmark-disable-gc -o filterwarnings=default
	@$(BIN)/sluice bench pipeline

lock: ## Pin the dependencies again (needs uv); the files name no index
	@uv pip compile pyproject.toml --group build --universal --generate-hashes --no-emit-index-url \
		--no-annotate --no-header --quiet --output-file requirements.lock
	@uv pip compile pyproject.toml --group build --group dev --universal --generate-hashes --no-emit-index-url \
		--no-annotate --no-header --quiet --constraint requirements.lock --output-file requirements-dev.lock

clean: ## Stop and forget the local services, remove what was built
	@[ ! -d .services ] || deploy/local/services wipe
	@rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
