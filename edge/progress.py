"""What a person sees while a run goes on: a live display on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from typing import Protocol

__all__ = ["Console", "Progress", "Silent"]

_PLAIN_EVERY_S = 5.0


class Progress(Protocol):
    """Where stages report to."""

    def begin(self, stage: str, total: int) -> None:
        """A stage of `total` steps begins."""
        ...

    def step(self, done: int, text: str) -> None:
        """So many steps are done."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def end(self, text: str) -> None:
        """The stage is over."""
        ...


class Silent:
    """Reports to nobody."""

    def begin(self, stage: str, total: int) -> None:
        """Ignored."""

    def step(self, done: int, text: str) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""

    def end(self, text: str) -> None:
        """Ignored."""


class Console:
    """Reports to stderr: rich on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole

        self._console = RichConsole(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._stage, self._total, self._started, self._spoken = "", 0, 0.0, 0.0
        self._bar: object | None = None

    def begin(self, stage: str, total: int) -> None:
        """Starts a bar, or says that the stage begins."""
        self._stage, self._total = stage, total
        self._started = self._spoken = time.monotonic()
        if not self._live:
            self._line(f"{stage} ...")
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
        )
        self._task = bar.add_task(stage, total=total, text="")
        bar.start()
        self._bar = bar

    def step(self, done: int, text: str) -> None:
        """Moves the bar; elsewhere a line every five seconds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)  # type: ignore[attr-defined]  # rich is imported late
        elif time.monotonic() - self._spoken >= _PLAIN_EVERY_S:
            self._spoken = time.monotonic()
            self._line(f"{self._stage} {done}/{self._total} {text}")

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._line(f"note: {text}")

    def end(self, text: str) -> None:
        """Replaces the bar by one line."""
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]  # as above
            self._bar = None
        took = time.monotonic() - self._started
        self._line(f"{self._stage:<9} {text} ({took:.1f} s)")

    def stop(self) -> None:
        """Takes the bar away, whatever happened."""
        if self._bar is not None:
            self._bar.stop()  # type: ignore[attr-defined]  # as above
            self._bar = None

    def _line(self, text: str) -> None:
        if self._live:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
