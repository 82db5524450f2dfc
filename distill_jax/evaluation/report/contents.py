"""What a report shows, as plain values: whoever makes a run fills these in.

Dimensions: L layers, H query heads, F mlp, D embed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from distill_jax.artifacts import InputError
from distill_jax.evaluation.next_tokens import NextToken

Kind = Literal["teacher", "pruned", "control", "distilled", "post-trained"]
"""What a model of the table is; it decides its place and colour."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the comparison, trained once or with several seeds.

    Attributes:
      name: what the report calls it.
      kind: its part in the story; decides its colour and which rows compete for "best".
      runs: what `evaluate` says of it, one object a seed, in the order of the seeds. An object may
        carry "task_accuracy" as well: the share of verifiable questions answered rightly.
      note: a few words on what it is.
    """

    name: str
    kind: Kind
    runs: Sequence[Mapping[str, Any]]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError(f"report row {self.name!r} has no runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """What pruning measured and what it kept; scores may have any scale.

    Attributes:
      sizes: (what, before, after), such as ("layers", 30, 20), in the order to show.
      block_influence: [L], how much each layer changes the residual stream.
      heads: [L, H] importance.
      neurons: [L, F] importance.
      channels: [D] importance of the residual stream's channels.
      kept_layers: the layers that stay, ascending.
      kept_heads: the heads that stay, one list for each kept layer.
      kept_neurons: the neurons that stay, one list for each kept layer.
      kept_channels: the channels that stay.
    """

    sizes: Sequence[tuple[str, int, int]]
    block_influence: Sequence[float]
    heads: Sequence[Sequence[float]]
    neurons: Sequence[Sequence[float]]
    channels: Sequence[float]
    kept_layers: Sequence[int]
    kept_heads: Sequence[Sequence[int]]
    kept_neurons: Sequence[Sequence[int]]
    kept_channels: Sequence[int]

    def __post_init__(self) -> None:
        layers = len(self.block_influence)
        for name in ("heads", "neurons"):
            if len(getattr(self, name)) != layers:
                raise InputError(
                    f"Cut.{name} has {len(getattr(self, name))} layers, block_influence {layers}"
                )
        for name in ("kept_heads", "kept_neurons"):
            if len(getattr(self, name)) != len(self.kept_layers):
                raise InputError(
                    f"Cut.{name} has {len(getattr(self, name))} lists for "
                    f"{len(self.kept_layers)} kept layers"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """How one model learnt, once or with several seeds; `read_curve` makes it from files.

    Attributes:
      name: the row it belongs to.
      runs: by seed, a mapping from metric to values, all as long as its "tokens".
    """

    name: str
    runs: Sequence[Mapping[str, Sequence[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Some figures of one training, over its tokens.

    Attributes:
      title: what it shows.
      unit: of its figures.
      curve: the training; figures that one of its runs has not logged are left out.
      metrics: (metric, what the panel calls it) of each line.
    """

    title: str
    unit: str
    curve: Curve
    metrics: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model makes of a prompt.

    Attributes:
      model: the row it belongs to.
      next_tokens: its likeliest next tokens, likeliest first.
      completion: how it goes on.
    """

    model: str
    next_tokens: Sequence[NextToken]
    completion: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and everyone's answers side by side; the first answer is the teacher's."""

    text: str
    answers: Sequence[Answer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTargets:
    """One store of teacher distributions: its size, and what it knows of the teacher.

    Attributes:
      teacher: whose distributions.
      scheme: how they are stored, in a few words.
      tokens: how many distributions.
      bytes: size on disk.
      vocab_size: entries of a whole distribution.
      ids: mean number of ids of a token.
      entropy: the teacher's mean entropy at the store's temperature, in nats.
      cross_entropy: the teacher's, with the tokens that really came next, likewise; None if no
        token has a next one.
    """

    teacher: str
    scheme: str
    tokens: int
    bytes: int
    vocab_size: int
    ids: float
    entropy: float
    cross_entropy: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedStage:
    """One step of the run: its name, what came of it in a few words, and how long it took."""

    name: str
    summary: str = ""
    seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page shows. A section whose values are missing is left out.

    Attributes:
      title: names the run.
      teacher: the row that is the first teacher.
      pruned: the row that is the student before training.
      student: the distilled row, which the verdict is about.
      rows: all models, in the order to show.
      splits: the splits in the runs, the one that counts first.
      cut: what was cut.
      curves: how the models learnt.
      curve_metrics: (metric, title) of each panel of curves.
      posttraining: panels of what came after distillation.
      prompts: prompts with everyone's answers.
      targets: the stores of teacher distributions.
      stages: what happened, in order.
      commands: what was typed to make this.
      versions: packages and machine, by name.
      notes: caveats a reader must know.
    """

    title: str
    teacher: str
    pruned: str
    student: str
    rows: Sequence[Row]
    splits: Sequence[str] = ("held_out", "out_of_domain")
    cut: Cut | None = None
    curves: Sequence[Curve] = ()
    curve_metrics: Sequence[tuple[str, str]] = (("hard", "Cross-entropy on the training text"),)
    posttraining: Sequence[Panel] = ()
    prompts: Sequence[Prompt] = ()
    targets: Sequence[StoredTargets] = ()
    stages: Sequence[FinishedStage] = ()
    commands: Sequence[str] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        for field in ("teacher", "pruned", "student"):
            if getattr(self, field) not in names:
                raise InputError(f"Report.{field} {getattr(self, field)!r} is not among the rows")
        if len(set(names)) != len(names):
            raise InputError(f"Report.rows has a name twice: {', '.join(names)}")
        seeds = len(self.row(self.student).runs)
        for row in self.rows:
            if row.kind == "control" and len(row.runs) != seeds:
                raise InputError(
                    f"control {row.name!r} has {len(row.runs)} runs, the student has {seeds}: "
                    f"the comparison is paired by seed"
                )

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)
