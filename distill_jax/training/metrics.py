"""Metrics of a run: JSON lines for programs, TensorBoard for people."""

import json
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
from etils import epath

from distill_jax import artifacts


class MetricsWriter:
    """Writes one line a step to `metrics.jsonl` and the same figures to TensorBoard.

    Lines after `first_step`, left by a run that went on past its last checkpoint, are dropped, so
    that every step stands once. Only process 0 writes.
    """

    def __init__(self, directory: str | os.PathLike[str], first_step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        import tensorboardX  # late: it imports PyTorch where that is installed, for seconds

        place = epath.Path(directory)
        path = place / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        artifacts.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(place / "tensorboard"), purge_step=first_step + 1, write_to_disk=True
        )

    def write(self, step: int, tokens: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Fetches and writes the metrics of one step; `tokens` counts all seen so far.

        Raises:
          FloatingPointError: the loss or the gradient is not finite.
        """
        figures = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(figures[name]):
                raise FloatingPointError(
                    f"{name} is {figures[name]} at step {step}: lower the learning rate, or look "
                    f"for bad targets; the last checkpoint before it is kept"
                )
        if self._active:
            self._file.write(json.dumps({"step": step, "tokens": tokens, **figures}) + "\n")
            self._file.flush()
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
        return figures

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active:
            self._file.close()
            self._board.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line torn by a kill is left out."""
    place = epath.Path(path)
    if not place.exists():
        return []
    text = place.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]
