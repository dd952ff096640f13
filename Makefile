# memfree: `make help` lists what there is. The environment is made once, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-all test-slurm test-gpu lint bench study clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(STAMP) ## Make the virtual environment and install memfree with its developer tools

demo: $(STAMP) ## Train on digits with repeats, show the copies, sample again without one
	$(BIN)/memfree demo --out runs/demo

test: $(STAMP) ## Run all tests, two at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(STAMP) ## Run the tests that take less than a few seconds each
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not exhaustive'

test-all: $(STAMP) ## Run all tests and those that repeat others many times (hours)
	$(BIN)/python -m pytest -m '' -o timeout=7200

test-slurm: $(STAMP) ## Run the tests on a real Slurm (needs apt packages slurm-wlm munge iproute2)
	$(BIN)/python -m pytest -m 'slurm and not exhaustive' tests/slurm

test-gpu: $(STAMP) ## Run the tests that need a GPU (tests/run_gpu.sh --help: without a network)
	PYTHON=$(BIN)/python tests/run_gpu.sh

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Measure speed, each figure beside its peer or its floor
	for name in detection guidance latent_guidance text_mitigations training stream robustness; do $(BIN)/python benchmarks/$$name.py || exit 1; done

study: $(STAMP) ## Run the studies of docs/results.md (about six hours on two cores)
	$(BIN)/memfree study configs/study/oracle.yaml
	$(BIN)/memfree study configs/study/ablation.yaml
	$(BIN)/memfree study configs/study/settings.yaml
	$(BIN)/memfree study configs/study/duplication_ladder.yaml
	$(BIN)/memfree study configs/study/data_size.yaml
	$(BIN)/memfree study configs/study/conditioning.yaml
	$(BIN)/memfree study configs/study/mitigations.yaml
	$(BIN)/memfree study configs/study/emoji_settings.yaml
	$(BIN)/memfree study configs/study/emoji_baselines.yaml
	$(BIN)/memfree study configs/study/emoji_ablation.yaml

clean: ## Remove the environment and everything that was made, data sets excepted
	rm -rf $(VENV) runs build dist
