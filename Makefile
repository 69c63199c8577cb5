# The commands a person needs. Each brings .venv and the compiled kernels up to date first.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
CSRC = $(shell find csrc tests/ptx -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# oneDNN picks AMX kernels where the CPU reports AMX, and some hypervisors report it but trap the instructions.
test bench: export ONEDNN_MAX_CPU_ISA ?= AVX512_CORE_BF16
# The CUDA kernels run in the tests on a CPU; for GPUs they compile where one is, or on request.
test: export SPEFT_BUILD_CUDA_HOST ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup build demo test gpu-offline lint format bench clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP)  ## make .venv with everything: the package, its extras, the tools

# torch comes first: what is installed after it finds it there and cannot bring in another build.
# The kernels compile without build isolation, so that `make build` can reuse their objects.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10; name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0 setuptools pybind11 ninja
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

build: $(STAMP)  ## compile what changed in csrc
	@$(BIN)/python setup.py --quiet build_ext --inplace

demo: build  ## fine-tune a real model sparsely on this computer
	$(BIN)/speft finetune

# A file's tests share what is slow to make, so a file stays in one process. A thread each: teams of
# two processes that wait for each other on the same cores are slower than one.
test: export OMP_NUM_THREADS ?= 1
test: build  ## run the test suite, two processes at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

gpu-offline: $(STAMP)  ## compile the GPU kernels for GPUs that are not here, and judge the machine code
	$(BIN)/python scripts/gpu_offline.py $(ARGS)
	$(BIN)/python scripts/cuda_offline.py

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(STAMP)  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

bench: build  ## run the benchmarks and record them; ARGS="-k step" for a part
	$(BIN)/python -m pytest benchmarks --record $(ARGS)

clean:  ## remove builds and caches, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find speft_kernels -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
