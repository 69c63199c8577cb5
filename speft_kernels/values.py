"""`Values`: what a sparse layer trains, as a parameter that tells who took its memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_DATA: Any = torch.Tensor.data  # torch's own descriptor


class Values(nn.Parameter):
    """A parameter that counts how often its `.data` was taken.

    Through `.data` it is written past its version, and libraries that average weights do so: they
    swap the average in, and the trained values back. A layer whose weight holds its values writes
    it again after either.
    """

    taken = 0

    @property
    def data(self) -> Tensor:
        self.taken += 1
        found: Tensor = _DATA.__get__(self)
        return found

    @data.setter
    def data(self, other: Tensor) -> None:
        _DATA.__set__(self, other)


def watch(parameter: Tensor) -> None:
    """Make a parameter `Values`, in place.

    Not where no weight holds it: some of torch's tracers take parameters of no other class.
    """
    if type(parameter) is nn.Parameter:
        parameter.__class__ = Values


def times_taken(tensor: Tensor) -> int:
    """How often the `.data` of a tensor was taken, where that is counted."""
    taken: int = getattr(tensor, "taken", 0)
    return taken
