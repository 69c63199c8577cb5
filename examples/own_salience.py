"""Salience of your own: a function `score(w, g)` of a layer's weight and its summed gradient.

    speft finetune --train train.tsv --eval dev.tsv --output runs/mine \
        --salience examples.own_salience:levelled_snip --scope global --selection sample

The command finds the module in the folder that it runs in, or where it is installed.
"""

import torch
from torch import Tensor


def levelled_snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """SNIP's |w g| over the root of the layer's mean: layer shares between the two scopes.

    Ranked in scope `global`, |w g| itself gives a layer a share that goes by its mean, and |w g|
    over its mean what scope `layer` gives; this is their geometric mean. Drawn entries
    (`selection="sample"`) meet it in expectation, the highest roughly.
    """
    score = (weight * gradient).abs()
    return score / score.mean().sqrt().clamp(min=torch.finfo(score.dtype).tiny)


def lowering(weight: Tensor, gradient: Tensor) -> Tensor:
    """FORCE's -w g where it is positive: the weights whose removal would raise the loss, to first
    order. No score is below zero, so entries can be drawn by it.
    """
    return (-weight * gradient).clamp(min=0)
