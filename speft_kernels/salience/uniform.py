"""Metric "random": entries or blocks drawn uniformly, without a score for each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# Up to this share the places are drawn one by one; beyond, a permutation of all is no larger.
_SPARSE = 0.25


def draw(places: Mapping[str, int], density: float, scope: str, seed: int) -> dict[str, Tensor]:
    """Return each layer's sorted int64 indices, in host memory: a uniform sample of its places.

    Exactly `max(1, round(density * places))` of each layer in scope "layer", of all together in
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
        low, high = torch.searchsorted(chosen, torch.tensor([start, start + places[name]])).tolist()
        found[name] = chosen[low:high] - start
        start += places[name]
    return found


def _generator(seed: int, name: str) -> torch.Generator:
    # Of the host, whatever the model's device: the same entries on every machine.
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _sample(places: int, density: float, generator: torch.Generator) -> Tensor:
    count = max(1, round(density * places))
    if count > _SPARSE * places:
        return torch.randperm(places, generator=generator)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        more = torch.randint(0, places, (2 * (count - len(drawn)),), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    # Any set of that size is as likely as any other, and stays so by dropping members at random.
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]].sort().values
