"""The five operations: contract, reference, registration and dispatch, one file each.

`keep_columns` is the forward half of `sampled_grad`.
"""

from . import registry
from .block_grad import block_grad
from .keep_columns import keep_columns
from .sampled_grad import sampled_grad
from .sparse_delta_matmul import (
    delta_matmul,
    delta_matmul_grad_input,
    sparse_delta_matmul,
    sparse_delta_matmul_grad_input,
)
from .topk_salience import METRICS, topk_salience
from .write_delta import check_deltas, write_delta, write_deltas

__all__ = [
    "METRICS",
    "block_grad",
    "check_deltas",
    "delta_matmul",
    "delta_matmul_grad_input",
    "keep_columns",
    "registry",
    "sampled_grad",
    "sparse_delta_matmul",
    "sparse_delta_matmul_grad_input",
    "topk_salience",
    "write_delta",
    "write_deltas",
]
