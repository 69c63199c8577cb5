"""Whether the sides of a case compute what they should, before any of them is timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .harness import Side, WrongResultError


def rounding_bound(terms: int, magnitude: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """How far a sum of `terms` products may be from the exact one, whatever the order of summation.

    With the unit roundoff u, each product and each partial sum is off by a factor of at most 1 + u,
    which makes `gamma = n u / (1 - n u)` times the sum of the products' absolute values for n =
    `terms` roundings (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); one more for
    what is added to the sum.

    Args:
        magnitude: the sums of the absolute values of the products.
    """
    n = (terms + 1) * torch.finfo(dtype).eps / 2
    return magnitude * (n / (1 - n))


def flat(output: object) -> Tensor:
    """A side's tensor or tensors as one float64 vector."""
    tensors: Sequence[Tensor] = [output] if isinstance(output, Tensor) else output  # type: ignore[assignment]
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def agree(sides: Iterable[Side], exact: Tensor, bound: Tensor | float) -> None:
    """Call each side once and compare it with the float64 vector `exact`, entry by entry.

    Raises:
        WrongResultError: an entry is off by more than `bound`, or the number of entries differs.
    """
    for side in sides:
        close(side.name, flat(side.run()), exact, bound)


def close(name: str, found: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Compare two vectors; see `agree`."""
    if found.shape != exact.shape:
        raise WrongResultError(f"{name}: {found.numel()} entries, expected {exact.numel()}")
    error = (found - exact).abs()
    wrong = ~(error <= bound)  # so that NaN is wrong
    if bool(wrong.any()):
        worst = int(torch.where(wrong, error.nan_to_num(torch.inf), -1.0).argmax())
        allowed = bound if isinstance(bound, float) else float(bound[worst])
        raise WrongResultError(
            f"{name}: wrong in {int(wrong.sum())} of {exact.numel()} entries; entry {worst} is "
            f"{float(found[worst]):.6g}, exact {float(exact[worst]):.6g} up to {allowed:.2g}"
        )
