"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 20  # lines of a whole run where there is no terminal
_SILENCE = 60.0  # seconds after which there is one more line


class Display:
    """Shows steps and evaluations on `console`; by default on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self, total: int, done: int) -> None:
        self._total, self._first = total, done
        self._started = self._spoken = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=total, completed=done, state="")
            self._bar.start()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        state = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=state)
            return
        now = time.monotonic()
        milestone = step % max(1, self._total // _LINES) == 0 or step == self._total
        if milestone or now - self._spoken > _SILENCE:
            self._spoken = now
            left = (now - self._started) / (step - self._first) * (self._total - step)
            self.note(f"step {step}/{self._total}  {state}  {duration(left)} left")

    def evaluated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.note(f"step {step}: eval {shown}{'  (best so far)' if best else ''}")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
