# Every target does all of its own set-up: a fresh clone needs python3, make and a package index.
.DEFAULT_GOAL := help
.PHONY: help demo test check docs parity integration ray soak fuzz cuda bench lowest clean

PYTHON ?= python3
LOWEST_PYTHON ?= python3.10
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := positions twin malformed families collator workers vision train cli
LOWEST_TESTS := $(LOWEST:%=tests/test_%.py) tests/parity/test_live.py
# One thread for each process: tests run in as many processes as there are cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: nothing after it may choose another build.
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## Train on real images twice, positions from the workers and from the model, and compare
	$(BIN)/mrope train configs/demo.yaml --compare

test: check docs  ## All that CI runs: lint, types, docs, tests (under 10 minutes on 2 cores)
	$(BIN)/pytest -q -n 2 --dist loadscope

check: $(READY)  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Never with --quiet: it silences the warnings before --strict counts them.
docs: $(READY)  ## Build the docs strictly into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# transformers 4.57 and 5.17 need environments of their own (about 2 minutes each to set up).
parity: .venvs/4.57.6/.ready .venvs/5.17.0/.ready $(READY)  ## Compare with transformers 4.57.6, 5.17.0 and 5.23.0, live
	for env in .venvs/4.57.6 .venvs/5.17.0 $(VENV); do \
	  PYTHONPATH=src:tests $$env/bin/python -m pytest -q -p no:cacheprovider tests/parity/test_live.py && \
	  PYTHONPATH=src:tests $$env/bin/python tests/parity/make_goldens.py --check || exit 1; \
	done

.venvs/%/.ready: constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|tokenizers|huggingface.hub)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet -c $(@D)/constraints.txt torch numpy pytest pytest-timeout hypothesis transformers==$*
	touch $@

# TRL brings requirements that nothing else here has; its pins stand in constraints.txt.
integration: .venvs/integration/.ready  ## Train with real trainers: Trainer, TRL, accelerate, Lightning, torchdata, DDP (about 3 minutes)
	PYTHONPATH=tests .venvs/integration/bin/python -m pytest -q -p no:cacheprovider tests/integration

.venvs/integration/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt torch
	$(@D)/bin/pip install --quiet -c constraints.txt -e '.[integration]'
	touch $@

# A real Ray of two workers on this machine.
ray: .venvs/ray/.ready  ## Precheck and the collator on Ray Data, and their rows per second (about 3 minutes)
	PYTHONPATH=src:tests .venvs/ray/bin/python -m pytest -q -p no:cacheprovider --show-capture=no tests/raydata
	PYTHONPATH=src:tests .venvs/ray/bin/python tests/raydata/rates.py --json docs/benchmarks/ray.json

.venvs/ray/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt torch
	$(@D)/bin/pip install --quiet -c constraints.txt -e '.[cli,ray]' pytest pytest-timeout sybil
	touch $@

soak: $(READY)  ## 20,000 batches through persistent workers, twice: memory, files, equal results (about 10 minutes)
	PYTHONPATH=src:tests $(BIN)/python tests/soak/soak.py --json docs/benchmarks/soak.json

fuzz: $(READY)  ## 20,000 damaged samples: the exact result or an MRopeError, and nothing else (about 3 minutes)
	PYTHONPATH=src:tests $(BIN)/python -X faulthandler -m fuzz.run

# No set-up here: the machine's own Python and CUDA build of torch, with transformers 5.23 and the cli extra.
cuda:  ## On a machine with a GPU: the guard's snippets, and packing under sdpa, eager and flash attention
	mkdir -p outputs
	PYTHONPATH=src:tests $(PYTHON) tests/cuda/check_guard.py outputs/guard.json
	PYTHONPATH=src:tests $(PYTHON) tests/cuda/check_packing.py outputs/packing.json

bench: $(READY)  ## Measure the positions and the vision tensors (about a minute)
	$(BIN)/mrope bench positions
	$(BIN)/mrope bench vision

# The oldest Python, torch, numpy, transformers, typer ... that pyproject.toml allows, chosen by uv. The
# wheels of torch 2.4 bring the CUDA libraries: about 3 GB to download. Old packages call what newer ones
# below them have deprecated; here that is no error.
lowest: .venvs/lowest/.ready  ## Run the tests with the oldest dependencies (LOWEST_PYTHON=python3.10)
	PYTHONPATH=src:tests .venvs/lowest/bin/python -m pytest -q -p no:cacheprovider \
	  -W ignore::DeprecationWarning $(LOWEST_TESTS)

.venvs/lowest/.ready: pyproject.toml
	$(LOWEST_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet uv
	VIRTUAL_ENV=$(@D) $(@D)/bin/uv pip install --quiet --resolution lowest-direct -e '.[train,plot]' \
	  'pytest>=8.2' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
	touch $@

clean:  ## Remove what the targets made
	rm -rf $(VENV) .venvs site outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
