"""Masks of the cases, drawn once and kept in files.

The largest takes a CPU many seconds, and each stage's process, and each that takes the place of one
that ended, would draw all of them again, while the GPU waits.
"""

from __future__ import annotations

import contextlib
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from ... import pattern as patterns
from ... import testing
from ...errors import OutputError
from ...files import replaced
from ...pattern import SparsePattern
from ...testing import realistic_pattern, uniform_pattern

Shape = tuple[int, int]

FOLDER = "masks"  # in the folder of the journal


class Mask(NamedTuple):
    """What a mask is drawn by.

    Attributes:
        shape: of the weight.
        kind: "realistic", "uniform", or blocks as "16x16".
    """

    shape: Shape
    kind: str
    density: float
    seed: int = 0


def mask(of: Mask, folder: Path | None = None) -> SparsePattern:
    """The mask as it is kept in the folder, else drawn and kept there."""
    # Kernels are judged with torch alone: what is not there costs time, and nothing else.
    if folder is None or find_spec("safetensors") is None:
        return _drawn(of)
    path = folder / f"{of.shape[0]}x{of.shape[1]}-{of.kind}-{of.density:g}-{of.seed}.safetensors"
    found = _kept(path, of)
    if found is None:
        found = _drawn(of)
        _keep(path, of, found)
    return found


def _drawn(of: Mask) -> SparsePattern:
    shape, kind, density, seed = of
    if kind == "uniform":
        return uniform_pattern(shape, density, seed=seed)
    if kind == "realistic":
        return realistic_pattern(shape, density, seed=seed)
    height, width = _blocks(kind)
    grid = (shape[0] // height) * (shape[1] // width)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(grid, generator=generator)[: max(1, round(density * grid))]
    return SparsePattern.from_blocks(shape, (height, width), chosen)


def _blocks(kind: str) -> Shape:
    if kind in ("uniform", "realistic"):
        return 1, 1
    height, width = (int(side) for side in kind.split("x"))
    return height, width


def _kept(path: Path, of: Mask) -> SparsePattern | None:
    """The mask in a file; None where there is none, or a damaged one, or another one than would be
    drawn now.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts, indices = file.metadata() or {}, file.get_tensor("indices")
    except (OSError, SafetensorError):
        return None
    if facts != {**_facts(of), "digest": _digest(indices)}:
        return None
    return SparsePattern(of.shape, indices, _blocks(of.kind))


def _keep(path: Path, of: Mask, found: SparsePattern) -> None:
    from safetensors.torch import save_file

    facts = {**_facts(of), "digest": _digest(found.indices)}
    # Where it cannot be written it is drawn again the next time, and nothing else is lost.
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            save_file({"indices": found.indices}, temporary, facts)


def _facts(of: Mask) -> dict[str, str]:
    """What decides the entries: the key, torch's generators, and the sources that draw."""
    sources = hashlib.sha256()
    for name in (patterns.__file__, testing.__file__, __file__):
        sources.update(Path(name).read_bytes())
    return {"of": str(of), "torch": str(torch.__version__), "sources": sources.hexdigest()}


def _digest(indices: torch.Tensor) -> str:
    digest = hashlib.sha256(str(indices.dtype).encode())
    digest.update(indices.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
