"""One run of a study in a process of its own, which is stopped as a run is: with a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from ..errors import SalienceError, SpeftError
from ..files import lock, lock_file
from ..finetune.config import RunConfig
from ..finetune.folder import RunFolder


class Failure(NamedTuple):
    """Why a run failed, and whether it would again: its loss or its scores are no numbers."""

    reason: str
    settled: bool = False


class Worker:
    """A started run. `sentinel` becomes ready when it ends, however it ends.

    That is its answer, or the end of the pipe: a pipe takes 64 KiB until somebody reads, so a
    process with a long reason would not end before.
    """

    def __init__(self, config: RunConfig, *, threads: int, slot: int) -> None:
        self.slot = slot
        context = multiprocessing.get_context("spawn")
        self._answer, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_main, args=(config, threads, slot, answer))
        self._process.start()
        answer.close()  # so that the end of the process is the end of the pipe
        self.sentinel = self._answer

    def stop(self) -> None:
        """Ask it to leave a checkpoint and end."""
        self._process.terminate()

    def failure(self) -> Failure | None:
        """Wait for its end; return why it failed, or None."""
        try:
            answer: Failure | None = self._answer.recv()
            self._process.join()
            return answer
        except EOFError:
            self._process.join()
        reason, code = "its process died", self._process.exitcode
        if code is not None and code < 0:
            reason += f" of {signal.Signals(-code).name} (a lack of memory is a frequent cause)"
        return Failure(reason)


def _main(config: RunConfig, threads: int, slot: int, answer: Connection) -> None:
    # Ctrl-C reaches the study alone, which stops its runs in their own way.
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        execute(config, threads=threads, slot=slot)
    except SpeftError as error:
        from ..finetune.loop import TrainingError

        settled = isinstance(error, TrainingError | SalienceError)
        answer.send(Failure(" ".join(str(error).split()), settled))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        answer.send(Failure(reason))
    else:
        answer.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def execute(config: RunConfig, *, threads: int, slot: int) -> None:
    """The run, from its checkpoint if it has one.

    Args:
        threads: of torch.
        slot: which of the runs side by side it is; on a machine with GPUs it takes one by that.
    """
    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{slot % torch.cuda.device_count()}"
    from ..finetune.run import finetune

    folder = Path(config.output)
    with lock_file(run_lock(folder.parent)) as file:
        lock(file, shared=True, wait=True)
        resume = RunFolder(folder).state.exists()
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # it stopped before its first checkpoint
        finetune(config, resume=resume)


def run_lock(runs: Path) -> Path:
    """The file that a run holds a shared lock of, as long as it writes into `runs`."""
    return runs / ".lock"
