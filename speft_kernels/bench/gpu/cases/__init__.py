"""The cases: one module for each operation, of its name, `quantized` for the product with a weight
of few bits, `layer` for forward and backward of one layer and `step` for the whole training step.
Each has `setup(spec, bench)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from ....costs import CROSSOVER_TOKENS
from ..problems import MOST_TOKENS, Spec, Workbench
from ..timing import GpuCase

PROJECTIONS = ("q", "gate", "down", "k")
TOKENS = (MOST_TOKENS, 512, 16, 1)
DENSITIES = (0.005, 0.001, 0.01, 0.05)
BLOCKS = ("16x16", "32x32", "64x64")
BACKENDS = ("triton", "cuda", "torch")


def setup(spec: Spec, bench: Workbench) -> GpuCase:
    case: GpuCase = importlib.import_module(f".{spec.operation}", __name__).setup(spec, bench)
    return case


def goal_specs() -> list[Spec]:
    """The cases of single operations that have goals, and then those around them."""
    return list(dict.fromkeys([*_goals(), *_around_the_goals()]))


def kernel_specs() -> list[Spec]:
    """What varies one of tokens, density and mask around the goals."""
    known = set(goal_specs())
    return [spec for spec in dict.fromkeys(_the_rest()) if spec not in known]


def matrix_specs() -> list[Spec]:
    """What the others leave out of all tokens, densities and masks, for every projection."""
    known = {*goal_specs(), *kernel_specs()}
    return [spec for spec in dict.fromkeys(_matrix()) if spec not in known]


def step_specs() -> list[Spec]:
    """A case for each backend, the two with kernels first: torch's way is bound by the host. Then
    one that is compiled, for which the backend serves that needs no compiler of its own.
    """
    eager = [Spec("step", size, backend=b) for b in BACKENDS for size in ("8B", "1B")]
    return [*eager, Spec("step", "1B compiled", backend="torch")]


def _goals() -> Iterator[Spec]:
    """What decides on the CUDA kernels comes first: beside Triton's on uniform masks, beside one
    read, beside the vendor's product.
    """
    for density in (0.005, 0.001):
        yield Spec("sampled_grad", "q", MOST_TOKENS, "uniform", density)
    yield Spec("topk_salience", "bfloat16")
    yield Spec("sparse_delta_matmul", "q", MOST_TOKENS)
    for projection in PROJECTIONS:
        yield Spec("sampled_grad", projection, MOST_TOKENS)
        yield Spec("layer", projection, MOST_TOKENS)
        for tokens in (MOST_TOKENS, 16, 1):
            yield Spec("sparse_delta_matmul", projection, tokens)
        yield Spec("sampled_grad", projection, MOST_TOKENS, density=0.001)


def _around_the_goals() -> Iterator[Spec]:
    yield Spec("write_delta", "layers")
    yield from (Spec("quantized", form, 16) for form in ("int8", "int4"))
    for tokens in CROSSOVER_TOKENS:
        yield Spec("sparse_delta_matmul", "q", tokens)
    for projection in PROJECTIONS:
        yield Spec("keep_columns", projection, MOST_TOKENS)
        for block in BLOCKS:
            yield Spec("block_grad", projection, MOST_TOKENS, block)
    for matrices in ("launches", "layer", "float32"):
        yield Spec("topk_salience", matrices)


def _the_rest() -> Iterator[Spec]:
    """Densities first, then tokens, on uniform masks as well: two thirds of all cases."""
    for mask in ("realistic", "uniform"):
        for density in DENSITIES:
            for projection in PROJECTIONS:
                yield Spec("sampled_grad", projection, MOST_TOKENS, mask, density)
                yield Spec("layer", projection, MOST_TOKENS, mask, density)
                yield Spec("sparse_delta_matmul", projection, MOST_TOKENS, mask, density)
    for density in DENSITIES:
        for projection in PROJECTIONS:
            yield Spec("block_grad", projection, MOST_TOKENS, "16x16", density)
            yield Spec("sparse_delta_matmul", projection, 16, density=density)
    for tokens in TOKENS[1:]:
        for projection in PROJECTIONS:
            for mask in ("realistic", "uniform"):
                yield Spec("sampled_grad", projection, tokens, mask)
            yield Spec("layer", projection, tokens)
            yield Spec("block_grad", projection, tokens, "16x16")
            yield Spec("sparse_delta_matmul", projection, tokens)
            yield Spec("keep_columns", projection, tokens)
    # By far the most of a selection is reading, whatever k is.
    for density in DENSITIES:
        yield Spec("write_delta", "layers", density=density)
        yield Spec("topk_salience", "bfloat16", density=density)


def _matrix() -> Iterator[Spec]:
    for density in DENSITIES:
        for tokens in TOKENS:
            for projection in PROJECTIONS:
                for mask in ("realistic", "uniform", BLOCKS[0]):
                    # Of blocks the gradient is `block_grad`.
                    gradient = "block_grad" if mask in BLOCKS else "sampled_grad"
                    for operation in (gradient, "sparse_delta_matmul", "layer"):
                        yield Spec(operation, projection, tokens, mask, density)
