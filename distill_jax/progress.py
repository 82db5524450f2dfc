"""One progress bar for everything that takes longer than a few seconds."""

import contextlib
import sys
import time
from collections.abc import Iterator

import rich.console
import rich.progress

_PLAIN_INTERVAL_S = 15.0


class Bar:
    """Progress of one stage; made by `bar`. Of several processes the first alone shows it."""

    def __init__(self, stage: str, total: int, unit: str, done: int):
        self._stage, self._total, self._unit = stage, total, unit
        self._console = rich.console.Console(file=sys.stderr)
        self._first = self._done = done
        self._tokens = 0
        self._start = self._printed = time.monotonic()
        self._rich: rich.progress.Progress | None = None
        jax = sys.modules.get("jax")  # who never imported it is no process of several
        self._silent = bool(jax and jax.distributed.is_initialized() and jax.process_index() > 0)
        if self._console.is_terminal and not self._silent:
            self._rich = rich.progress.Progress(
                rich.progress.TextColumn("[bold]{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[unit]} {task.fields[figures]}"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._rich.add_task(
                stage, total=total, completed=done, unit=unit, figures=""
            )
            self._rich.start()

    def advance(self, count: int = 1, *, tokens: int = 0, note: str = "") -> None:
        """Counts `count` units done, and the tokens that they held; `note` is shown beside."""
        self._done += count
        self._tokens += tokens
        elapsed = max(time.monotonic() - self._start, 1e-9)
        figures = f"{self._tokens / elapsed:,.0f} tokens/s {note}" if self._tokens else note
        if self._rich is not None:
            self._rich.update(self._task, advance=count, figures=figures)
        elif time.monotonic() - self._printed > _PLAIN_INTERVAL_S and not self._silent:
            self._printed = time.monotonic()
            rate = max(self._done - self._first, 1) / elapsed
            left = (self._total - self._done) / rate
            print(
                f"{self._stage}: {self._done}/{self._total} {self._unit} {figures} "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back."""
        if self._rich is not None:
            self._rich.stop()


@contextlib.contextmanager
def bar(stage: str, total: int, *, unit: str = "steps", done: int = 0) -> Iterator[Bar]:
    """A bar that shows stage, units done, tokens/s and time left.

    On a terminal it is drawn in place; elsewhere a plain line is printed now and then.

    Args:
      stage: what is going on.
      total: how many units there are.
      unit: what is counted: steps, rows, prompts.
      done: units that an earlier, interrupted run did already.
    """
    shown = Bar(stage, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()
