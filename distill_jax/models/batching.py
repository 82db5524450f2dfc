"""Which text is written in which row, and when: continuous batching (Orca, Yu et al. 2022).

A fixed number of rows is written side by side. When some have ended, waiting texts take their
place; texts with the same prompt share one reading of it. Every size that a program is compiled
for comes from a short list, so that a few programs serve requests of all lengths.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from distill_jax.models import decode_step, decoding
from distill_jax.models.llama import Model, Params
from distill_jax.models.sampling import Sampling

_ROOM_AT_FIRST = 4 * decoding.STEPS
_READ_TOKENS = 1024  # so many that a product costs more than moving its weights


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one text has gained.

    Attributes:
      text: which.
      tokens: new ids.
      log_probs_MT: of these under each model.
    """

    text: int
    tokens: list[int]
    log_probs_MT: np.ndarray


@dataclasses.dataclass
class _Row:
    """The text that is being written in a row.

    Attributes:
      text: which.
      held: tokens in the cache.
      left: how many more may come.
    """

    text: int
    held: int
    left: int


@dataclasses.dataclass
class _Read:
    """Prompts on the devices, and the texts (prompt among these, text) that are to begin there."""

    prompts: decoding.Prompts
    slots: int
    waiting: collections.deque[tuple[int, int]]
    lengths: Sequence[int]


class Batch:
    """Texts that are written at the same time."""

    def __init__(
        self,
        setup: decoding.Setup,
        params: tuple[Params, ...],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        stop_ids: Sequence[int],
        limit: int,
        most_rows: int,
    ):
        self._setup, self._params = setup, params
        self._weights = decoding.arrange(setup, params)
        self._prompts, self._seeds, self._limit = prompts, seeds, limit
        self._stops = frozenset(stop_ids)
        self._stop_ids = jnp.asarray(tuple(stop_ids) or (-1,), jnp.int32)
        # Prompts of about the same length waste the least padding.
        groups = _texts_by_prompt(prompts)
        self._groups = collections.deque(sorted(groups, key=lambda group: len(group[0])))
        count = row_count(len(prompts), most_rows, setup.rows)
        self._rows: list[_Row | None] = [None] * count
        self._read: _Read | None = None
        # Made with the first prompts, whose length it is to hold.
        self._state: Any = None
        self._slots = self._slot = 0

    def write(self, steps: int = decoding.STEPS) -> Iterator[Piece]:
        """Writes all texts; `steps` is how many tokens a row gains before they are handed out."""
        while self._groups or self._read or any(self._rows):
            while None in self._rows and (self._groups or self._read):
                yield from self._admit()
            if any(self._rows):
                yield from self._extend(steps)

    def _admit(self) -> Iterator[Piece]:
        """Begins as many of the texts whose prompts have been read as there are free rows."""
        read = self._read = self._read or self._read_prompts()
        source = np.full(len(self._rows), -1, np.int32)
        seeds = np.zeros(len(self._rows), np.uint32)
        for index, row in enumerate(self._rows):
            if row is None and read.waiting:
                source[index], text = read.waiting.popleft()
                seeds[index] = self._seeds[text]
                self._rows[index] = _Row(text, read.lengths[source[index]] - 1, self._limit)
        if not read.waiting:
            self._read = None
        self._make_room(read.slots, 0)
        self._state, written = decoding.admit(
            self._setup,
            self._state,
            read.prompts,
            self._slot,
            self._put(source),
            self._put(seeds),
            self._stop_ids,
            self._limit,
        )
        yield from self._note(written)

    def _extend(self, steps: int) -> Iterator[Piece]:
        rows = [row for row in self._rows if row]
        steps = min(steps, decoding.STEPS, max(row.left for row in rows))
        self._make_room(max(row.held for row in rows), steps)
        # Rows stand idle until they are admitted, and reading prompts for few of them at a time
        # costs too: a compromise, and none when nothing waits.
        waits = bool(self._groups or self._read)
        enough = max(len(self._rows) // 8, 1) if waits else len(self._rows)
        self._state, written, taken = decoding.extend(
            self._setup,
            self._weights,
            self._state,
            self._slot,
            self._stop_ids,
            self._limit,
            steps,
            enough,
        )
        self._slot += int(taken)
        yield from self._note(written)

    def _note(self, written: decoding.Written) -> Iterator[Piece]:
        """Hands out what was written, and frees the rows whose texts have ended."""
        token_RT, log_prob_MRT = _to_host(written)
        for index, row in enumerate(self._rows):
            count = int(np.sum(token_RT[index] >= 0))
            if row is None or not count:
                continue
            tokens = token_RT[index, :count].tolist()
            row.held += count
            row.left -= count
            if not row.left or tokens[-1] in self._stops:
                self._rows[index] = None
            yield Piece(row.text, tokens, log_prob_MRT[:, index, :count])

    def _read_prompts(self) -> _Read:
        count = self._read_at_once()
        groups = [self._groups.popleft() for _ in range(min(count, len(self._groups)))]
        lengths = [len(prompt) for prompt, _ in groups]
        slots = prompt_slots(max(lengths))
        prompts_UP = np.zeros((count, slots), np.int32)
        for index, (prompt, _) in enumerate(groups):
            prompts_UP[index, slots - len(prompt) :] = prompt
        length_U = np.zeros(count, np.int32)
        length_U[: len(groups)] = lengths
        prompts = decoding.read(
            self._setup, self._params, self._put(prompts_UP), self._put(length_U)
        )
        texts = ((index, text) for index, (_, texts) in enumerate(groups) for text in texts)
        return _Read(prompts, slots, collections.deque(texts), lengths)

    def _read_at_once(self) -> int:
        lengths = [len(prompt) for prompt, _ in self._groups]
        return read_at_once(len(self._rows), lengths, self._setup.rows)

    def _make_room(self, before: int, after: int) -> None:
        """Sees to it that so many slots lie before the next one, and so many from there on."""
        if self._state is None:
            size = _first_slots(before, self._limit)
            self._state = decoding.empty(self._setup, self._params, len(self._rows), size)
            self._slots, self._slot = size, before
        if before <= self._slot <= self._slots - after:
            return
        held = max((row.held for row in self._rows if row), default=0)
        target = max(before, held)
        size = max(self._slots, _more_slots(target + after))
        self._state = decoding.move(self._setup, self._state, self._slot - target, slots=size)
        self._slots, self._slot = size, target

    def _put(self, array: np.ndarray) -> Array:
        return jax.device_put(array, self._setup.rows)


def make_setup(
    models: Sequence[Model],
    sampling: Sampling,
    teacher_share: float,
    rows: jax.sharding.Sharding | None,
) -> decoding.Setup:
    """What the programs are compiled for.

    Args:
      models: the model that writes, and the teacher if there is one; their parameters may be
        ShapeDtypeStructs with shardings.
      sampling: how tokens are drawn.
      teacher_share: the teacher's part of the mixture.
      rows: how rows are spread over devices.
    """
    return decoding.Setup(
        configs=tuple(one.config for one in models),
        sampling=sampling,
        teacher_share=teacher_share,
        rows=rows,
        caches=tuple(cache_sharding(one, rows) for one in models),
        weights=tuple(decode_step.weights_sharding(one.params) for one in models),
    )


def row_count(texts: int, most: int, sharding: jax.sharding.Sharding | None) -> int:
    """Rows that so many texts are written in, at most about `most`."""
    return _round_up(min(_power_of_two(texts), _power_of_two(most)), _shards(sharding))


def read_at_once(rows: int, lengths: Sequence[int], sharding: jax.sharding.Sharding | None) -> int:
    """How many prompts, of rising lengths, are read for so many rows.

    An eighth of the rows, or more if they have no more than `_READ_TOKENS`, padding too.
    """
    left, count = len(lengths), 1
    while count < min(rows, left):
        longest = lengths[min(2 * count, left) - 1]
        if 2 * count > rows // 8 and 2 * count * prompt_slots(longest) > _READ_TOKENS:
            break
        count *= 2
    return _round_up(count, _shards(sharding))


def cache_slots(prompt: int, limit: int) -> list[int]:
    """Sizes of the cache, rising, while texts of `limit` tokens are written beside one another.

    Args:
      prompt: tokens of their prompts.
      limit: new tokens.
    """
    slot = prompt_slots(prompt)
    sizes, written = [_first_slots(slot, limit)], 1
    while written < limit:
        steps = min(limit - written, decoding.STEPS)
        if slot > sizes[-1] - steps:
            slot = prompt - 1 + written
            sizes.append(max(sizes[-1], _more_slots(slot + steps)))
        slot, written = slot + steps, written + steps
    return sorted(set(sizes))


def _first_slots(prompt: int, limit: int) -> int:
    """With room for whole texts unless they are long, so that one program writes them all."""
    return max(_bucket(prompt + min(limit, _ROOM_AT_FIRST), 32, 4), 128)


def _more_slots(held: int) -> int:
    """With room to spare, so that rows are not moved again at once."""
    return _bucket(held + decoding.STEPS, 64, 2)


def cache_sharding(
    model: Model, rows: jax.sharding.Sharding | None
) -> jax.sharding.NamedSharding | None:
    """Of keys and values [R, K, ., .]: heads as the weights that make them, rows as rows."""
    weight = getattr(model.params["layers"]["attention"]["key"], "sharding", None)
    mesh, axes = None, [None, None]
    for index, (one, axis) in enumerate(((rows, 0), (weight, 2))):
        if isinstance(one, jax.sharding.NamedSharding) and mesh in (None, one.mesh):
            mesh = one.mesh
            axes[index] = (*one.spec, None, None, None)[axis]
    return None if mesh is None else jax.sharding.NamedSharding(mesh, jax.P(*axes))


def _texts_by_prompt(prompts: Sequence[Sequence[int]]) -> list[tuple[Sequence[int], list[int]]]:
    """Each different prompt, and the indices at which it stands."""
    texts: dict[tuple[int, ...], list[int]] = {}
    for text, prompt in enumerate(prompts):
        texts.setdefault(tuple(prompt), []).append(text)
    return list(texts.items())


def _shards(sharding: jax.sharding.Sharding | None) -> int:
    """Into how many parts rows are cut."""
    if sharding is None:
        return 1
    return sharding.num_devices // sharding.shard_shape((sharding.num_devices,))[0]


def _power_of_two(size: int) -> int:
    """The first one that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _bucket(size: int, smallest: int, parts: int) -> int:
    """A size of at least `size`, of `parts` for every doubling, in steps of at least `smallest`."""
    return _round_up(size, max(smallest, _power_of_two(size) // (2 * parts)))


def prompt_slots(length: int) -> int:
    """Slots that a prompt is read in."""
    return _bucket(length, 16, 4)


def _to_host(tree: Any) -> Any:
    def fetch(array: Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(fetch, tree)
