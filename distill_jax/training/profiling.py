"""A trace of some steps of a run, for XProf."""

import re
import sys
from types import TracebackType
from typing import Any

import jax
from etils import epath

from distill_jax import parallel
from distill_jax.artifacts import InputError


def parse_steps(text: str) -> tuple[int, int]:
    """The first and the last step of a text such as "10:13", or "10" for one.

    Raises:
      InputError: it is no such text.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise InputError(f"--profile {text}: write the first and the last step, such as 10:13")
    return first, last


class Profiler:
    """Traces steps on process 0, whose devices do what all do.

    The trace goes to `directory`/profile, in the form that XProf and TensorBoard read. It has the
    steps whole and nothing of others: devices are waited for before and after.

    Args:
      steps: the first and the last; None for none.
      directory: of the run.
      name: the stage, for messages.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: epath.Path, name: str):
        self._first, self._last = steps or (0, 0)
        self._active = steps is not None and parallel.is_main()
        self._place, self._name = directory / "profile", name
        self._running = self._done = False

    def before(self, step: int, state: Any) -> None:
        """Starts the trace if `step`, which has not begun, is the first, or later than it."""
        idle = self._active and not self._running and not self._done
        if idle and self._first <= step <= self._last:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            # Calls of Python would slow the very steps that are measured, and fill the trace.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._place), profiler_options=options)
            self._running = True

    def annotated(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """A block that the trace, if there is one, shows as this step."""
        return jax.profiler.StepTraceAnnotation(self._name, step_num=step)

    def after(self, step: int, state: Any) -> None:
        """Ends the trace if `step`, which has been dispatched, is the last."""
        if self._running and step >= self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._done = False, True
        print(f"{self._name}: trace in {self._place}", file=sys.stderr)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:
            self._stop()
        elif self._active and not self._done and kind is None:
            print(
                f"{self._name}: no trace, none of the steps {self._first}:{self._last} was done",
                file=sys.stderr,
            )
