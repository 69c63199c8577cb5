"""What the kernel tests share: the cases, the backends, and the rule for errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from speft_kernels import SparsePattern
from speft_kernels.ops import registry
from speft_kernels.testing import realistic_pattern, uniform_pattern

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# (M, N, K): one token, no token, sizes below and beside every vector width, several token blocks.
# The last has tokens enough for every thread to sum splits of its own.
SHAPES = ((0, 8, 6), (1, 5, 7), (3, 33, 17), (50, 64, 48), (613, 96, 130), (2100, 40, 24))

KINDS = ("uniform", "realistic", "empty", "full", "row", "column", "single")


def make_pattern(kind: str, n: int, k: int) -> SparsePattern:
    mask = torch.zeros(n, k, dtype=torch.bool)
    if kind == "uniform":
        return uniform_pattern((n, k), 0.1)
    if kind == "realistic":
        return realistic_pattern((n, k), 0.05)
    if kind == "full":
        mask[:] = True
    elif kind == "row":
        mask[n // 2] = True
    elif kind == "column":
        mask[:, k // 2] = True
    elif kind == "single":
        mask[n - 1, k - 1] = True
    return SparsePattern.from_mask(mask)


def uniform_blocks(
    shape: tuple[int, int], blocks: tuple[int, int], density: float
) -> SparsePattern:
    grid = (shape[0] // blocks[0]) * (shape[1] // blocks[1])
    return SparsePattern.from_blocks(shape, blocks, torch.randperm(grid)[: round(density * grid)])


def backends(op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that serve `op` for `dtype` on this machine's CPU."""
    name = str(dtype).removeprefix("torch.")
    return [
        row["backend"]
        for row in registry.table()
        if row["op"] == op
        and row["available"]
        and row["device"] in ("any", "cpu")
        and name in row["dtypes"]
    ]


def backends_and_dtypes(op: str) -> list[tuple[str, torch.dtype]]:
    """Each backend with each dtype that it serves."""
    return [(backend, dtype) for dtype in DTYPES for backend in backends(op, dtype)]


def implementation(op: str, backend: str, dtype: torch.dtype = torch.float32):
    return registry.resolve(op, torch.device("cpu"), dtype, backend).function


# How a user lets torch's products use tf32; the last two since torch 2.9.
TF32_SETTINGS = (
    "set_float32_matmul_precision",
    *(("matmul", "backends") if hasattr(torch.backends.cuda.matmul, "fp32_precision") else ()),
)


@contextlib.contextmanager
def tf32(setting: str, allowed: bool = True) -> Iterator[None]:
    """Allow tf32, or refuse it, through one of TF32_SETTINGS; in the end as torch starts."""
    try:
        if setting == "matmul":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
        elif setting == "backends":
            torch.backends.fp32_precision = "tf32" if allowed else "ieee"
        else:
            torch.set_float32_matmul_precision("high" if allowed else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        if len(TF32_SETTINGS) > 1:
            torch.backends.fp32_precision = "none"
            torch.backends.cuda.matmul.fp32_precision = "none"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_product(a: Tensor, b: Tensor) -> np.ndarray:
    """`a @ b` at a precision beyond the inputs': float64, or 80-bit for float64 inputs."""
    wide = np.longdouble if a.dtype == torch.float64 else np.float64
    return a.detach().double().numpy().astype(wide) @ b.detach().double().numpy().astype(wide)


def assert_as_exact_as_torch(
    ours: Tensor, theirs: Tensor, exact: np.ndarray, entries: Tensor | None = None
) -> None:
    """The numbers contract: at most twice torch's own error in the same dtype, plus one rounding.

    `exact` comes from `exact_product` on the same (already rounded) inputs. With `entries`, `ours`
    holds those flat entries of `exact` alone; torch's error is that of the whole product, since the
    error of a few sums may be small by chance. One rounding of the largest result is what any
    implementation may lose by writing its output.
    """
    wanted = exact if entries is None else exact.reshape(-1)[entries.long().numpy()]
    wanted = wanted.reshape(ours.shape)
    if wanted.size == 0:
        return

    def error(result: Tensor, exact: np.ndarray) -> float:
        return float(np.abs(result.detach().double().numpy().astype(exact.dtype) - exact).max())

    rounding = torch.finfo(ours.dtype).eps * float(np.abs(exact).max())
    found, allowed = error(ours, wanted), 2 * error(theirs, exact) + rounding
    assert found <= allowed, (found, allowed)


def torchs_worse(dy: Tensor, x: Tensor, exact: np.ndarray) -> Tensor:
    """`dy^T @ x` as torch computes it, in the accumulator's dtype: by its product, or token after
    token, whichever is further off. How the vendor's product splits a sum, and with that its error,
    depends on the processor; one token after the other is the plain order everywhere.
    """
    wide = accumulator(dy.dtype)
    dy, x = dy.to(wide), x.to(wide)
    in_turn = torch.zeros(dy.shape[1], x.shape[1], dtype=wide)
    for left, right in zip(dy, x, strict=True):
        in_turn.addr_(left, right)
    both = (dy.t() @ x, in_turn)
    if not exact.size:
        return both[0]
    return max(both, key=lambda r: np.abs(r.double().numpy().astype(exact.dtype) - exact).max())


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of the largest new tensor that a torch operation returns in the block.

    It does not see into a registered operation: call the backend's function itself, as
    `implementation` returns it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        known = {t.untyped_storage().data_ptr() for t in leaves((args, kwargs)) if _is_tensor(t)}
        for leaf in leaves(result):
            if _is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, leaf.numel())
        return result


def peak_of_tensors(run: Callable[[], object]) -> int:
    """By how many bytes the tensors alive at a time grow while `run` is called.

    Exact, where the process's own peak depends on what the allocator kept of earlier tests; but
    compiled kernels' scratch is not counted.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        run()
    # `profiled.events()` lists those allocations alone that no operation made.
    events = profiled.profiler.kineto_results.events()
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert peak > 0
    return peak


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
