"""What the cases are about: the shapes of a Llama model's layers, their masks and operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...costs import CROSSOVER_TOKENS
from ...errors import BackendError
from ...ops import registry
from ...pattern import SparsePattern
from .device import Device
from .drawn import Mask, Shape, mask

MOST_TOKENS = 8192  # for which most goals are set


@dataclass(frozen=True)
class Scale:
    """Sizes. A case asks for what a real model has, and is given what the scale has in its place.

    Attributes:
        projections: name -> (out_features, in_features). o is shaped as q, v as k, up as gate.
        square: side of the matrix of the top-k cases.
        models: name -> settings of a LlamaConfig.
        sequences: (batch, length) of a training step.
    """

    projections: Mapping[str, Shape]
    tokens: Mapping[int, int]
    square: int
    models: Mapping[str, Mapping[str, int | bool]]
    sequences: tuple[int, int]


# Public sizes of Llama-3-8B and of Llama-3.2-1B.
LLAMA = Scale(
    {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)},
    {count: count for count in (1, 16, *CROSSOVER_TOKENS, 512, MOST_TOKENS)},
    4096,
    {
        "8B": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        "1B": {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    },
    (4, 2048),
)

_TINY_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
}
TINY = Scale(
    {"q": (128, 128), "k": (64, 128), "gate": (192, 128), "down": (128, 192)},
    {1: 1, 16: 3, 512: 18, MOST_TOKENS: 40, **{n: 4 + n // 32 for n in CROSSOVER_TOKENS}},
    48,
    {
        "8B": {**_TINY_MODEL, "tie_word_embeddings": False},
        "1B": {**_TINY_MODEL, "tie_word_embeddings": True},
    },
    (2, 12),
)


@dataclass(frozen=True)
class Spec:
    """One case: an operation on a projection of a Llama model, under a mask.

    Attributes:
        projection: a key of `Scale.projections`; for other operations what their module says.
        mask: "realistic", "uniform", or blocks as "16x16".
        backend: the one of ours that takes part; "" for all.
    """

    operation: str
    projection: str
    tokens: int = 0
    mask: str = "realistic"
    density: float = 0.005
    backend: str = ""


class Workbench:
    """A device, a scale, and the masks, which are drawn once.

    Args:
        masks: where they are kept for the next process; None keeps none.

    Attributes:
        barred: backend -> why it takes no part in the present case.
        trying: to be told the name of a side before its kernels run, in a case's setup as well:
            who is to blame when the process ends.
    """

    def __init__(self, device: Device, scale: Scale, masks: Path | None = None) -> None:
        self.device, self.scale, self.masks = device, scale, masks
        self.barred: Mapping[str, str] = {}
        self.trying: Callable[[str], None] = lambda side: None
        self._patterns: dict[Mask, SparsePattern] = {}

    def shape(self, spec: Spec) -> Shape:
        return self.scale.projections[spec.projection]

    def tokens(self, spec: Spec) -> int:
        return self.scale.tokens[spec.tokens]

    def draw(self, wanted: Iterable[Mask]) -> None:
        """Draw masks on all cores before anything is timed: the largest takes seconds on one."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._patterns]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of each that draws
        try:
            with ThreadPoolExecutor() as pool:
                drawn = pool.map(lambda key: mask(key, self.masks), missing)
                for key, pattern in zip(missing, drawn, strict=True):
                    self._patterns[key] = pattern.to(self.device.torch)
        finally:
            torch.set_num_threads(threads)

    def pattern(self, shape: Shape, kind: str, density: float, seed: int = 0) -> SparsePattern:
        key = Mask(shape, kind, density, seed)
        self.draw([key])
        return self._patterns[key]

    def pattern_of(self, spec: Spec) -> SparsePattern:
        return self.pattern(self.shape(spec), spec.mask, spec.density)

    def operands(self, spec: Spec) -> tuple[Tensor, Tensor]:
        """Random dy `[M, N]` and x `[M, K]`."""
        (n, k), tokens = self.shape(spec), self.tokens(spec)
        return self.device.randn(tokens, n), self.device.randn(tokens, k)

    def title(self, spec: Spec) -> str:
        n, k = self.shape(spec)
        mask = f"{spec.mask} {100 * spec.density:g}%"
        return f"{spec.projection} {n} x {k}, {self.tokens(spec)} tokens, {mask}"

    def backends(self, *operations: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        """The backends that serve all of these operations on the device, but for the reference,
        those of a CPU, and those that are barred.
        """
        return [
            name
            for name in registry.BACKENDS
            if name not in ("reference", "cpu", "cuda-host", *self.barred)
            and all(_serves(operation, self.device.torch, dtype, name) for operation in operations)
        ]


@functools.cache
def _serves(operation: str, device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    try:
        registry.resolve(operation, device, dtype, backend)
    except BackendError:
        return False
    return True


def rotated(pattern: SparsePattern, number: int) -> SparsePattern:
    """The pattern with rows and columns turned round `number` times: as clustered, elsewhere, and
    with indices of its own, as another layer has them.
    """
    (n, k), where = pattern.shape, pattern.indices.long()
    rows = (where // k + 997 * number) % n
    return SparsePattern.from_indices(pattern.shape, rows * k + (where % k + 613 * number) % k)
