"""A recipe: frozen dataclasses that describe a whole run, stage by stage."""

import dataclasses
import functools
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from distill_jax import losses
from distill_jax.artifacts import InputError, resolve
from distill_jax.data import CorpusConfig
from distill_jax.evaluation import EvaluationConfig
from distill_jax.models import LlamaConfig
from distill_jax.overrides import parse, replace_fields
from distill_jax.parallel import MeshConfig
from distill_jax.posttraining import PostTrainingConfig
from distill_jax.pruning import PruneConfig
from distill_jax.teachers import Scheme, TopK, WriteConfig
from distill_jax.training import TrainConfig

Control = Literal["cross_entropy", "random_start"]
"""What a distilled student is compared with; see `Recipe`."""

# Columns of the metrics, and what the report calls its other models.
_METRICS = ("hard", "labels", "loss", "weight", "gradient_norm", "step", "tokens")
_RESERVED = (*_METRICS, "pruned", "distilled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where the tokenizer comes from: exactly one of the two is given.

    Attributes:
      source: a GGUF file, a Hugging Face folder, or a `tokenizer.model`.
      vocab_size: train a byte-level BPE of this size on the training text.
    """

    source: str | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.vocab_size is None):
            raise InputError("tokenizer: give either source or vocab_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One teacher. It starts from exactly one of `source`, `teacher` and `shape`.

    Attributes:
      source: a checkpoint directory, a GGUF file or a Hugging Face folder.
      teacher: the name of a teacher earlier in the recipe.
      shape: random parameters of this shape.
      train: training on the corpus's next tokens before it teaches: pre-training of a random
        start, teacher correction of another (Minitron, 2024: a teacher that was not trained on
        the distillation corpus first costs the student over 6% of its loss). None: as it is.
    """

    source: str | None = None
    teacher: str | None = None
    shape: LlamaConfig | None = None
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        if [self.source, self.teacher, self.shape].count(None) != 2:
            raise InputError("teachers: give exactly one of source, teacher and shape")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """What is stored of every teacher's distributions over the training tokens.

    Attributes:
      schemes: store name -> scheme; one forward pass fills them all.
      temperature: what the logits are divided by, those of live teachers too.
      write: how the teacher is run.
      reuse: the directory of an earlier run whose stores are of the same teachers, tokenizer,
        schemes and temperature, and of a corpus that this one adds to: rows that they have are
        copied, and teachers asked about the others alone. Decides nothing about the result.
    """

    schemes: Mapping[str, Scheme] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    write: WriteConfig = WriteConfig()
    reuse: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One teacher's part of the distillation loss.

    Attributes:
      weight: its weight in the sum.
      divergence: name of a divergence in `distill_jax.losses`.
      targets: name of the store, a key of `TargetsConfig.schemes`. None: the first unbiased samples
        for forward KL, the first top-k for any other divergence, which samples cannot give.
      live: the teacher reads every batch beside the student, in the type of its computation, and
        the loss compares with all of its distribution, instead of with a store.
      options: further keyword arguments of the divergence, such as {"alpha": 0.1}.
    """

    weight: float
    divergence: str = "forward_kl"
    targets: str | None = None
    live: bool = False
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.divergence not in losses.DIVERGENCES:
            raise InputError(
                f"distill.terms: {self.divergence!r} is none of the divergences "
                f"{', '.join(losses.DIVERGENCES)}"
            )
        if not self.weight > 0:
            raise InputError(f"distill.terms: a weight is {self.weight}; it must be positive")
        if self.live and self.targets is not None:
            raise InputError("distill.terms: a live teacher reads no store; leave targets out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Continued pretraining of the pruned student.

    Attributes:
      terms: teacher name -> its part of the loss.
      hard_weight: weight of the cross-entropy with the text itself.
      train: how the run goes; its seed is replaced by each of the recipe's.
    """

    terms: Mapping[str, Term]
    hard_weight: float
    train: TrainConfig

    def __post_init__(self) -> None:
        if not self.hard_weight >= 0:
            raise InputError(f"distill.hard_weight is {self.hard_weight}; it must not be negative")

    def teachers(self, *, live: bool) -> list[str]:
        """The teachers that run beside the student, or those whose stores are read."""
        return [name for name, term in self.terms.items() if term.live == live]

    def objective(self, temperature: float) -> losses.Objective:
        """The loss; `temperature` is that of the targets."""
        terms = {
            name: (
                term.weight,
                losses.distill(
                    name,
                    getattr(losses, term.divergence),
                    temperature=temperature,
                    **term.options,
                ),
            )
            for name, term in self.terms.items()
        }
        return losses.weighted_sum(hard=(self.hard_weight, losses.hard_labels()), **terms)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """A cut and a training on the way to the student; see `Recipe.rounds`.

    Attributes:
      prune: the shape to go through, importance, plan and repair.
      distill: training of what the cut leaves, on the targets of the recipe's teachers; one
        student, of the seed of its `train`.
    """

    prune: PruneConfig
    distill: DistillConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Attributes:
      name: names the run's directory.
      tokenizer: the tokenizer of teachers and student.
      corpus: the text and its rows.
      teachers: name -> teacher, in the order they are made; the first is the one the student is
        compared with first.
      targets: what is stored of them, but for those that are live wherever they teach.
      pruned_teacher: name of the teacher that is cut.
      rounds: cuts and trainings before the student's own, for more than half of the parameters
        at once are hard to recover from (NVIDIA): the first cuts `pruned_teacher`, each later one,
        and then `prune`, the model that the one before trained. The teachers stay.
      prune: the student's shape, importance, plan and repair.
      distill: the student's training.
      controls: what else is trained on as many tokens: "cross_entropy" from the same pruned start
        without teachers, "random_start" with the teachers from random parameters.
      seeds: one distilled student, and one of each control, for each.
      posttraining_rounds: rounds of post-training before the last, each with data, samples and
        settings of its own: the first starts from the first seed's student, each later one, and
        then `posttraining`, from the model that the one before left (Llama 3, 2024, section 4.1,
        went through six).
      posttraining: what makes the first seed's student answer, from SFT to DPO; None: nothing.
      evaluation: batch sizes of the evaluation.
      prompts: texts that the report lets the models continue.
      notes: caveats that a reader of the report must know.
      mesh: how devices are arranged.
    """

    name: str
    tokenizer: TokenizerConfig
    corpus: CorpusConfig
    teachers: Mapping[str, TeacherConfig]
    targets: TargetsConfig = TargetsConfig()
    pruned_teacher: str
    rounds: tuple[Round, ...] = ()
    prune: PruneConfig
    distill: DistillConfig
    controls: tuple[Control, ...] = ()
    seeds: tuple[int, ...] = (0,)
    posttraining_rounds: tuple[PostTrainingConfig, ...] = ()
    posttraining: PostTrainingConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if not self.teachers:
            raise InputError("teachers: a recipe needs at least one")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds: {list(self.seeds)} are not distinct numbers from 0 on")
        made: list[str] = []
        for name, teacher in self.teachers.items():
            if name in _RESERVED:
                raise InputError(f"teachers: {name!r} means something else; choose another name")
            if teacher.teacher is not None and teacher.teacher not in made:
                raise InputError(f"teachers.{name}.teacher: no teacher {teacher.teacher!r} before")
            made.append(name)
        if self.pruned_teacher not in self.teachers:
            raise InputError(f"pruned_teacher: {self.pruned_teacher!r} is none of {made}")
        self._check_posttrainings()
        for field, distill in self.trainings.items():
            for name in distill.terms:
                if name not in self.teachers:
                    raise InputError(f"{field}.terms: {name!r} is none of the teachers {made}")
            for name in distill.teachers(live=False):
                self.store(name, field)

    def _check_posttrainings(self) -> None:
        if self.posttraining is None:
            if self.posttraining_rounds:
                raise InputError("posttraining_rounds: come before posttraining, which is None")
            return
        length = self.corpus.sequence_length
        for field, post in self.posttrainings.items():
            if post.replay and post.learns_rows and post.sft.sequence_length != length:
                raise InputError(
                    f"{field}.replay: rows of the corpus have {length} tokens, "
                    f"{field}.sft.sequence_length is {post.sft.sequence_length}"
                )
        for post in self.posttraining_rounds:
            if post.rejection.template != self.posttraining.rejection.template:
                raise InputError("posttraining_rounds: have another template than posttraining")
            if post.task not in (None, self.posttraining.task):
                raise InputError("posttraining_rounds: have another task than posttraining")

    @property
    def posttrainings(self) -> dict[str, PostTrainingConfig]:
        """The rounds of post-training in order, by the field they stand in; the last alone is
        `posttraining`."""
        before = {f"posttraining_rounds.{i}": one for i, one in enumerate(self.posttraining_rounds)}
        return before | ({} if self.posttraining is None else {"posttraining": self.posttraining})

    @property
    def trainings(self) -> dict[str, DistillConfig]:
        """The trainings of all rounds and the last one, in order, by the field they stand in."""
        rounds = {f"rounds.{i}.distill": one.distill for i, one in enumerate(self.rounds)}
        return rounds | {"distill": self.distill}

    def store(self, teacher: str, training: str = "distill") -> str:
        """The name of the store that a training, a key of `trainings`, reads of a teacher.

        Raises:
          InputError: there is no such store, or none that can give the divergence.
        """
        term, schemes = self.trainings[training].terms[teacher], self.targets.schemes
        exact = [name for name, scheme in schemes.items() if isinstance(scheme, TopK)]
        others = [name for name in schemes if name not in exact]
        linear = term.divergence == "forward_kl"  # in the teacher, so that samples will do
        fitting = [*others, *exact] if linear else exact
        if term.targets is None and fitting:
            return fitting[0]
        if term.targets in fitting:
            return term.targets
        if term.targets is None or term.targets in schemes:
            problem = f"{term.divergence} needs {'a' if linear else 'a top-k'} store, of"
        else:
            problem = f"{term.targets!r} is none of"
        raise InputError(
            f"{training}.terms.{teacher}.targets: {problem} the stores {list(schemes)}"
        )


def to_json(value: Any) -> Any:
    """A JSON value that differs whenever the configuration does."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return fields | ({"name": value.name} if hasattr(value, "name") else {})
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Runs `get_config` of a Python file and applies overrides.

    Args:
      path: the file.
      overrides: texts "name=value". A name that is a parameter of `get_config`, such as "size",
        is given to it; any other is the dotted name of a field of the recipe.

    Raises:
      InputError: no such file or function, an unknown name, or a value of the wrong type.
    """
    place = resolve(path)
    spec = importlib.util.spec_from_file_location("distill_jax_config", place)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses defined in the file look themselves up by their module's name.
    sys.modules[spec.name] = module
    _run_user_code(path, functools.partial(spec.loader.exec_module, module))
    get_config: Callable[..., Recipe] | None = getattr(module, "get_config", None)
    if get_config is None:
        raise InputError(f"{path}: has no function get_config")
    parameters = inspect.signature(get_config).parameters
    arguments, fields = {}, []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}: write it as name=value")
        if name in parameters:
            hint = typing.get_type_hints(get_config).get(name, str)
            arguments[name] = parse(name, value, hint)
        else:
            fields.append((name, value))
    recipe = _run_user_code(path, functools.partial(get_config, **arguments))
    if not isinstance(recipe, Recipe):
        raise InputError(f"{path}: get_config returned {type(recipe).__name__}, not a Recipe")
    return replace_fields(recipe, fields)


def _run_user_code(path: str | os.PathLike[str], call: Callable[[], Any]) -> Any:
    """What a user's code returns; its mistakes are told with the name of the file."""
    try:
        return call()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error
