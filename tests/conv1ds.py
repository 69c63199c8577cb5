"""A GPT-2 of `Conv1D` layers, how it is made sparse, and the same model of linear layers."""

import copy

from tiny_models import token_batches
from torch import nn

from speft_kernels import SpeftConfig
from speft_kernels.conv1d import is_conv1d

BATCHES = token_batches(2, causal=True)
CONFIG = SpeftConfig(density=0.1, salience="gradient", selection="top", modules_to_train=[])
# c_proj is square: read the wrong way round, its shape would not tell.
SQUARE, WIDE = "transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"


def loss(model):
    return model(**BATCHES[0]).loss


def with_linears(model):
    """The same model of plain linear layers."""
    model = copy.deepcopy(model)
    for name, former in [(n, m) for n, m in model.named_modules() if is_conv1d(m)]:
        linear = nn.Linear(former.nx, former.nf)
        linear.weight = nn.Parameter(former.weight.detach().t().contiguous())
        linear.bias = former.bias
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, linear)
    return model
