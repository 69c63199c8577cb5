"""How a resident layer sees that its values changed: `Values`, a parameter that tells of what its
version does not, and the state of values and weight.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import Sink, version_of

# What values and weight were when the weight was written. UNKNOWN is equal to none.
State = tuple[Any, ...]
UNKNOWN: State = ()

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


def state_of(values: Tensor, weight: Tensor, sink: Sink | None) -> State:
    """What values and weight are now: of each the tensor itself, its version and its address, and
    how often the `.data` of the values was taken. All of them, as a new tensor may come to lie
    where a former one was (`functional_call` with values of one's own), another `.data` is a change
    of the address alone, and a write through it one of nothing.
    """
    taken = _times_taken(values) + (0 if sink is None else _times_taken(sink.parameter))
    seen = (version_of(values, sink), values.data_ptr(), taken)
    rest = (version_of(weight), weight.data_ptr())
    return weakref.ref(values), weakref.ref(weight), *seen, *rest


def is_as_it_was(former: State | None, now: State) -> bool:
    """Whether nothing was seen to change; not of a state that is unknown, or of none."""
    if not former:
        return False
    # Not by ==, for which references ask what they refer to.
    return former[0]() is now[0]() and former[1]() is now[1]() and former[2:] == now[2:]


def _times_taken(tensor: Tensor) -> int:
    taken: int = getattr(tensor, "taken", 0)  # of others than `Values` it is not counted
    return taken
