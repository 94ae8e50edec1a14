# `make demo` and `make test` set up .venv themselves; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help env demo test check lint real-models bench clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/'

env:  ## Create or update .venv
	@$(PYTHON) scripts/setup_env.py --venv $(VENV)

demo: env  ## Chat with a server whose KV cache is compressed; MODEL=models/qwen2.5-coder-0.5b takes a real model
	@$(BIN)/python examples/demo.py $(if $(MODEL),--model $(MODEL))

test: lint  ## Run the linter and all tests
	@$(BIN)/python -m pytest

check: lint  ## Run the linter and the tests of the CPU kernels and the plugin, no server
	@$(BIN)/python -m pytest tests/kernels tests/sglang_spark --ignore tests/kernels/gpu

MODELS := smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b gemma3-270m

real-models: env  ## Make the real models that accuracy is measured on, in models/ (6 GB)
	@$(BIN)/python -m pip install --quiet accelerate
	@for name in $(MODELS); do $(BIN)/python scripts/real_models.py $$name || exit 1; done

lint: env  ## Run the linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

bench: env  ## Time decode attention against dense attention, on the GPU if there is one
	@$(BIN)/python scripts/bench_decode.py

clean:  ## Remove .venv
	rm -rf $(VENV)
