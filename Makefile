# `make demo` and `make test` set up .venv themselves; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help env demo test lint bench clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/'

env:  ## Create or update .venv
	@$(PYTHON) scripts/setup_env.py --venv $(VENV)

demo: env  ## Chat with a server whose KV cache is compressed
	@$(BIN)/python examples/demo.py

test: lint  ## Run the linter and all tests
	@$(BIN)/python -m pytest

lint: env  ## Run the linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

bench: env  ## Time decode attention against dense attention, on the GPU if there is one
	@$(BIN)/python scripts/bench_decode.py

clean:  ## Remove .venv
	rm -rf $(VENV)
