"""Building the package for the GPU that is there, into the Python that runs it.

`pip install -e` into the environment as it is; where that cannot be written to, into an environment
of its own that sees all of the other. Where pip installs neither, setup.py builds in place, and
PYTHONPATH names the repository. Nothing is downloaded, and nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .journal import ROOT, fingerprint

FOLDER = ROOT / "build" / "gpu"
CUDA = Path("/usr/local/cuda")  # where the toolkit is installed by default
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
# An editable install has a finder for the folder that lies beside the package. So has whoever finds
# the package by PYTHONPATH, by a module that Python imports when it starts; one of that name which
# is there already goes on to be imported.
_FINDER = """
import importlib.util, sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "speft_kernels.triton_kernels":
            return importlib.util.spec_from_file_location(
                name, {folder!r} + "/__init__.py", submodule_search_locations=[{folder!r}]
            )

sys.meta_path.append(Finder)
others = PathFinder.find_spec(__name__, [path for path in sys.path if path != {here!r}])
if others is not None:
    others.loader.exec_module(importlib.util.module_from_spec(others))
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


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: of CUDA_HOME, of PATH, or of where setup.py, too, looks last.
    An image may have the toolkit and not name it on PATH.
    """
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/{name}"] if home else []
    candidates += [name, f"{CUDA}/bin/{name}"]
    return next((found for one in candidates if (found := shutil.which(one))), None)


def import_error(
    python: str, *, with_cuda: bool = False, more: Mapping[str, str] | None = None
) -> str:
    """Why this Python does not import the compiled package from anywhere; "" where it does.

    Args:
        more: what its environment has besides.
    """
    command = [python, "-c", _IMPORTS_CUDA if with_cuda else _IMPORTS]
    env = {**os.environ, **(more or {})}
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    return "" if done.returncode == 0 else _errors(done.stderr) or f"exit status {done.returncode}"


def lacking(python: str, more: Mapping[str, str]) -> dict[str, str]:
    """Kind of kernels -> why the installed package cannot run them, for those that it cannot."""
    try:
        found = _last_line([python, "-c", _LACKING], cwd="/", env=environment(more))
    except (subprocess.SubprocessError, IndexError, json.JSONDecodeError) as error:
        return {"CUDA and Triton": f"cannot be told: {getattr(error, 'stderr', '') or error}"}
    return {kind: why for kind, why in found.items() if why}


@dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
        python: the Python that has the package; None where it could not be built.
        error: of the compiler, where the package was built without the CUDA kernels, or not at all.
        pip: why pip installed nothing, where the package was built in place.
        more: what the environment needs for Python to find the package then.
    """

    python: str | None
    error: str = ""
    pip: str = ""
    more: Mapping[str, str] = field(default_factory=dict)


def install(archs: str, run: Run, folder: Path = FOLDER) -> Built:
    """Build the package from the present sources; where that fails, without the CUDA kernels, so
    that one file that does not compile costs one backend and not the whole run. By pip, and where
    that installs nothing, in place.

    Args:
        run: as `Run`. A build that is out of time is given up: its objects are kept, and the next
            run goes on with them.
    """
    nvcc = os.environ.get("CUDA_HOME") or cuda_tool("nvcc") or ""
    wanted = {"sources": fingerprint("build"), "archs": archs, "with": sys.executable}
    wanted["nvcc"] = nvcc  # what failed without one is tried again when there is one
    stamp = folder / "stamp.json"
    if (built := _stamped(stamp, wanted)) is not None:
        return built
    own = folder / "venv" / "bin" / "python"
    here, error, pip = sys.executable, "", ""
    for with_cuda, python, in_place in (
        *((with_cuda, python, False) for with_cuda in (True, False) for python in (here, str(own))),
        *((with_cuda, here, True) for with_cuda in (True, False)),
    ):
        if python == str(own) and not _environment(own):
            continue
        if in_place and with_cuda:
            error, pip = "", error  # the compiler's, if it is that, is told once more
        # Unless it is told that it must, setup.py leaves the kernels out where it finds no nvcc.
        building = {"SPEFT_BUILD_CUDA": str(int(with_cuda))}
        if with_cuda:
            building["SPEFT_CUDA_ARCHS"] = archs
        ended, said = run(_in_place() if in_place else _by_pip(python), building)
        more = _found_by_path(folder / "path") if in_place else {}
        refused = import_error(python, with_cuda=with_cuda, more=more) if ended == 0 else ""
        if ended == 0 and not refused:
            if error:
                _remove_older_kernels()
            built = Built(python, error, pip, more)
            folder.mkdir(parents=True, exist_ok=True)
            stamp.write_text(json.dumps({**wanted, **asdict(built)}), "utf-8")
            return built
        if ended is None:
            return Built(None, "out of time; what was compiled is kept for the next run")
        error = error or refused or _errors(said) or f"it ended with {ended}"
    return Built(None, error)


def _by_pip(python: str) -> list[str]:
    # pip serves another environment than its own: that one needs none.
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    return [*pip, "--no-build-isolation", "--no-deps", "--no-input", "--no-index", "-e", str(ROOT)]


def _in_place() -> list[str]:
    return [sys.executable, str(ROOT / "setup.py"), "build_ext", "--inplace"]


def _found_by_path(folder: Path) -> dict[str, str]:
    """What the environment needs for Python to find the package in its repository."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _FINDER.format(folder=str(ROOT / "triton_kernels"), here=str(folder))
    (folder / "sitecustomize.py").write_text(text, "utf-8")
    before = os.environ.get("PYTHONPATH")
    paths = [str(folder), str(ROOT), *([before] if before else [])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


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
    known = {one.name: kept.pop(one.name) for one in fields(Built) if one.name in kept}
    built = Built(**{"python": None, **known})
    if kept != wanted or not built.python:
        return None
    refused = import_error(built.python, with_cuda=not built.error, more=built.more)
    return None if refused else built


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
