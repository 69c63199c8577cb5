"""What the tests on a GPU share: the device, the backends, the rule for errors, and the ways in
which CUDA is asked. In a dry run on the CPU the latter only call what they are given.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kernels import KINDS as ALL_KINDS
from kernels import SHAPES as ALL_SHAPES
from torch import Tensor

from speft_kernels.bench.gpu.bounds import summation_bound
from speft_kernels.ops import registry

DRY = os.environ.get("SPEFT_GPU_DRY_RUN") == "1" and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if DRY else "cuda:0")

# In a dry run the CUDA kernels' sources on the CPU take the place of the backend "cuda".
STAND_IN = "cuda-host" if DRY else None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERY_DTYPE = (*DTYPES, torch.float64)  # of what only moves numbers, or rounds one sum of two
# In a dry run a few programs take the interpreter as long as all of this takes a GPU.
SHAPES = ((0, 8, 6), (3, 33, 17)) if DRY else ALL_SHAPES
KINDS = ("uniform", "empty", "row") if DRY else ALL_KINDS
WARM_UP = 0 if DRY else 3  # calls before one is captured
LLAMA = (20, 40, 56) if DRY else (2048, 1024, 4096)  # M, N, K: a key projection of Llama-3-8B


def backends(*ops: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that serve all of `ops` for tensors of `dtype` on a GPU: whatever is declared is
    tested.
    """
    name = str(dtype).removeprefix("torch.")
    serving = [
        {
            row["backend"]
            for row in registry.table()
            if row["op"] == op
            and row["available"]
            and (row["device"] in ("any", "cuda") or row["backend"] == STAND_IN)
            and name in row["dtypes"]
        }
        for op in ops
    ]
    return sorted(set.intersection(*serving))


def fast_backends(*ops: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Those of which speed is asked as well: all but the reference."""
    return [name for name in backends(*ops, dtype=dtype) if name != "reference"]


def fast_backends_and_dtypes(
    *ops: str, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
) -> list[tuple[str, torch.dtype]]:
    """Each with the dtypes that it takes: CUDA's takes 16 bits alone."""
    return [(backend, dtype) for dtype in dtypes for backend in fast_backends(*ops, dtype=dtype)]


def backends_and_dtypes(
    *ops: str, dtypes: Sequence[torch.dtype] = DTYPES
) -> list[tuple[str, torch.dtype]]:
    return [(backend, dtype) for dtype in dtypes for backend in backends(*ops, dtype=dtype)]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32, as torch computes it: 16-bit operands by tensor cores where torch has
    such a product for them.
    """
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and 0 not in (*a.shape, *b.shape):
        try:
            return torch.mm(a, b, out_dtype=torch.float32)
        except (RuntimeError, TypeError):  # not for every shape in every release
            pass
    return a.float() @ b.float()


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def assert_as_exact_as_torch(
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    *,
    terms: int,
    operands: torch.dtype,
    entries: Tensor | None = None,
) -> float:
    """The numbers contract: at most twice torch's own error in the same dtype, plus one rounding of
    the largest result. Return the error over that.

    On a GPU neither side's order of summation is ours to choose: cuBLAS cuts a long sum into parts
    where it sees fit, and is more exact for that. So the rule has the error on top that the worst
    order has, `summation_bound`; what is returned shows whether it was needed.

    Args:
        exact: float64, of the same (already rounded) inputs.
        terms: how many products each result sums.
        operands: the dtype of what is multiplied.
        entries: the flat entries of `exact` that `ours` holds. Torch's error is that of the whole
            product, since the error of a few sums may be small by chance.
    """
    wanted = exact if entries is None else exact.reshape(-1)[entries.long()]
    if wanted.numel() == 0:
        return 0.0
    found = largest(ours.double() - wanted.reshape(ours.shape))
    size = largest(exact)
    rule = 2 * largest(theirs.double() - exact) + torch.finfo(ours.dtype).eps * size
    order = summation_bound(terms, size, operands)
    assert found <= rule + order, (found, rule, order)
    return found / rule if rule else 0.0


def assert_one_product(found: Tensor, wanted: Tensor, *, terms: int, operands: torch.dtype) -> None:
    """Of one that a graph computes and one that it does not: while a graph is captured cuBLAS may
    take another way to the same product.
    """
    bound = 2 * summation_bound(terms, largest(wanted), operands)
    bound += torch.finfo(wanted.dtype).eps * largest(wanted)
    assert largest(found - wanted) <= bound


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """In the block, whatever makes the host wait for the device raises."""
    if DRY:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(
    run: Callable[[], Any], before: Callable[[], None] = lambda: None
) -> tuple[Any, Callable[[], None]]:
    """Capture a call in a CUDA graph, after three calls that warm up: what it returned, and what
    replays it into the same memory. `before` is called before each, and is not captured.
    """
    if DRY:
        before()
        outputs = run()

        def again() -> None:
            for target, source in zip(_leaves(outputs), _leaves(run()), strict=True):
                target.copy_(source)

        return outputs, again
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):  # compiles, plans, allocates
            before()
            run()
    torch.cuda.current_stream().wait_stream(aside)
    before()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


def _leaves(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def requested_bytes(which: str = "current") -> int:
    """Bytes that tensors ask for: now, or at their "peak". What they are given depends on which
    blocks the allocator happens to have: it hands one out whole that is up to 1 MB too large.
    """
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def peak_growth(run: Callable[[], Any]) -> int:
    """By how many bytes tensors rise above what is there; 0 in a dry run."""
    run()  # whatever is built once
    if DRY:
        return 0
    torch.cuda.synchronize()
    before = requested_bytes()
    torch.cuda.reset_peak_memory_stats()
    run()
    return requested_bytes("peak") - before


def spin() -> None:
    """Keep the current stream busy for some tens of milliseconds."""
    if not DRY:
        torch.cuda._sleep(50_000_000)
