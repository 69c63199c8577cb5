#!/usr/bin/env bash
# Judge the kernels on this machine's GPU: build, test, measure, and leave one record.
#
#   scripts/gpu_check.sh [--list] [--dry-run] [--force] [--within SECONDS] [OUT] [STAGE ...]
#
# Needs no network: a Python with torch, Triton, transformers, peft, pytest, pybind11 and ninja, by default `python3`,
# else the one that PYTHON names. Without a GPU it says so and exits with 2. See benchmarks/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m speft_kernels.bench.gpu.check "$@"
