"""What the work of `sampled_grad` costs on a device: the constants of the plan's cost model; and
where `sparse_delta_matmul` changes its way.

The defaults were measured on the machines named beside them; `speft tune` measures this one's and
keeps them in a file per user, which is read from then on.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError
from .files import read_json, write_json
from .machine import processor

# Where `speft tune` and the GPU check time both ways of Triton's `sparse_delta_matmul`.
CROSSOVER_TOKENS = (32, 64, 128, 192, 256)


@dataclass(frozen=True)
class Costs:
    """Seconds for one unit of each kind of work, by all threads together.

    Attributes:
        panel: a multiply-add in the GEMM of a panel, of which every product is computed.
        read: an element of the matrix that a panel multiplies by its thin one, dy or x.
        tile: a multiply-add in a dense tile.
        gather: a multiply-add of a gathered entry.
        pack: an element of a used column of x or dy, transposed for tiles and gathering, or picked
            for the products of torch's own operators.
        call: what a panel costs beside its multiply-adds.
        fused_tokens: no cost, but the tokens up to which Triton's `sparse_delta_matmul` adds the
            entries while it reads W; for more it writes W + D, which the vendor's GEMM reads.
    """

    panel: float
    read: float
    tile: float
    gather: float
    pack: float
    call: float
    # By arithmetic: W + D written out moves three times the bytes of W, read, written, and read by
    # the product; the fused kernel reads W once for each 64 tokens: equal at 192.
    fused_tokens: int = 128

    def __post_init__(self) -> None:
        if type(self.fused_tokens) is not int or self.fused_tokens < 1:
            raise ValueError(f"fused_tokens must be a positive int, got {self.fused_tokens!r}")
        for name, value in asdict(self).items():
            if not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
                raise ValueError(f"cost {name!r} must be a positive number of seconds, got {value}")


DEFAULTS = {
    # Measured: two Ice Lake cores with AVX-512, float32, `speft tune`.
    "cpu": Costs(
        panel=1.3e-11, read=3.6e-10, tile=2.3e-11, gather=3.1e-11, pack=2.5e-10, call=7e-4
    ),
    # Arithmetic, not measured, for 16-bit elements on an H200 whose L2 cache gives 7 TB/s: a strip
    # of 128 products reads 3 bytes there, its x and its share of dy; a tile 64 bytes for its 256
    # products; a gathered entry 3.5, where few neighbours share its row. 2 bytes are read from
    # memory at 4 TB/s, in packing 4 read and written.
    "cuda": Costs(panel=3.4e-15, read=5e-13, tile=3.6e-14, gather=5e-13, pack=1e-12, call=5e-6),
}


def costs_of(device: torch.device) -> Costs:
    """Return this machine's measured costs where `speft tune` has run, else the defaults (those of
    the CPU for a device without any).
    """
    if device.type not in DEFAULTS:
        return DEFAULTS["cpu"]
    return _measured().get(machine_key(device), DEFAULTS[device.type])


def machine_key(device: torch.device) -> str:
    """What a measurement holds for: the processor and its threads, or the GPU."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return f"cuda: {_gpu(index)}"
    return f"{device.type}: {processor()}, {torch.get_num_threads()} threads"


@functools.cache
def _gpu(index: int) -> str:
    # Kept: some products of one token are issued in the time that torch takes to look it up.
    return torch.cuda.get_device_name(index)


def cache_file() -> Path:
    """The file of measured costs: `$SPEFT_CACHE/costs.json`, else in the user's cache folder.

    Raises ConfigError where there is no such folder, as for a user of a container's own.
    """
    folder = os.environ.get("SPEFT_CACHE")
    if folder:
        return Path(folder) / "costs.json"
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "speft_kernels" / "costs.json"
    except RuntimeError as error:
        raise ConfigError(f"costs are kept in a home folder: {error} Set SPEFT_CACHE") from error


def remember(device: torch.device, costs: Costs) -> Path:
    """Keep the measured costs of this machine's `device`; return the file."""
    path = cache_file()
    kept = {key: asdict(value) for key, value in _read(path).items()}
    kept[machine_key(device)] = asdict(costs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept)
    _measured.cache_clear()
    return path


@functools.lru_cache(maxsize=1)
def _measured() -> dict[str, Costs]:
    try:
        path = cache_file()
    except ConfigError:
        return {}
    return _read(path)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of Costs; one that a file of an older version lacks has its default."""
    return {
        field.name: values[field.name]
        for field in fields(Costs)
        if field.default is MISSING or field.name in values
    }


def _read(path: Path) -> dict[str, Costs]:
    """The costs in a file; a file that cannot be used is said so, and the defaults hold."""
    try:
        if not path.exists():
            return {}
        content = read_json(path)
        return {key: Costs(**_known(values)) for key, values in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the measured costs in {path} cannot be used ({type(error).__name__}: {error}); the "
            "defaults hold. Run `speft tune` to measure again",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
