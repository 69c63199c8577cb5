"""Paths as users name them; reading JSON of unknown origin; writing files so that a reader, or a
crash, never meets half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

from .atomic import check_creatable, new_folder
from .errors import ConfigError, OutputError, SpeftError

# Bytes that file systems take: of a name, and of a path on Linux less what a run adds to its own.
NAME_LIMIT, PATH_LIMIT = 255, 4096 - 256

# A study of a thousand runs needs a megabyte, a list of a million labels all of it.
_LARGEST_JSON = 64 * 2**20


def path_of(name: str, value: str) -> Path:
    """`value` with its `~` expanded. Raises ConfigError for what no file can be called."""
    try:
        path = Path(value).expanduser()
        if "\0" in value:
            raise ValueError("it holds a null byte")
        longest = max((len(part.encode()) for part in path.parts), default=0)
        if longest > NAME_LIMIT or len(str(path).encode()) > PATH_LIMIT:
            raise ValueError(
                f"it is too long (a name takes {NAME_LIMIT} bytes, the whole {PATH_LIMIT})"
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{name} = {value[:120]!r} is no path: {error}") from error
    return path


def check_output(output: Path) -> None:
    """Raises ConfigError when the folder exists or cannot be made: before the work, not after."""
    try:
        if output.exists():
            raise ConfigError(f"output {output} exists already; choose another --output")
        check_creatable(output)
    except OSError as error:
        raise ConfigError(
            f"output {output} cannot be written: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def new_output(output: Path) -> Iterator[Path]:
    """`new_folder` for what the user named, where there is nothing yet; raises OutputError when it
    cannot be written.
    """
    with writing(output), new_folder(output, replace=False) as draft:
        yield draft


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises OutputError, which names `path`, where the block fails as it cannot write.

    Libraries have errors of their own for it: torch's comes from the system's, safetensors' has its
    text. An OutputError names a part of `path`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SpeftError) and not isinstance(error, OutputError):
            raise
        from safetensors import SafetensorError  # here, as a GPU's check runs without it

        reason: BaseException | None = error
        while isinstance(reason, OutputError) or not isinstance(
            reason, (OSError, SafetensorError, NoneType)
        ):
            reason = reason.__context__
        if reason is None:
            raise
        said = getattr(reason, "strerror", None) or reason
        raise OutputError(f"{path} cannot be written: {said}") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for one process. Raises ConfigError if another one holds it.

    The lock is on the folder itself, so it leaves no file.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor):
            raise ConfigError(
                f"another process is writing to {folder}; wait for it, or choose another --output"
            )
        yield
    finally:
        os.close(descriptor)


def lock(file: BinaryIO | int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False where another process holds it.

    Some network file systems have no locks; there it goes on without one.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def lock_file(path: Path) -> BinaryIO:
    """Open a file that is there for its lock, made where it is missing. Raises OSError.

    A folder may come from somebody else: a link is not followed, what a file holds stays, and a
    pipe, which opens at once for both directions, is not waited for.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    return open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, flags, 0o666))


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; on success it is on the disk and takes `path`'s place.

    Raises OutputError when it cannot be written; `path` is as it was.
    """
    if path.exists() and not path.is_file():  # a device would become a file for all
        raise OutputError(f"{path} is no file, so it is not replaced by one")
    with writing(path):
        temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(handle).st_mode & 0o777
        os.close(handle)
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            # safetensors puts another file there, which nobody but its owner may read.
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def read_text(path: Path, largest: int, error: type[SpeftError] = ConfigError) -> str:
    """The text of a file of `largest` bytes at most. Raises `error`, which names the file."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise error(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if path.stat().st_size > largest:
            raise error(f"{path}: larger than {largest} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path}: damaged: not UTF-8: {reason}") from reason


def read_json(path: Path, error: type[SpeftError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file. Raises `error`, which names the file."""
    text = read_text(path, _LARGEST_JSON, error)
    try:
        content = json.loads(text)
    except RecursionError:
        raise error(f"{path}: damaged: it is nested too deeply") from None
    except ValueError as reason:
        raise error(f"{path}: damaged: not JSON: {reason}") from reason
    if not isinstance(content, dict):
        raise error(f"{path}: damaged: it must hold an object")
    return content


def json_bytes(content: Any, indent: int | None = None) -> bytes:
    """JSON as UTF-8, letters as they are; halves of surrogate pairs, which UTF-8 does not hold and
    JSON's escapes can say, stay such escapes.
    """
    return json.dumps(content, indent=indent, ensure_ascii=False).encode(
        "utf-8", "backslashreplace"
    )


def write_json(path: Path, content: Any) -> None:
    with replaced(path) as temporary:
        temporary.write_bytes(json_bytes(content, indent=2) + b"\n")
