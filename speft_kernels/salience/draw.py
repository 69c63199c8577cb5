"""Drawing: uniformly, without a score for each entry (metric "random"), or with chances in
proportion to the scores (`SpeftConfig.selection`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import SalienceError

# Up to this share the places are drawn one by one; beyond, a permutation of all is no larger.
_SPARSE = 0.25


def budget(places: int, density: float) -> int:
    """Return how many of so many places train: one at least."""
    return max(1, round(density * places))


def uniform(places: Mapping[str, int], density: float, scope: str, seed: int) -> dict[str, Tensor]:
    """Return each layer's sorted int64 indices, in host memory: a uniform sample of its places.

    Exactly `budget(places, density)` of each layer in scope "layer", of all together in
    scope "global". The same for the same seed, names and numbers of places, in whatever order.

    Args:
        places: layer name -> its number of entries, or of blocks.
    """
    names = sorted(places)
    if scope == "layer":
        return {name: _sample(places[name], density, _generator(seed, name)) for name in places}
    chosen = _sample(sum(places.values()), density, _generator(seed, ""))
    found, start = {}, 0
    for name in names:
        ends = torch.tensor([start, start + places[name]], device="cpu")
        low, high = torch.searchsorted(chosen, ends).tolist()
        found[name] = chosen[low:high] - start
        start += places[name]
    return found


# The exponential distribution falls below once in 2^32 draws; a quotient by zero is no number.
_LEAST = 2.0**-32


def sampling_keys(scores: Tensor, seed: int, name: str, columns: float = 1.0) -> Tensor:
    """Return keys whose k largest are a sample of k places without replacement, each draw with
    chances in proportion to the scores of what is left; a score of zero comes last.

    Only the columns whose scores sum highest count, `columns` of them all, one at least; the others
    are zero. A backward pass keeps as many columns of the layer's input.

    A key is the score over an exponential variable (Efraimidis and Spirakis, "Weighted random
    sampling with a reservoir", 2006). That of a layer depends on the seed, its name and its shape
    alone, so keys of several layers can be ranked together, or each by itself. It is drawn on the
    host; builds of torch with and without MKL draw other ones.

    Raises:
        SalienceError: a score is below zero; the message names the layer.
    """
    if bool((scores < 0).any()):
        raise SalienceError(
            f"layer {name!r} has scores below zero, which are no chances to draw by; take "
            "selection='top' or a score that is not signed"
        )
    if columns < 1:
        scores = scores * _highest(scores.sum(0, dtype=torch.float64), columns).to(scores)
    # In float32 whatever torch's default is: other draws would be another mask.
    waits = torch.empty(scores.shape, dtype=torch.float32, device="cpu")
    waits.exponential_(generator=_generator(seed, f"{name} drawn"))
    return scores / waits.clamp_(min=_LEAST).to(scores)


def _highest(sums: Tensor, share: float) -> Tensor:
    """Return whether each sum is in the highest share; of equal ones the first are."""
    highest = torch.zeros_like(sums, dtype=torch.bool)
    # Rounded up, so that columns for the share of all entries hold as many; 0.1 * 30 is above 3.
    count = max(1, math.ceil(share * len(sums) - 1e-6))
    highest[sums.argsort(descending=True, stable=True)[:count]] = True
    return highest


def _generator(seed: int, name: str) -> torch.Generator:
    # Of the host, whatever the model's device: the same entries on every machine.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))


def _sample(places: int, density: float, generator: torch.Generator) -> Tensor:
    count, host = budget(places, density), torch.device("cpu")
    if count > _SPARSE * places:
        return torch.randperm(places, generator=generator, device=host)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device=host)
    while len(drawn) < count:
        size = (2 * (count - len(drawn)),)
        more = torch.randint(0, places, size, generator=generator, device=host)
        drawn = torch.cat([drawn, more]).unique()
    # Any set of that size is as likely as any other, and stays so by dropping members at random.
    kept = torch.randperm(len(drawn), generator=generator, device=host)[:count]
    return drawn[kept].sort().values
