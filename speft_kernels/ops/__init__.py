"""The five operations: contract, reference, registration and dispatch, one file each."""

from . import registry
from .block_grad import block_grad
from .sampled_grad import sampled_grad
from .sparse_delta_matmul import (
    delta_matmul,
    sparse_delta_matmul,
    sparse_delta_matmul_grad_input,
)
from .topk_salience import METRICS, topk_salience
from .write_delta import write_delta

__all__ = [
    "METRICS",
    "block_grad",
    "delta_matmul",
    "registry",
    "sampled_grad",
    "sparse_delta_matmul",
    "sparse_delta_matmul_grad_input",
    "topk_salience",
    "write_delta",
]
