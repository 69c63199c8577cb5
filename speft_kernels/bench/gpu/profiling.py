"""Where the time of an operation goes, kernel by kernel:
`python -m speft_kernels.bench.gpu.profiling [OPERATION ...]`.

For those who tune: `sampled_grad` may be late for the copy before it, and `topk_salience` is five
launches. Times of torch's profiler, of warm calls one after the other; what is compared with peers
is measured by run.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from . import cases
from .device import Device
from .problems import LLAMA, MOST_TOKENS, TINY, Spec, Workbench
from .timing import reason

# One case of each operation: what has a goal, and few tokens besides.
SPECS = (
    Spec("sampled_grad", "q", MOST_TOKENS),
    Spec("sparse_delta_matmul", "q", MOST_TOKENS),
    Spec("sparse_delta_matmul", "q", 16),
    Spec("block_grad", "q", MOST_TOKENS, "16x16"),
    Spec("keep_columns", "q", MOST_TOKENS),
    Spec("topk_salience", "bfloat16"),
    Spec("layer", "q", MOST_TOKENS),
)
CALLS = 10
MOST_KERNELS = 10  # of a side, those that take longest


@dataclass(frozen=True)
class Kernel:
    """What a call spends in one kernel.

    Attributes:
        microseconds: of all its launches.
        launches: in a call.
    """

    name: str
    microseconds: float
    launches: float


def kernels_of(run: Callable[[], object], device: Device) -> list[Kernel]:
    """The kernels of a call, those that take longest first; on a CPU torch's operators."""
    for _ in range(3):
        run()
    device.synchronize()
    kind = ProfilerActivity.CUDA if device.is_cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        for _ in range(CALLS):
            run()
        device.synchronize()
    took = "self_device_time_total" if device.is_cuda else "self_cpu_time_total"
    found = [
        Kernel(event.key, getattr(event, took) / CALLS, event.count / CALLS)
        for event in seen.key_averages()
    ]
    return sorted((k for k in found if k.microseconds > 0), key=lambda k: -k.microseconds)


def tables(spec: Spec, bench: Workbench) -> Iterator[str]:
    """A table for each side of a case, or why there is none."""
    case = cases.setup(spec, bench)
    yield f"## {spec.operation}: {case.name}"
    for name, why in case.left_out.items():
        yield f"{name}: {why}"
    for side in case.sides:
        try:
            kernels = kernels_of(side.run, bench.device)
        except Exception as error:
            yield f"{side.name}: {reason(error)}"
            continue
        yield f"{side.name}: {sum(k.microseconds for k in kernels):.1f} us"
        for kernel in kernels[:MOST_KERNELS]:
            yield f"  {kernel.microseconds:9.1f} us {kernel.launches:5.1f} x {kernel.name[:100]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m speft_kernels.bench.gpu.profiling")
    operations = list(dict.fromkeys(spec.operation for spec in SPECS))
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=", ".join(operations))
    parser.add_argument("--device", default="cuda", help="cpu: tiny sizes, torch's operators")
    options = parser.parse_args(arguments)
    if unknown := set(options.operations) - set(operations):
        parser.error(f"there is no case of {', '.join(sorted(unknown))}")
    device = Device(options.device)
    bench = Workbench(device, LLAMA if device.is_cuda else TINY)
    for spec in SPECS:
        if not options.operations or spec.operation in options.operations:
            for line in tables(spec, bench):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
