"""Sums of every scheme's errors, record after record, kept on disk in between."""

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from calibration import batch_keys, encode, record_bytes
from distributions import BATCH, Batch
from errors import Entry, dense, errors
from etils import epath

from distill_jax import artifacts, teachers

_SUMS = ("error", "gradient", "ids", "bytes")


@dataclasses.dataclass
class Measured:
    """What is known so far of E schemes.

    Attributes:
      settings: how it is measured; "record" tokens at a time.
      entries: the schemes.
      token_counts: of the corpus, by which a store orders its ids, [V].
      sums_UES: of each record's tokens, `_SUMS` of every scheme.
      bias_EV: sum of w - p over all tokens.
      path: where all this is kept, if anywhere.
    """

    settings: Mapping[str, Any]
    entries: list[Entry]
    token_counts: np.ndarray
    sums_UES: list[np.ndarray]
    bias_EV: np.ndarray
    path: pathlib.Path | None

    @classmethod
    def begin(
        cls,
        path: pathlib.Path | None,
        settings: Mapping[str, Any],
        token_counts: np.ndarray,
        make_entries: Callable[[], list[Entry]],
    ) -> "Measured":
        """What the path holds, or nothing yet."""
        if path is None or not path.exists():
            entries = make_entries()
            bias_EV = np.zeros((len(entries), len(token_counts)))
            return cls(settings, entries, token_counts, [], bias_EV, path)
        with np.load(path, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            if changes := artifacts.diff(about["settings"], settings):
                raise artifacts.InputError(f"{path}: measured otherwise ({'; '.join(changes)})")
            entries = [
                Entry(one["group"], teachers.scheme_from_json(one["scheme"]), one["alone"])
                for one in about["entries"]
            ]
            sums, bias_EV = list(kept["sums_UES"]), kept["bias_EV"]
        return cls(settings, entries, token_counts, sums, bias_EV, path)

    @property
    def tokens(self) -> int:
        return len(self.sums_UES) * self.settings["record"]

    def add(self, batches: Iterator[Batch]) -> None:
        """Measures the tokens of one more record."""
        sums_ES = np.zeros((len(self.entries), len(_SUMS)))
        schemes = tuple(dict.fromkeys(entry.scheme for entry in self.entries))
        encoded: dict[teachers.Scheme, list[Mapping[str, np.ndarray]]] = {s: [] for s in schemes}
        for index, batch in enumerate(batches, start=self.tokens // BATCH):
            keys_N = batch_keys(self.settings["seed"], index)
            kept = encode(schemes, batch.teacher_NV, batch.labels_N, keys_N)
            for scheme, arrays in zip(schemes, kept):
                encoded[scheme].append(arrays)
            both = dense(batch.teacher_NV, batch.student_NV)
            for place, entry in enumerate(self.entries):
                arrays = encoded[entry.scheme][-1]
                error_N, gradient_N, bias_V = errors(entry.targets(arrays), both)
                of_token = (error_N, gradient_N, arrays["length"])
                sums_ES[place, :3] += [np.sum(values) for values in of_token]
                self.bias_EV[place] += np.asarray(bias_V, np.float64)
        for place, entry in enumerate(self.entries):
            sums_ES[place, 3] = record_bytes(entry.scheme, encoded[entry.scheme], self.token_counts)
        self.sums_UES.append(sums_ES)
        self._save()

    def rows(self) -> list[dict[str, Any]]:
        """One line for every scheme, means over all tokens."""
        sums_UES = np.stack(self.sums_UES)
        error_UE = sums_UES[..., 0]
        random = {
            entry.group: place
            for place, entry in enumerate(self.entries)
            if isinstance(entry.scheme, teachers.RandomSampling)
        }
        lines = []
        for place, entry in enumerate(self.entries):
            ratio, uncertain = _ratio(error_UE[:, place], error_UE[:, random[entry.group]])
            means = sums_UES[:, place].sum(axis=0) / self.tokens
            lines.append(
                {
                    "group": entry.group,
                    "label": entry.label,
                    "scheme": teachers.scheme_to_json(entry.scheme),
                    "alone": entry.alone,
                    "tokens": self.tokens,
                    **dict(zip(_SUMS, means.tolist())),
                    "mean_error": float(np.square(self.bias_EV[place] / self.tokens).sum()),
                    "of_random": ratio,
                    "of_random_error": uncertain,
                }
            )
        return lines

    def _save(self) -> None:
        if self.path is None:
            return
        entries = [
            {"group": e.group, "scheme": teachers.scheme_to_json(e.scheme), "alone": e.alone}
            for e in self.entries
        ]
        file = io.BytesIO()
        np.savez(
            file,
            about=json.dumps({"settings": dict(self.settings), "entries": entries}),
            sums_UES=np.stack(self.sums_UES),
            bias_EV=self.bias_EV,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_bytes(epath.Path(self.path), file.getvalue())


def _ratio(ours_U: np.ndarray, theirs_U: np.ndarray) -> tuple[float, float | None]:
    """Ratio of two sums, and its standard error by the jackknife; None of a single part."""
    ratio, parts = float(ours_U.sum() / theirs_U.sum()), len(ours_U)
    if parts == 1:
        return ratio, None
    without_U = (ours_U.sum() - ours_U) / (theirs_U.sum() - theirs_U)
    spread = np.square(without_U - without_U.mean()).sum()
    return ratio, math.sqrt((parts - 1) / parts * spread)
