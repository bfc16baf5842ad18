# `make setup TORCH="torch==2.13.0 --index-url URL"` takes another build of torch, and CONSTRAINTS=/dev/null
# any version of everything. Where torch is installed already, see README: no make.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
JOBS ?= 2

bin := $(abspath $(VENV))/bin
pip := $(bin)/python -m pip install --quiet -c $(CONSTRAINTS)
installed := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check parity growth faults fuzz bench kernels peers gpu clean

help: ## what can be made
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|'

setup: $(installed) ## create .venv with everything that CI tests with

# torch comes alone and before all that needs it: its build is chosen here, the rest finds it in place.
$(installed): pyproject.toml setup.py $(filter-out /dev/null,$(CONSTRAINTS))
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) 'setuptools>=77'
	$(pip) --no-deps $(TORCH)
	$(pip) --no-build-isolation --editable '.[dev]'
	touch $@

quickstart: setup ## the main job on the built-in corpus; results in runs/quickstart
	PATH="$(bin):$$PATH" launch/quickstart.sh

# The files start in the order of tests/conftest.py, and no process compiles the sources anew (images set the variable).
test: export PYTHONDONTWRITEBYTECODE =
test: setup ## all tests, JOBS (2) files at a time
	$(bin)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

check: setup ## style, types, the order of imports, and no load that could run code
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/python -m pytest --quiet tests/test_layers.py tests/test_safe_loading.py

parity: setup ## every layout against one process; a table, also in benchmarks/results (a quarter of an hour)
	$(bin)/python -m tests.parallel.parity_table

growth: setup ## every growth method on every layout against growing offline, and LiGO learning on each (half an hour)
	$(bin)/python -m tests.growth.layout_sweep
	$(bin)/python -m pytest --timeout 3600 -o python_files='slow_*.py' tests/growth

faults: setup ## kill saves at every call and runs at random moments, stop nodes and launchers (half an hour)
	$(bin)/python -m pytest --timeout 3600 -s tests/faults/kill_save.py tests/faults/liveness.py tests/faults/kill_quickstart.py

fuzz: setup ## 500 malformed files per field to every reader; a table (an hour)
	$(bin)/python -m tests.fuzz.campaign
	$(bin)/python -O -m tests.fuzz.campaign --per-field 20

bench: setup .peers/.installed ## the benchmarks; results in benchmarks/results
	set -e; for file in $(filter-out benchmarks/results_file.py benchmarks/processes.py benchmarks/kernel_%.py benchmarks/salt_%.py,$(wildcard benchmarks/*.py)); do PYTHONPATH=$(abspath .peers) $(bin)/python $$file; done

kernels: setup ## the tests of the kernels, interpreted on the CPU and compiled without a GPU
	$(bin)/python -m pytest -o python_files='test_*.py slow_*.py' tests/kernels

peers: setup .peers/.installed ## kernels, data and exchange against liger-kernel, megatron-core, transformers … (minutes)
	PYTHONPATH=$(abspath .peers) $(bin)/python -m pytest -o python_files='against_*.py' tests/peers

# Apart from all else: their dependencies are not ours.
.peers/.installed: tests/peers/requirements.txt | $(installed)
	rm -rf .peers
	$(pip) --no-deps --target .peers --requirement $<
	touch $@

# With the python that is there, from the source tree: torch has to be one that sees the GPU, and the README's packages
# beside it or in PYTHONPATH. GPU_OUTPUT is a folder for copies of the results.
gpu: ## kernels and training steps on one GPU (nine minutes); results in benchmarks/results
	PYTHONPATH=.:kernels:$$PYTHONPATH $(PYTHON) benchmarks/gpu_kernels.py --seconds 200 $(GPU_OUTPUT:%=--output %)
	PYTHONPATH=.:kernels:$$PYTHONPATH $(PYTHON) benchmarks/gpu_train.py $(GPU_OUTPUT:%=--output %)

clean: ## remove what was built and cached, not .venv and runs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find megagrow kernels tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
