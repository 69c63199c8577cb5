"""Stopping a run cleanly on Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted(Exception):  # noqa: N818 -- what the user asked for is no error
    """A run was stopped by a signal; it can be resumed in `folder`, None if nothing was trained."""

    def __init__(self, signum: int, folder: Path | None) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.folder = folder


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM is only noted; a second one acts at once.

    Outside the main thread, where Python allows no handlers, nothing is installed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.received is not None:
            raise Interrupted(self.received, None)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
