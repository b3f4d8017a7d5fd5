# The door. `make help` lists what is here; CI calls the same targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 1
EXP ?= lora_cpu
WORKERS ?= 2
READY := $(VENV)/.ready
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help setup demo test check plan bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## make .venv with the versions that were tested together

$(READY): setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tunesmith needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version: an open range would let pip choose a build with gigabytes of CUDA.
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(READY) ## fine-tune a real model on real data through DeepSpeed, on this CPU, and show what it learned (RANKS=2: two ranks; EXP=demo_tools: all tools in the prompt)
	deepspeed --num_accelerators $(RANKS) train.py +exp=$(EXP)

test: $(READY) ## run all tests (WORKERS=2: files at a time)
	python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore=tests/cluster
	# Apart: on a real Slurm everybody has so many seconds to answer, to save, to be found dead.
	python -m pytest tests/cluster

check: $(READY) ## lint and types
	ruff check . && mypy

plan: $(READY) ## say what an experiment would do, without starting it: make plan EXP=lora_cpu RANKS=2
	python -m launcher +exp=$(EXP) --ranks $(RANKS) --dry

bench: $(READY) ## measure beside TRL: training, part by part, then preparing data; about an hour and a half on 2 quiet cores (TRL gets an environment in build/)
	python -m bench.train
	python -m bench.train --ablation --only short
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,bench]'
	python -m bench.prepare

clean: ## remove what the tools leave (not data/ or outputs/)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
