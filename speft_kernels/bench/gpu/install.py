"""Building the package for the GPU that is there, into the Python that runs it.

`pip install -e` into the environment as it is; where that cannot be written to, into an environment
of its own that sees all of the other. Nothing is downloaded, and nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .journal import ROOT, fingerprint

FOLDER = ROOT / "build" / "gpu"
_LINES, _WIDTH = 8, 160  # of an error that is kept

_PROBE = """
import importlib.util, json, os, sys
import torch
gpu = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "gpu": torch.cuda.get_device_name(0) if gpu else None,
    "capability": torch.cuda.get_device_capability(0) if gpu else None,
    "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else 0,
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "xdist": importlib.util.find_spec("xdist") is not None,
    "timeout": importlib.util.find_spec("pytest_timeout") is not None,
}))
"""
_IMPORTS = "import torch, speft_kernels._C, speft_kernels.triton_kernels"
_IMPORTS_CUDA = f"{_IMPORTS}, speft_kernels._cuda"
_LACKING = """
import json
from speft_kernels import _cuda_native, _triton
print(json.dumps({"CUDA": _cuda_native.missing("cuda"), "Triton": _triton.missing()}))
"""
_SITES = "import json, site, sys; print(json.dumps([p for p in sys.path if 'site-packages' in p]))"

# Runs a command; tells its exit status, None where it was out of time, and its output.
Run = Callable[[Sequence[str], Mapping[str, str]], tuple[int | None, str]]


@dataclass(frozen=True)
class Machine:
    """What the Python that was named finds here; `gpu` is None where there is none.

    Attributes:
        xdist, timeout: whether these plugins of pytest are there.
    """

    torch: str
    gpu: str | None
    capability: tuple[int, int] | None
    memory_gib: float
    cores: int
    xdist: bool
    timeout: bool

    @property
    def archs(self) -> str:
        """CUDA targets for this GPU alone; from Hopper on with its own instructions."""
        if self.capability is None:
            return ""
        major, minor = self.capability
        return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


def probe(python: str) -> Machine | str:
    """What is here, or why that cannot be told."""
    try:
        found = _last_line([python, "-c", _PROBE])
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return f"{python} cannot import torch: {output.strip().splitlines()[-1]}"
    if found["capability"] is not None:
        found["capability"] = tuple(found["capability"])
    return Machine(**found)


def _last_line(command: Sequence[str], **where: Any) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180, **where)
    return json.loads(done.stdout.strip().splitlines()[-1])


def import_error(python: str, *, with_cuda: bool = False) -> str:
    """Why this Python does not import the compiled package from anywhere; "" where it does."""
    command = [python, "-c", _IMPORTS_CUDA if with_cuda else _IMPORTS]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    return "" if done.returncode == 0 else _errors(done.stderr) or f"exit status {done.returncode}"


def lacking(python: str) -> dict[str, str]:
    """Kind of kernels -> why the installed package cannot run them, for those that it cannot."""
    try:
        found = _last_line([python, "-c", _LACKING], cwd="/", env=environment({}))
    except (subprocess.SubprocessError, IndexError, json.JSONDecodeError) as error:
        return {"CUDA and Triton": f"cannot be told: {getattr(error, 'stderr', '') or error}"}
    return {kind: why for kind, why in found.items() if why}


@dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
        python: the Python that has the package; None where it could not be built.
        error: of the compiler, where the package was built without the CUDA kernels, or not at all.
    """

    python: str | None
    error: str = ""


def install(archs: str, run: Run, folder: Path = FOLDER) -> Built:
    """Build the package from the present sources; where that fails, without the CUDA kernels, so
    that one file that does not compile costs one backend and not the whole run.

    Args:
        run: as `Run`. A build that is out of time is given up: its objects are kept, and the next
            run goes on with them.
    """
    nvcc = os.environ.get("CUDA_HOME") or shutil.which("nvcc") or ""
    wanted = {"sources": fingerprint("build"), "archs": archs, "with": sys.executable}
    wanted["nvcc"] = nvcc  # what failed without one is tried again when there is one
    stamp = folder / "stamp.json"
    if (built := _stamped(stamp, wanted)) is not None:
        return built
    own = folder / "venv" / "bin" / "python"
    error = ""
    # Unless it is told that it must, setup.py leaves the kernels out where it finds no nvcc.
    for with_cuda in (True, False):
        more = {"SPEFT_BUILD_CUDA": str(int(with_cuda))}
        if with_cuda:
            more["SPEFT_CUDA_ARCHS"] = archs
        for python in (sys.executable, str(own)):
            if python == str(own) and not _environment(own):
                continue
            # pip serves another environment than its own: that one needs none.
            pip = [sys.executable, "-m", "pip", "--python", python, "install"]
            flags = ["--no-build-isolation", "--no-deps", "--no-input", "--no-index"]
            ended, said = run([*pip, *flags, "-e", str(ROOT)], more)
            refused = import_error(python, with_cuda=with_cuda) if ended == 0 else ""
            if ended == 0 and not refused:
                if error:
                    _remove_older_kernels()
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps({**wanted, "python": python, "error": error})
                stamp.write_text(text, "utf-8")
                return Built(python, error)
            if ended is None:
                return Built(None, "out of time; what was compiled is kept for the next run")
            error = error or refused or _errors(said) or f"pip ended with {ended}"
    return Built(None, error)


def _remove_older_kernels(package: Path = ROOT / "speft_kernels") -> None:
    """Those of an earlier build would be measured as if they were these sources'."""
    for path in package.glob("_cuda.*so"):
        path.unlink()


def _errors(said: str) -> str:
    """The lines that name an error, else the last ones, of a compiler's output."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\berror\b|FAILED", line, re.IGNORECASE)]
    # pip says first and last that something has failed; what it is stands between.
    told = [line for line in named if "subprocess-exited" not in line] or lines[-_LINES:]
    return "\n".join(line[:_WIDTH] for line in told[:_LINES])


def _stamped(stamp: Path, wanted: Mapping[str, str]) -> Built | None:
    try:
        kept = json.loads(stamp.read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    built = Built(str(kept.pop("python", "")), str(kept.pop("error", "")))
    if kept != wanted or not built.python:
        return None
    return None if import_error(built.python, with_cuda=not built.error) else built


def _environment(python: Path) -> bool:
    """Make an environment that sees the packages of the running one.

    Its own --system-site-packages are those of the base installation, which are not the running
    one's where that is itself an environment: these are named in a .pth file.
    """
    folder = python.parent.parent
    make = [sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(folder)]
    if subprocess.run(make).returncode != 0:
        return False
    seen = _last_line([sys.executable, "-c", _SITES])
    (target,) = folder.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})" for path in seen]
    (target / "running.pth").write_text("\n".join(lines) + "\n", "utf-8")
    return True


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a stage: as it is, with `more`, and without what would keep Triton from
    compiling.
    """
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **more}
