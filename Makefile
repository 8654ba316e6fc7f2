# Each target sets up its own environment: a fresh clone needs python3, make and a package index.
.DEFAULT_GOAL := help
.PHONY: help demo test check docs browser parity releases integration peers ray soak slow fuzz cuda bench lowest newest newest-torch clean

PYTHON ?= python3
LOWEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.13
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := positions/test_rope_index positions/test_twin positions/test_malformed spec/test_families \
  collate/test_collator collate/test_workers towers/test_vision training/test_trainer test_cli parity/test_live
LOWEST_TESTS := $(LOWEST:%=tests/%.py)
# One thread per process, since tests run in one process per core.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned, so that no later package pulls in another build.
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## Train on photographs twice, with positions from the workers and from the model, and compare every loss
	$(BIN)/mrope train configs/demo.yaml --compare

test: check docs browser  ## Run everything that CI runs: check, docs and tests (under 10 minutes on 2 cores)
	$(BIN)/pytest -q -n 2 --dist worksteal

check: $(READY)  ## Lint, format, types, import directions, and limits of functions and files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tests/house.py
	$(BIN)/python tests/limits.py

# Without --quiet, which drops warnings before --strict counts them.
docs: $(READY)  ## Build the docs strictly into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Debian's package needs root; playwright's own build, a download, does not. Tests find either.
browser: $(READY)  ## Install a Chromium for the tests that look at pages, unless there is one
	@$(BIN)/python tests/support/browser.py || \
	  { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core; } || \
	  $(BIN)/playwright install chromium-headless-shell || \
	  echo "No Chromium could be installed: tests of pages are skipped, or fail where CI is set. Put chromium on the PATH."

# transformers 4.57, 5.17 and 5.23 each need an environment of their own (about 2 minutes to set up).
PARITY := .venvs/4.57.6 .venvs/5.17.0 .venvs/5.23.0
parity: $(PARITY:%=%/.ready) $(READY)  ## Compare live with transformers 4.57.6, 5.17.0, 5.23.0 and 5.24.0
	for env in $(PARITY) $(VENV); do \
	  PARITY_BATCHES=300 PYTHONPATH=src:tests $$env/bin/python -m pytest -q -p no:cacheprovider tests/parity/test_live.py && \
	  PYTHONPATH=src:tests $$env/bin/python tests/parity/make_goldens.py --check || exit 1; \
	done

# One environment for all, in which transformers is exchanged: torch's wheel is 2 GB. Not in CI.
RELEASES := 5.9.0 5.10.4 5.11.0 5.12.1 5.13.1 5.14.1 5.15.1 5.16.1 5.17.0 5.18.0 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0 5.24.0
releases: .venvs/releases/.ready  ## Attach every family under each minor release of transformers from 5.9 on (about 45 minutes; RELEASES="5.9.0 ..." for some)
	PYTHONPATH=src:tests .venvs/releases/bin/python tests/parity/reach.py .venvs/releases docs/benchmarks/releases.json $(RELEASES)

.venvs/releases/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^(transformers|tokenizers|huggingface.hub)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet -c $(@D)/constraints.txt torch
	$(@D)/bin/pip install --quiet -c $(@D)/constraints.txt numpy pytest pytest-timeout \
	  jinja2 omegaconf pydantic pyyaml rich typer typing-extensions
	touch $@

.venvs/%/.ready: constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|tokenizers|huggingface.hub)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet -c $(@D)/constraints.txt torch numpy pytest pytest-timeout hypothesis transformers==$*
	touch $@

# Kept apart because TRL has requirements that nothing else here has.
integration: .venvs/integration/.ready  ## Train with Trainer, TRL, accelerate, Lightning, torchdata and DDP (about 3 minutes)
	PYTHONPATH=tests .venvs/integration/bin/python -m pytest -q -p no:cacheprovider tests/integration

.venvs/integration/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt torch
	$(@D)/bin/pip install --quiet -c constraints.txt -e '.[integration]'
	touch $@

# Not in CI: 12 GB of packages, and releases of others, each with its own transformers; the functions of ms-swift, verl and
# VeOmni are tested in one environment, with 5.9.0, and torchtitan's collator in lmms-engine's. verl's trainer replaces
# methods of transformers, and has a process of its own. A skipped test fails the target.
PEERS := .venvs/lmms-engine .venvs/peers .venvs/nemo .venvs/axolotl .venvs/ms-swift .venvs/llama-factory
peers: $(PEERS:%=%/.ready)  ## Run the tests of lmms-engine, torchtitan, ms-swift, verl, VeOmni, NeMo Automodel, axolotl and LLaMA-Factory, in environments of their own
	PYTHONPATH=src:tests .venvs/lmms-engine/bin/python -m pytest -q -p no:cacheprovider --no-skips \
	  tests/integration/test_lmms_engine.py tests/integration/test_docs.py -k lmms
	PYTHONPATH=src:tests .venvs/lmms-engine/bin/python -m pytest -q -p no:cacheprovider --no-skips tests/integration/test_torchtitan.py
	PYTHONPATH=src:tests .venvs/peers/bin/python -m pytest -q -p no:cacheprovider --no-skips \
	  tests/integration/test_adapters.py
	PYTHONPATH=src:tests .venvs/peers/bin/python -m pytest -q -p no:cacheprovider --no-skips tests/integration/test_verl.py
	PYTHONPATH=src:tests .venvs/nemo/bin/python -m pytest -q -p no:cacheprovider --no-skips tests/integration/test_nemo.py
	PYTHONPATH=src:tests .venvs/axolotl/bin/python -m pytest -q -p no:cacheprovider --no-skips tests/integration/test_axolotl.py
	PYTHONPATH=src:tests .venvs/ms-swift/bin/python -m pytest -q -p no:cacheprovider --no-skips tests/integration/test_ms_swift.py
	DISABLE_VERSION_CHECK=1 PYTHONPATH=src:tests .venvs/llama-factory/bin/python -m pytest -q -p no:cacheprovider --no-skips tests/integration/test_llama_factory.py

# Pins of constraints.txt that a peer's requirements contradict. The peers themselves go without their
# dependencies, which name CUDA builds and releases older than these; what their tests import is listed.
PINS_LEFT_OUT := transformers|tokenizers|huggingface.hub|packaging|rich|typer

.venvs/lmms-engine/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^($(PINS_LEFT_OUT))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-cache-dir -c $(@D)/constraints.txt torch==2.13.0 'transformers>=5.8,<5.9' \
	  accelerate av datasets decord deepspeed einops hydra-core jsonlines librosa liger-kernel loguru nvidia-ml-py \
	  omegaconf opencv-python-headless peft pytest pytest-timeout qwen-omni-utils qwen-vl-utils soundfile sybil \
	  torchdata tyro wandb
	# torchvision's release for this torch; its own requirements name the CUDA build. torchtitan's collator needs both.
	$(@D)/bin/pip install --quiet --no-cache-dir --no-deps lmms-engine==0.1.4 spmd_types==0.2.3 torchtitan==0.3.0 torchvision==0.28.0
	touch $@

.venvs/peers/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^($(PINS_LEFT_OUT))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-cache-dir -c $(@D)/constraints.txt torch==2.13.0 transformers==5.9.0 \
	  accelerate codetiming datasets einops hydra-core json_repair modelscope pandas peft pillow pytest \
	  pytest-timeout cachetools fastapi ray scikit-image scikit-learn sybil tensordict==0.10.0 torchdata uvicorn
	$(@D)/bin/pip install --quiet --no-cache-dir --no-deps ms-swift==4.6.0 verl==0.9.1 veomni==0.1.12
	touch $@

.venvs/nemo/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^($(PINS_LEFT_OUT))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-cache-dir -c $(@D)/constraints.txt torch==2.13.0 transformers==5.18.0 \
	  datasets omegaconf pillow pytest pytest-timeout pyyaml scikit-image scikit-learn sybil torchdata
	$(@D)/bin/pip install --quiet --no-cache-dir --no-deps nemo-automodel==0.7.0 flashoptim==0.1.4 torchao==0.18.0
	touch $@

.venvs/axolotl/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^($(PINS_LEFT_OUT))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-cache-dir -c $(@D)/constraints.txt torch==2.13.0 transformers==5.16.1 \
	  accelerate addict backoff colorama datasets distro evaluate fastcore fire kernels numba omegaconf optimum==1.16.2 peft \
	  pillow platformdirs 'posthog<7' pydantic pyyaml rich pytest pytest-timeout python-dotenv scikit-image scikit-learn scipy \
	  schedulefree sentry-sdk 'setuptools<81' torchdata triton==3.6.0
	$(@D)/bin/pip install --quiet --no-cache-dir --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 \
	  axolotl-contribs-mit==0.0.6 bitsandbytes==0.50.2 protobuf==6.33.6 torchvision==0.28.0 \
	  trl==1.9.0 wandb==0.21.4
	touch $@

.venvs/ms-swift/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^($(PINS_LEFT_OUT))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-cache-dir -c $(@D)/constraints.txt torch==2.13.0 transformers==5.19.0 \
	  accelerate addict aiohttp attrdict binpacking cryptography dacite datasets einops fastapi httpx json_repair modelscope \
	  nltk omegaconf openai oss2 peft pillow pydantic pyyaml pytest pytest-timeout rich rouge scikit-image \
	  scikit-learn scipy simplejson tiktoken torchdata uvicorn zstandard
	$(@D)/bin/pip install --quiet --no-cache-dir --no-deps ms-swift==4.6.0 qwen-vl-utils==0.0.14 torchvision==0.28.0 \
	  trl==0.29.1
	touch $@

.venvs/llama-factory/.ready: constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	grep -vE '^($(PINS_LEFT_OUT))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --no-cache-dir -c $(@D)/constraints.txt torch==2.13.0 transformers==5.9.0 \
	  datasets docstring-parser einops fastapi fire httpx matplotlib modelscope omegaconf pillow psutil pydantic \
	  pyyaml pytest pytest-timeout scikit-image scikit-learn shtab sse-starlette tiktoken torchdata tyro uvicorn
	$(@D)/bin/pip install --quiet --no-cache-dir --no-deps llamafactory==0.9.5 accelerate==1.11.0 av==16.0.0 \
	  peft==0.18.1 torchvision==0.28.0 trl==0.24.0
	touch $@

# Starts Ray with two workers on this machine.
ray: .venvs/ray/.ready  ## Run Precheck and the collator on Ray Data, and measure rows per second (about 3 minutes)
	PYTHONPATH=src:tests .venvs/ray/bin/python -m pytest -q -p no:cacheprovider --show-capture=no tests/raydata
	PYTHONPATH=src:tests .venvs/ray/bin/python tests/raydata/rates.py --json docs/benchmarks/ray.json

.venvs/ray/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -c constraints.txt torch
	$(@D)/bin/pip install --quiet -c constraints.txt -e '.[cli,ray]' pytest pytest-timeout sybil
	touch $@

soak: $(READY)  ## Take 20,000 batches twice, and watch memory; kill workers, lose ranks, count samples (about 13 minutes)
	PYTHONPATH=src:tests $(BIN)/python tests/soak/soak.py --json docs/benchmarks/soak.json
	PYTHONPATH=src:tests $(BIN)/python tests/soak/elastic.py --json docs/benchmarks/soak-elastic.json

slow: $(READY)  ## Train on 2,000 JPEGs of 1 to 12 megapixels; check the first step, memory and disk (about 10 minutes)
	PYTHONPATH=src:tests $(BIN)/python tests/measure/train_photographs.py

fuzz: $(READY)  ## Damage 20,000 samples; each must give the exact result or an MRopeError (about 3 minutes)
	PYTHONPATH=src:tests $(BIN)/python -X faulthandler -m fuzz.run

# No set-up: uses the machine's Python and CUDA build of torch, with transformers 5.23 or later and the cli extra.
cuda:  ## On a machine with a GPU, check the guard, packing under three attentions, every family, and ranks if there are several
	mkdir -p outputs
	PYTHONPATH=src:tests $(PYTHON) tests/cuda/check_guard.py outputs/guard.json
	PYTHONPATH=src:tests $(PYTHON) tests/cuda/check_packing.py outputs/packing.json
	PYTHONPATH=src:tests $(PYTHON) tests/cuda/check_families.py outputs/families.json
	PYTHONPATH=src:tests $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node gpu tests/cuda/check_ranks.py outputs/ranks.json

bench: $(READY)  ## Measure positions, and the stage as a worker runs it (about a minute)
	$(BIN)/mrope bench positions
	$(BIN)/mrope bench stage configs/bench/2b-mixed8.yaml configs/bench/2b-crops64.yaml

# uv picks the oldest release of each direct dependency that pyproject.toml allows. Wheels of torch 2.4
# include the CUDA libraries: about 3 GB to download. Old packages call functions that their newer
# dependencies have deprecated, so that DeprecationWarning is not an error here.
lowest: .venvs/lowest/.ready  ## Run tests with the oldest supported dependencies (LOWEST_PYTHON=python3.10)
	PYTHONPATH=src:tests .venvs/lowest/bin/python -m pytest -q -p no:cacheprovider \
	  -W ignore::DeprecationWarning $(LOWEST_TESTS)

.venvs/lowest/.ready: pyproject.toml
	$(LOWEST_PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet uv
	VIRTUAL_ENV=$(@D) $(@D)/bin/uv pip install --quiet --resolution lowest-direct -e '.[train,plot]' \
	  'pytest>=8.2' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
	touch $@

# What a user gets who installs without constraints, except for torch. Made anew each time, since the
# index changes. Not in CI, where a release of another project would turn it red.
newest:  ## Run all tests with the newest Python and dependencies, torch aside (NEWEST_PYTHON=python3.13)
	$(NEWEST_PYTHON) -m venv --clear .venvs/newest
	.venvs/newest/bin/pip install --quiet torch==2.13.0
	.venvs/newest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]' torch==2.13.0
	.venvs/newest/bin/mrope doctor
	.venvs/newest/bin/pytest -q -n 2 --dist worksteal -p no:cacheprovider -W default

# Apart from `newest`: torch's wheel comes with CUDA, 6.6 GB. A machine's constraint on torch is set aside.
newest-torch:  ## The same with the newest release of torch too; types as well (6.6 GB to download)
	$(NEWEST_PYTHON) -m venv --clear .venvs/newest-torch
	PIP_CONSTRAINT=/dev/null .venvs/newest-torch/bin/pip install --quiet --no-cache-dir \
	  --upgrade --upgrade-strategy eager torch -e '.[dev]'
	.venvs/newest-torch/bin/mrope doctor
	# numpy's newest stubs are written for the Pythons that it supports, not for the oldest of ours.
	.venvs/newest-torch/bin/mypy src --python-version $$(.venvs/newest-torch/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	.venvs/newest-torch/bin/pytest -q -n 2 --dist worksteal -p no:cacheprovider -W default

clean:  ## Remove everything that the targets made
	rm -rf $(VENV) .venvs site outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
