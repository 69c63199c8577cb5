"""The GPU kernels under compute-sanitizer: `python -m speft_kernels.bench.gpu.sanitize`.

Each tool watches each operation on small tensors (small.py), in a process of its own. First
memcheck has to find a write beyond a weight that small.py plants: a tool that watches none of our
kernels would pass them all. One that is not there, or that refuses this machine, is put down as
unavailable: that is no fault of ours. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from .journal import NAME, ROOT, Journal, fingerprint, stage_parser

TOOLS = ("memcheck", "racecheck", "synccheck")
OPERATIONS = (
    *("sparse_delta_matmul", "sampled_grad", "keep_columns"),
    *("block_grad", "topk_salience", "write_delta"),
)
PLANTED = "planted"  # the operation that small.py spoils on purpose
BACKENDS = ("cuda", "triton")
# What finds most comes first. Where threads meet in Triton's kernels is up to its compiler, so
# synccheck watches CUDA's alone.
CASES = (
    *(("memcheck", backend, PLANTED) for backend in BACKENDS),
    *(
        (tool, backend, name)
        for tool in TOOLS
        for backend in BACKENDS
        for name in OPERATIONS
        if (tool, backend) != ("synccheck", "triton")
    ),
)
OUT_OF_TIME = 3
_FOUND = 86  # what the tool is told to end with where it finds something
_REFUSED = ("Device not supported", "Failed to initialize")


def main(arguments: Sequence[str] | None = None) -> int:
    options = stage_parser("sanitize").parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    journal = Journal(options.out / NAME, "sanitize", fingerprint("sanitize"), options.key)
    known = {(e["tool"], e["operation"]) for e in journal.entries("sanitizer")}
    failed = any(e["outcome"] == "failed" for e in journal.entries("sanitizer"))
    for tool, backend, operation in CASES:
        name = operation if backend == "cuda" else f"{operation}, {backend}"
        if (tool, name) in known or (operation == PLANTED and options.device == "cpu"):
            continue
        left = deadline - time.monotonic()
        if left < 10:
            return OUT_OF_TIME
        outcome, message = watch(tool, backend, operation, options.device, left)
        if outcome == "out of time":
            return OUT_OF_TIME
        journal.add("sanitizer", tool=tool, operation=name, outcome=outcome, message=message)
        print(f"{tool:10} {name:28} {outcome} {message.splitlines()[-1:]}", flush=True)
        failed |= outcome == "failed"
    return 1 if failed else 0


def command(tool: str, backend: str, operation: str, device: str) -> list[str] | None:
    """What runs an operation under a tool; on a CPU without one; None where there is no tool."""
    small = [sys.executable, "-m", "speft_kernels.bench.gpu.small", operation]
    if device == "cpu":
        here = "cuda-host" if backend == "cuda" else backend
        return [*small, "--device", "cpu", "--backend", here]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return None
    # Of the kernels in the process only ours, and no refused call: torch's are not ours to judge.
    # A kernel that any of several filters takes is watched.
    filters = ["kns=speft"] if backend == "cuda" else [f"kne={name}" for name in _of_triton()]
    ours = [word for one in filters for word in ("--kernel-name", one)]
    told = ["--error-exitcode", str(_FOUND), *ours, "--report-api-errors", "no"]
    return [sanitizer, "--tool", tool, *told, *small, "--backend", backend]


def _of_triton() -> list[str]:
    """The names of Triton's functions: a kernel has that of the function it is made of."""
    sources = sorted((ROOT / "triton_kernels").glob("*.py"))
    found = (re.findall(r"^@triton\.jit\ndef (\w+)", path.read_text(), re.M) for path in sources)
    return sorted({name for names in found for name in names})


def watch(tool: str, backend: str, operation: str, device: str, seconds: float) -> tuple[str, str]:
    """Return "passed", "failed", "unavailable" or "out of time", and the end of the output."""
    found = command(tool, backend, operation, device)
    if found is None:
        return "unavailable", "compute-sanitizer is not on PATH"
    # An allocation of its own size for each tensor: in torch's pool, what lies behind one is valid.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            found,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return "out of time", ""
    tail = done.stdout.strip()[-800:]
    if operation == PLANTED and done.returncode in (0, _FOUND):
        seen = done.returncode == _FOUND
        return ("passed", "") if seen else ("failed", f"{tool} did not see what was planted")
    if done.returncode == 0:
        return "passed", ""
    if done.returncode != _FOUND and any(words in done.stdout for words in _REFUSED):
        return "unavailable", tail
    return "failed", tail


if __name__ == "__main__":
    sys.exit(main())
