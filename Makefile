# PYTHON chooses the interpreter that .venv is made with; later runs keep the .venv they find.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

setup:  ## Create .venv and install everything in it (instant when up to date)
	@command -v $(PYTHON) >/dev/null || { echo "adlocal: no $(PYTHON) here; install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) scripts/setup.py

demo: setup  ## Protect a small real model and show the difference
	@$(BIN)/adlocal demo

test: lint  ## Run everything that CI runs: lint, types, tests
	$(BIN)/python -m pytest

lint: setup  ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove .venv, caches, builds and the demo's output
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache adlocal-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
