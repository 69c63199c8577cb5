"""Which backend serves which operation, on which device and for which dtypes, and why another one
does not.

The automatic choice follows `PREFERENCE`; a backend that is named (`backend="cpu"` or the
environment variable `SPEFT_BACKEND`) is used or refused loudly, never replaced.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import _cuda_native, _native, _triton
from ..errors import BackendError, nearest

OPS = ("sparse_delta_matmul", "sampled_grad", "block_grad", "topk_salience", "write_delta")
HELPERS = ("keep_columns",)  # of sampled_grad: its forward half

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

ANY_DEVICE = "any"


@dataclass(frozen=True)
class Backend:
    """A family of implementations.

    `device` is the device type it runs on, `missing()` says why it cannot run here (None when it
    can).
    """

    name: str
    device: str
    description: str
    missing: Callable[[], str | None]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "reference", ANY_DEVICE, "pure torch in its plainest form: the oracle", lambda: None
        ),
        Backend("torch", ANY_DEVICE, "torch's own operators in bounded pieces", lambda: None),
        Backend("cpu", "cpu", "compiled C++ kernels", _native.missing),
        Backend(
            "triton",
            ANY_DEVICE if _triton.interpreting() else "cuda",
            "Triton kernels, not yet run on a GPU: opt-in",
            _triton.missing,
        ),
        Backend(
            "cuda",
            "cuda",
            "compiled CUDA kernels, not yet run on a GPU: opt-in",
            partial(_cuda_native.missing, "cuda"),
        ),
        Backend(
            "cuda-host",
            "cpu",
            "the CUDA kernels' sources on a CPU, for tests",
            partial(_cuda_native.missing, "cuda-host"),
        ),
    )
}

# Fastest first. A device that is not listed is served by the `torch` backend, which runs anywhere.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch")}
DEFAULT_PREFERENCE = ("torch",)


@dataclass(frozen=True)
class Implementation:
    """`form` is what of a plan the function reads, for an operation whose backends read different
    things.
    """

    op: str
    backend: Backend
    dtypes: tuple[torch.dtype, ...]
    function: Callable[..., Any]
    form: Any = None

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why this implementation cannot serve tensors of `dtype` on `device`, or None when
        it can.
        """
        if self.backend.device not in (ANY_DEVICE, device.type):
            return f"it runs on {self.backend.device!r} tensors, these are on {device.type!r}"
        if dtype not in self.dtypes:
            return f"it takes {', '.join(map(str, self.dtypes))}, not {dtype}"
        return self.backend.missing()


_implementations: dict[tuple[str, str], Implementation] = {}


def implement(
    op: str, backend: str, dtypes: tuple[torch.dtype, ...] = FLOATS, form: Any = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function as the implementation of `op` in `backend`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations[op, backend] = Implementation(
            op, BACKENDS[backend], dtypes, function, form
        )
        return function

    return register


def resolve(
    op: str, device: torch.device, dtype: torch.dtype, backend: str | None = None
) -> Implementation:
    """Return the implementation that serves `op` for tensors of `dtype` on `device`.

    Args:
        backend: a name forces that backend; None follows `SPEFT_BACKEND` where it is set, else the
            preference.

    Raises:
        BackendError: the backend that was asked for is unknown or cannot serve the call (the
            message says why), or, in an automatic choice, none can.
    """
    forced = backend or os.environ.get("SPEFT_BACKEND")
    key = (op, device.type, dtype, forced)
    found = _resolved.get(key)
    if found is None:
        found = _resolved[key] = _resolve(op, device, dtype, backend, forced)
    return found


# Answers given. What can run does not change while a process runs; a refusal is not kept.
_resolved: dict[tuple[str, str, torch.dtype, str | None], Implementation] = {}


def _resolve(
    op: str, device: torch.device, dtype: torch.dtype, backend: str | None, forced: str | None
) -> Implementation:
    if forced:
        return _forced(op, device, dtype, forced, by_environment=not backend)
    refusals = []
    for name in PREFERENCE.get(device.type, DEFAULT_PREFERENCE):
        candidate = _implementations.get((op, name))
        if candidate is None:
            continue
        refusal = candidate.refusal(device, dtype)
        if refusal is None:
            return candidate
        refusals.append(f"{name}: {refusal}")
        if (reason := candidate.backend.missing()) is not None:
            _warn_once(f"speft_kernels: the faster backend {name!r} is not available: {reason}")
    raise BackendError(
        f"no backend serves {op} for {dtype} on {device.type!r} ({'; '.join(refusals)})"
    )


def _forced(
    op: str, device: torch.device, dtype: torch.dtype, name: str, *, by_environment: bool
) -> Implementation:
    source = "SPEFT_BACKEND" if by_environment else "backend"
    if name not in BACKENDS:
        raise BackendError(
            f"{source}={name!r} is not a backend.{nearest(name, BACKENDS)} Known: "
            f"{', '.join(BACKENDS)}"
        )
    implementation = _implementations.get((op, name))
    refusal = (
        "it does not implement this operation"
        if implementation is None
        else implementation.refusal(device, dtype)
    )
    if implementation is None or refusal is not None:
        raise BackendError(
            f"{source}={name!r} cannot serve {op}: {refusal}. Leave the backend out to have one "
            "chosen; "
            "`speft info` prints which one serves what"
        )
    return implementation


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def table() -> list[dict[str, Any]]:
    """Return a row for each implementation: op, backend, device, dtypes, available, reason,
    default.

    `default` lists the device types of this machine on which the automatic choice is this
    implementation.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for op in (*OPS, *HELPERS):
        for name, backend in BACKENDS.items():
            implementation = _implementations.get((op, name))
            if implementation is None:
                continue
            reason = backend.missing()
            rows.append(
                {
                    "op": op,
                    "backend": name,
                    "device": backend.device,
                    "dtypes": [str(d).removeprefix("torch.") for d in implementation.dtypes],
                    "available": reason is None,
                    "reason": reason or backend.description,
                    "default": [d for d in devices if _first_available(op, d) is implementation],
                }
            )
    return rows


def _first_available(op: str, device: str) -> Implementation | None:
    for name in PREFERENCE.get(device, DEFAULT_PREFERENCE):
        implementation = _implementations.get((op, name))
        if implementation is not None and implementation.backend.missing() is None:
            return implementation
    return None
