# Two commands: `make workbook` and `make test`. Both set up what is missing; both may be repeated.
PYTHON ?= python3
BIN := .venv/bin
# How long threads wait awake: see bksdm_utils/__init__.py.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 10000
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup workbook test test-all test-nightly results bench lab lint requirements clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## make .venv with the pinned packages and this one

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

workbook: .venv/ready ## run all notebooks on the storybook preset; results, images and pages go to outputs/index.html
	$(BIN)/python -m bksdm_utils run all

test: .venv/ready ## the quick tests, about five minutes on two idle cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not nightly" --durations 5

test-all: .venv/ready ## the slow tests too, without the nightly ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not nightly" --durations 20

test-nightly: .venv/ready ## what needs a second environment or very long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m nightly --durations 20

results: .venv/ready ## the README's table: all three students with three seeds each, about forty minutes on two cores
	$(BIN)/python -m bksdm_utils run 03 -p variant bk_base,bk_small,bk_tiny -p seed 0,1,2 -p ablation_steps 0
	$(BIN)/python -m bksdm_utils run 07 -p readme README.md

bench: .venv/ready ## speed of distillation, sampling and scoring beside plain loops, as ratios, in about a quarter of an hour
	$(BIN)/python benchmarks/kd.py
	$(BIN)/python benchmarks/evaluation.py

lab: .venv/ready ## open JupyterLab
	$(BIN)/jupyter lab notebooks

lint: .venv/ready ## check the style, and that imports go downwards
	$(BIN)/ruff check . && $(BIN)/ruff format --check bksdm_utils benchmarks tests && $(BIN)/lint-imports

requirements: .venv/ready ## compile requirements.txt anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --generate-hashes --no-header --no-annotate --quiet \
	  --output-file requirements.txt

clean: ## remove what runs wrote, but not the environment
	find outputs -mindepth 1 ! -name README.md -delete
