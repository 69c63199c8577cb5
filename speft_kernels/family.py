"""The sparse layers of one model, whose weights are written together: a call for each layer would
cost a launch each, and Triton's kernel a table of addresses each.
"""

from __future__ import annotations

import ctypes
import errno
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import ops
from .conv1d import in_place_of
from .errors import ConfigError
from .pattern import SparsePattern

if TYPE_CHECKING:
    from .nn import SparseDeltaLinear


def refuse_sharded(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ConfigError where a process holds but a part of one of these named tensors."""
    for name, tensor in tensors:
        if hasattr(tensor, "full_tensor"):  # a DTensor; to ask for the class would import it
            raise ConfigError(
                f"{name!r} is sharded, as by FSDP2, and cannot be read or written as a whole: make "
                'the model sparse, with mode="additive", and load adapters before it is sharded; '
                "to save or merge, gather its state dict (get_model_state_dict with "
                "full_state_dict=True) and load it into a sparse model that is not"
            )


class Family:
    """The sparse layers of one model; they are not kept alive."""

    def __init__(self, layers: Iterable[SparseDeltaLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def layers(self) -> list[SparseDeltaLinear]:
        """Those that still are sparse: a layer that gave its weight away is written no more."""
        alive = (layer for ref in self._layers if (layer := ref()) is not None)
        return [layer for layer in alive if layer.family is self]


def set_modes(modes: Mapping[SparseDeltaLinear, str]) -> None:
    """Give each layer its mode, and write what the mode says into its weight: W0 + D (resident) or
    W0 (additive). Also where nothing was seen to change, as `SparseDeltaLinear.sync`.

    One write for all layers of a dtype, a device and a mode. On any of the errors no mode and no
    weight is changed.

    Raises:
        ConfigError: the base of a layer that is to be resident is not a plain `nn.Linear`, or lies
            in memory that cannot be written to.
        ValueError, TypeError, BackendError: as `ops.write_deltas`.
    """
    for layer, mode in modes.items():
        if layer.base is not None and mode == "resident":
            raise ConfigError(
                f"a {type(layer.base).__name__} cannot hold the delta; it stays additive"
            )
    written = [
        layer
        for layer, mode in modes.items()
        if layer.base is None
        and not layer.pattern.is_empty
        and (mode == "resident" or layer.is_written)
    ]
    for layer in written:
        if modes[layer] == "resident" and not layer.is_written:
            refuse_read_only(layer.weight)
    ops.check_deltas(*_operands(written, modes))
    for layer, mode in modes.items():
        layer.mode = mode
    for layer in written:
        layer.doubt_written()  # were it cut short, the next forward pass would write again
    write(written)


def refuse_read_only(weight: Tensor) -> None:
    """Raise ConfigError where a weight cannot be written to, as in a read-only memory map.

    Neither torch nor numpy tells, and a write would end the process by a signal. The system, asked
    to put a byte where it has just been read, answers with an error.
    """
    if weight.device.type != "cpu" or not weight.data_ptr():
        return
    first = (ctypes.c_char * 1).from_address(weight.data_ptr())
    ends = os.pipe()
    try:
        os.writev(ends[1], [first])
        os.readv(ends[0], [first])
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        raise ConfigError(
            "the weight lies in memory that cannot be written to, such as a read-only memory map; "
            'use mode="additive", or give the layer a copy of its weight'
        ) from None
    finally:
        for end in ends:
            os.close(end)


def sync(layers: Iterable[SparseDeltaLinear]) -> None:
    """`SparseDeltaLinear.sync` for all `layers`, in one write for each dtype, device and mode."""
    set_modes({layer: layer.mode for layer in layers})


def to_linears(layers: Iterable[SparseDeltaLinear], keep_delta: bool) -> dict[nn.Module, nn.Module]:
    """`SparseDeltaLinear.to_linear` for all `layers`; on an error nothing is changed."""
    layers = list(layers)
    mode = "resident" if keep_delta else "additive"
    # An opaque base was never written: it is the plain layer, unless it were to hold a delta.
    held = [x for x in layers if x.base is None or (keep_delta and not x.pattern.is_empty)]
    set_modes(dict.fromkeys(held, mode))
    return {layer: _given_away(layer) for layer in layers}


@torch.no_grad()
def write(layers: list[SparseDeltaLinear]) -> None:
    """Write what the modes of `layers`, none of them opaque, say into their weights.

    Raises:
        ConfigError: a weight is sharded.
    """
    refuse_sharded(("weight", layer.weight) for layer in layers)
    ops.write_deltas(*_operands(layers, {layer: layer.mode for layer in layers}))
    for layer in layers:
        layer.note_written()


def _operands(
    layers: list[SparseDeltaLinear], modes: Mapping[SparseDeltaLinear, str]
) -> tuple[list[Tensor], list[SparsePattern], list[Tensor], list[Tensor | None]]:
    return (
        [layer.weight for layer in layers],
        [layer.pattern for layer in layers],
        [layer.base_values for layer in layers],
        [layer.values if modes[layer] == "resident" else None for layer in layers],
    )


def _given_away(layer: SparseDeltaLinear) -> nn.Module:
    """The plain layer over the weight as it is; the sparse one leaves its family."""
    if layer.base is not None:
        return layer.base
    layer.family = None
    linear = layer.plain_type(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    linear.weight = layer.weight
    linear.bias = layer.bias  # type: ignore[assignment]
    return in_place_of(layer, linear)
