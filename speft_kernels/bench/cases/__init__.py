"""The cases: one module for each operation, of its name, `layer` for a crowded layer, `step` for
the whole training step, and `models` for that of language models.

Each module has `CASES`, name -> function that sets the case up, and `QUICK`, the names of those
that say most in little time; of an operation, those that need no model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..harness import Case

KERNELS = ("sampled_grad", "block_grad", "topk_salience", "sparse_delta_matmul", "write_delta")
OPERATIONS = (*KERNELS, "layer", "step", "models")


def cases_of(operation: str, *, quick: bool) -> Sequence[Callable[[], Case]]:
    """Return what sets up the cases of an operation, only the quick ones where asked.

    Raises:
        ConfigError: there is no such operation.
    """
    if operation not in OPERATIONS:
        raise ConfigError(
            f"unknown operation {operation!r}.{nearest(operation, OPERATIONS)} "
            f"Known: {', '.join(OPERATIONS)}"
        )
    module = importlib.import_module(f".{operation}", __name__)
    names = module.QUICK if quick else module.CASES
    return [module.CASES[name] for name in names]
