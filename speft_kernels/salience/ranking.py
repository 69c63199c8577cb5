"""Ranking: the top entries or blocks of each layer, or of all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from ..dtypes import accumulator_dtype
from ..errors import SalienceError
from .custom import check_score
from .draw import budget, sampling_keys, uniform
from .metrics import Metric

if TYPE_CHECKING:
    from ..config import SpeftConfig


def choose(
    metric: Metric,
    config: SpeftConfig,
    layers: Mapping[str, nn.Linear],
    gradients: dict[str, Tensor],
    zeros: dict[str, tuple[int, int]] | None = None,
) -> dict[str, Tensor]:
    """Return each layer's sorted flat indices of the entries (or blocks) that score highest.

    Args:
        gradients: what the scoring pass collected, `[N, K]` a layer; empty for a metric without. It
            is emptied on the way: each one goes as soon as it is not needed any more.
        zeros: filled with how many of how many chosen places scored zero, of each layer where any
            did because nothing better was left.

    Raises:
        SalienceError: a score is not finite, or a callable's has the wrong shape or dtype; the
            message names the layer.
    """
    if metric.score is None:
        bh, bw = config.block_shape
        sizes = {name: layer.weight.numel() // (bh * bw) for name, layer in layers.items()}
        return uniform(sizes, config.density, config.scope, config.seed)
    groups = [[name] for name in layers] if config.scope == "layer" else [list(layers)]
    chosen: dict[str, Tensor] = {}
    for group in groups:
        pairs = {name: _operands(metric, layers[name], gradients.get(name)) for name in group}
        fused = (
            metric.ranked_as is not None
            and config.block_shape == (1, 1)
            and config.selection == "top"
        )
        if fused and _of_one_kind(pairs.values()):
            ranked_by = metric.ranked_as
        else:
            # The top-k reads scores instead. Each takes the place of its layer's gradient, so one
            # layer's worth of memory comes on top: a copy of all weights in the gradients' dtype
            # would be as large as these.
            ranked_by = "raw"
            dtype, device = _common(pairs.values())
            for name in group:
                score = _block_scores(metric, pairs[name], config.block_shape, dtype, name)
                if config.selection == "sample":
                    columns = max(config.sample_columns, config.density)  # enough to draw from
                    score = sampling_keys(score, config.seed, name, columns)
                pairs[name] = (None, score.to(device))
                gradients.pop(name, None)
        places = sum((g if g is not None else _present(w)).numel() for w, g in pairs.values())
        assert ranked_by is not None
        try:
            selected = ops.topk_salience(
                [weight for weight, _ in pairs.values()],
                [gradient for _, gradient in pairs.values()],
                budget(places, config.density),
                metric=ranked_by,
                scope="global",
                names=[f"layer {name!r}" for name in group],
            )
        except SalienceError as error:  # speaks of the key that it ranked by
            message = str(error).replace(f"the {ranked_by} score", f"the {metric.key} score")
            raise SalienceError(message) from None
        chosen.update(zip(group, selected, strict=True))
        if zeros is not None:
            zeros.update(_filled_up(metric, pairs, chosen, ranked_by))
        for name in group:
            gradients.pop(name, None)
    return chosen


def _filled_up(
    metric: Metric, pairs: Mapping[str, Pair], chosen: Mapping[str, Tensor], ranked_by: str
) -> dict[str, tuple[int, int]]:
    """Return, of a group ranked together, the layers with chosen places that scored zero, and how
    many of how many; none where what scores below zero was chosen, too.
    """
    found = {}
    for name, pair in pairs.items():
        indices = chosen[name].long()
        operands = [
            torch.empty(0) if t is None else t.reshape(-1)[indices.to(t.device)] for t in pair
        ]
        score = operands[1]
        if ranked_by != "raw":
            assert metric.score is not None
            # As the top-k does: a half's products leave its range.
            score = metric.score(*(t.to(accumulator_dtype(t.dtype)) for t in operands))
        below, count = torch.stack([(score < 0).sum(), (score == 0).sum()]).tolist()
        if below:
            return {}
        if count:
            found[name] = (count, len(indices))
    return found


# (weight, gradient); None where the metric does not read it
Pair = tuple[Tensor | None, Tensor | None]


def _operands(metric: Metric, layer: nn.Linear, gradient: Tensor | None) -> Pair:
    weight = layer.weight.detach() if metric.needs_weight else None
    return weight, gradient if metric.needs_statistic else None


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # a metric reads the weight, the gradient or both
    return tensor


def _tensors(pairs: Iterable[Pair]) -> list[Tensor]:
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def _of_one_kind(pairs: Iterable[Pair]) -> bool:
    return len({(tensor.dtype, tensor.device) for tensor in _tensors(pairs)}) == 1


def _common(pairs: Iterable[Pair]) -> tuple[torch.dtype, torch.device]:
    """Return float32, or float64 where any tensor is; and the device to rank on."""
    tensors = _tensors(pairs)
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    first = next((gradient for _, gradient in pairs if gradient is not None), tensors[0])
    return torch.float64 if double else torch.float32, first.device


def _block_scores(
    metric: Metric, pair: Pair, block_shape: tuple[int, int], dtype: torch.dtype, name: str
) -> Tensor:
    """Return `[N / bh, K / bw]`: the entries' scores summed over each block."""
    weight, gradient = pair
    like = gradient if gradient is not None else _present(weight)
    unread = torch.empty(0)  # in the place of an operand that the metric does not read
    operands = [unread if t is None else t.to(like.device, dtype) for t in pair]
    if (
        metric.ranked_as is None
        and weight is not None
        and operands[0].data_ptr() == weight.data_ptr()
    ):
        operands[0] = operands[0].clone()  # a user's callable may write into what it is given
    assert metric.score is not None
    score = metric.score(operands[0], operands[1])
    if metric.ranked_as is None:
        label = f"salience {metric.key!r}, called for layer {name!r},"
        score = check_score(score, operands[0], label)
    (rows, cols), (bh, bw) = score.shape, block_shape
    if block_shape == (1, 1):
        return score
    return score.reshape(rows // bh, bh, cols // bw, bw).sum(dim=(1, 3))
