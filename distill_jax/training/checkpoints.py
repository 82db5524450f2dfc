"""Checkpoints of a run in progress: everything needed to go on with the same bits."""

import os
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from distill_jax.training.step import TrainState


class Checkpoints:
    """Saves the training state and the position in the data, asynchronously; keeps the newest.

    Both can be read back by any number of processes and devices: an iterator's position counts
    batches of all processes, so it is the same on each.

    Randomness needs no slot of its own: everything random in a run is a function of its seed and
    of the step, and both are here.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._manager = ocp.CheckpointManager(
            epath.Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True),
        )

    def restore(self, like: TrainState, batches: Any) -> TrainState | None:
        """The newest state, and `batches` moved to its position; None if nothing was saved.

        Args:
          like: shapes, types and shardings of the state, as ShapeDtypeStructs.
          batches: the data iterator, which is moved in place.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like),
                data=ocp.args.JsonRestore(),
            ),
        )
        batches.set_state(found["data"])
        return found["state"]

    def save(self, step: int, state: TrainState, batches: Any, *, wait: bool = False) -> None:
        """Starts saving; returns once the state may be overwritten, or with `wait` once it ended.

        Of `batches`, the data iterator, the position is kept.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(batches.get_state()),
            ),
        )
        if wait:
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
