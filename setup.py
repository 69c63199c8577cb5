"""Compile the kernels with ninja; everything static about the package lives in pyproject.toml.

The kernels see raw pointers, never a torch header: torch is no build requirement, and one binary
serves every torch release.

Environment:
    CXX, CXXFLAGS, LDFLAGS   compiler (default: g++, c++, clang++) and flags added to our own
    MAX_JOBS                 how many files compile at a time (default: ninja decides)
    SPEFT_BUILD_CUDA         1: csrc/cuda must be built; 0: never; unset: where nvcc is found
    SPEFT_CUDA_ARCHS         CUDA targets, for example "80;90a" or "90+PTX" (default: the GPUs that
                             are here, else 80, 90a and 100a)
    SPEFT_BUILD_CUDA_HOST    1: the CUDA kernels' sources are also compiled for the CPU, for tests
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent

# No -march=native: a wheel must run elsewhere, so hot loops are multiversioned in the source.
# No -ffast-math: it would break the NaN checks and the numbers contract.
# -Wno-psabi: SIMD vectors pass only between functions that are inlined into one file.
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--compiler-options", "-fPIC,-fvisibility=hidden"]
DEFAULT_CUDA_ARCHS = "80+PTX;90a;100a"
HOST_MODULE = "_cuda_host"


def find_cxx() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of g++, c++ and clang++ on PATH.

    g++ comes first because its OpenMP runtime has the soname of the one that torch bundles,
    libgomp.so.1: the loader gives both the copy already in the process, with one pool of threads.
    clang would bring libomp as a second pool.
    """
    requested = shlex.split(os.environ.get("CXX", ""))
    for command in [requested] if requested else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    tried = f"CXX={shlex.join(requested)}" if requested else "g++, c++, clang++"
    raise PlatformError(
        f"no C++17 compiler found (tried {tried}). Install one (Debian/Ubuntu: apt install g++; "
        "Fedora: dnf install gcc-c++; macOS: xcode-select --install) or set CXX to its path."
    )


def find_ninja() -> str:
    """The ninja of the PyPI package, as in pip's isolated build environment, else PATH's."""
    if importlib.util.find_spec("ninja"):
        from ninja import BIN_DIR

        if found := shutil.which("ninja", path=BIN_DIR):
            return found
    if found := shutil.which("ninja"):
        return found
    raise PlatformError("ninja not found. Install it: pip install ninja")


def find_nvcc() -> str | None:
    """The nvcc of $CUDA_HOME, of PATH or of /usr/local/cuda; None without one."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def openmp_flags(cxx: Sequence[str]) -> list[str]:
    """Flags that switch OpenMP on; none on macOS where the compiler lacks it, as Apple's does."""
    if sys.platform != "darwin":
        return ["-fopenmp"]
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    probe = [*cxx, "-fopenmp", "-x", "c++", "-", "-o", os.devnull]
    if subprocess.run(probe, input=program, text=True, capture_output=True).returncode == 0:
        return ["-fopenmp"]
    warnings.warn(
        f"{shlex.join(cxx)} has no OpenMP, so the CPU kernels will run on one thread. "
        "For all cores: brew install gcc, and set CXX to its g++.",
        stacklevel=2,
    )
    return ["-Wno-unknown-pragmas"]


def present_archs() -> list[str]:
    """The targets of the GPUs in this machine, as nvidia-smi names them; none without it."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            text=True,
            capture_output=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    numbers = {line.strip().replace(".", "") for line in listing.stdout.splitlines()}
    # From 90 on the matrix units are reached through targets of one architecture alone.
    return sorted(n + "a" * (int(n) >= 90) for n in numbers if n.isdecimal())


def cuda_arch_flags(nvcc: str) -> list[str]:
    """The -gencode flags for $SPEFT_CUDA_ARCHS, else for the default targets this nvcc knows."""
    requested = os.environ.get("SPEFT_CUDA_ARCHS", "") or ";".join(present_archs())
    archs = [arch.strip() for arch in (requested or DEFAULT_CUDA_ARCHS).split(";")]
    if not requested:
        listing = subprocess.run([nvcc, "--list-gpu-code"], text=True, capture_output=True)
        known = listing.stdout.split()
        archs = [a for a in archs if f"sm_{a.removesuffix('+PTX').rstrip('a')}" in known]
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def include_flags() -> list[str]:
    """Headers of Python and pybind11, as system headers: -Wall is for our own code."""
    import pybind11

    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise PlatformError(
            f"Python's C headers are missing ({python / 'Python.h'}). Install them "
            "(Debian/Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
        )
    return ["-isystem", str(python), "-isystem", pybind11.get_include()]


def ninja_file(targets: dict[str, list[Path]], includes: Sequence[str]) -> str:
    """The text of a build.ninja that links each target (a file name) from its sources.

    Every object records the headers it read, so a changed header rebuilds exactly its readers. The
    target of the module HOST_MODULE gets its CUDA files from the C++ compiler.
    """
    cxx = find_cxx()
    openmp = openmp_flags(cxx)
    mac = sys.platform == "darwin"
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared"]
    # The user's flags come last, so that CXXFLAGS="-O1 -g -fsanitize=address" overrides -O3.
    cxxflags = [*CXX_FLAGS, *openmp, *includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    ldflags = [*openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        "ninja_required_version = 1.5",
        *compile_rule("cpp", [*cxx, *cxxflags]),
        *link_rule("cpp", [*cxx, *shared], ldflags),
    ]
    modules = {target.split(".")[0]: sources for target, sources in targets.items()}
    if HOST_MODULE in modules:
        lines += compile_rule("host", [*cxx, *cxxflags, "-DSPEFT_ON_HOST", "-x", "c++"])
    if any(
        source.suffix == ".cu" and module != HOST_MODULE
        for module, sources in modules.items()
        for source in sources
    ):
        nvcc = find_nvcc() or "nvcc"
        lines += compile_rule("cu", [nvcc, *NVCC_FLAGS, *includes, *cuda_arch_flags(nvcc)])
        lines += link_rule("cu", [nvcc, "-shared", "-cudart", "static"], [])
    for target, sources in targets.items():
        module = target.split(".")[0]
        objects, languages = [], set()
        for source in sources:
            language = "host" if module == HOST_MODULE else source.suffix[1:]
            languages.add(language)
            objects.append(ninja_path(f"{module}/{source.parent.name}/{source.name}.o"))
            lines.append(f"build {objects[-1]}: {language} {ninja_path(str(source))}")
        linker = "cu" if "cu" in languages else "cpp"
        lines.append(f"build {ninja_path(target)}: link_{linker} {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compile_rule(language: str, command: Sequence[str]) -> list[str]:
    return [
        f"rule {language}",
        f"  command = {ninja_command(command)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
    ]


def link_rule(language: str, command: Sequence[str], flags: Sequence[str]) -> list[str]:
    return [
        f"rule link_{language}",
        f"  command = {ninja_command(command)} $in {ninja_command(flags)} -o $out",
        "  description = link $out",
    ]


def ninja_command(arguments: Sequence[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def ninja_path(path: str) -> str:
    return "".join(f"${char}" if char in "$ :" else char for char in path)


def run_ninja(text: str, folder: Path) -> None:
    """Bring the targets up to date in `folder`, which keeps the objects for the next build."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([find_ninja(), *jobs], cwd=folder).returncode != 0:
        hint = "; SPEFT_BUILD_CUDA=0 leaves the CUDA kernels out" if "rule cu\n" in text else ""
        raise CompileError(f"the kernels did not compile: see the compiler's message above{hint}")


class NinjaBuildExt(build_ext):
    """build_ext on ninja: files compile in parallel, and only those that changed."""

    def build_extensions(self) -> None:
        if sys.platform == "win32":
            raise PlatformError("building on Windows is not supported: build inside WSL 2")
        # Not self.build_temp: an editable install throws that folder away after each build.
        folder = ROOT / "build" / f"ninja.{self.plat_name}.{sys.implementation.cache_tag}"
        targets = {
            Path(self.get_ext_filename(ext.name)).name: [ROOT / source for source in ext.sources]
            for ext in self.extensions
        }
        run_ninja(ninja_file(targets, include_flags()), folder)
        for ext, target in zip(self.extensions, targets, strict=True):
            destination = Path(self.get_ext_fullpath(ext.name))
            self.mkpath(str(destination.parent))
            self.copy_file(str(folder / target), str(destination))


def find_sources(folder: str, pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern))


def find_extensions() -> list[Extension]:
    """`_C`, `_cuda` where nvcc is there to compile it, and `_cuda_host` where it is asked for."""
    found = [Extension("speft_kernels._C", ["csrc/module.cpp", *find_sources("csrc/cpu", "*.cpp")])]
    wanted = os.environ.get("SPEFT_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise PlatformError(f"SPEFT_BUILD_CUDA={wanted} is neither 0 nor 1")
    nvcc = find_nvcc()
    if wanted == "1" and nvcc is None:
        raise PlatformError(
            "SPEFT_BUILD_CUDA=1, but there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda. "
            "Install the CUDA toolkit, set CUDA_HOME, or unset SPEFT_BUILD_CUDA."
        )
    kernels = ["csrc/cuda_module.cpp", *find_sources("csrc/cuda", "*.cu")]
    if nvcc and wanted != "0":
        found.append(Extension("speft_kernels._cuda", kernels))
    if os.environ.get("SPEFT_BUILD_CUDA_HOST") == "1":
        sources = [*kernels, *find_sources("csrc/cuda/host", "*.cpp")]
        found.append(Extension(f"speft_kernels.{HOST_MODULE}", sources))
    return found


if __name__ == "__main__":
    setup(
        # triton_kernels/ is installed inside the package: a top-level module of that name would
        # shadow the one that Triton's own project ships.
        packages=[*find_packages(include=["speft_kernels*"]), "speft_kernels.triton_kernels"],
        package_dir={"speft_kernels.triton_kernels": "triton_kernels"},
        ext_modules=find_extensions(),
        cmdclass={"build_ext": NinjaBuildExt},
    )
