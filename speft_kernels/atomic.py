"""Writing a folder so that, whatever happens, either the old one or the whole new one is there."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def new_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty folder to write into, which becomes `folder` when the block ends well.

    With `replace` it takes the place of a folder that exists. It lies beside `folder`, on the same
    file system. What was written is on the disk before it is moved. When the block fails, `folder`
    is as it was.

    Raises:
        OSError: the disk is full, a folder may not be written to, and so on; without `replace`,
            another process has put something into `folder` meanwhile.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = _make_draft(folder, folder.parent)
    try:
        yield draft
        for path in sorted(draft.rglob("*")):
            _flush(path)
        _flush(draft)
        if replace and folder.exists():
            _replace(draft, folder)
        else:
            os.replace(draft, folder)  # takes the place of an empty folder at most
        _flush(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_creatable(folder: Path) -> None:
    """Find out, before the work that is to end in `folder`, whether it can be made; leaves nothing.

    Raises:
        OSError: it lies below a file, in a folder that may not be written to, and so on.
    """
    folder = Path(os.path.realpath(folder))
    ancestor = next(parent for parent in folder.parents if parent.exists())
    # Tried out: by their permissions root may write to all folders, and cannot to those of /proc.
    _make_draft(folder, ancestor).rmdir()


def _make_draft(folder: Path, parent: Path) -> Path:
    draft = parent / f".{folder.name}.{secrets.token_hex(6)}.tmp"
    draft.mkdir()
    return draft


def _replace(draft: Path, folder: Path) -> None:
    """Put `draft` in the place of `folder`; the old contents end up in `draft`, or nowhere."""
    if _exchange(draft, folder):
        return
    # Without an atomic exchange there is a moment in which only the old folder's other name exists.
    old = draft.with_suffix(".old")
    os.replace(folder, old)
    try:
        os.replace(draft, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a libc without it
        return False
    paths = os.fsencode(first), os.fsencode(second)
    done = renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE))
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
