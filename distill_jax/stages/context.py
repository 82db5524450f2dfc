"""What every stage of a run shares: the recipe, the directory, and how to read earlier stages."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from distill_jax import data, models, parallel, posttraining, training
from distill_jax.recipe import PostTrainingConfig, Recipe

CORPUS, ROUNDS, PRUNE = "corpus", "rounds", "prune"
SFT, ON_POLICY, REWARD = "sft", "on-policy", "reward-model"
REJECTION, DPO = "rejection-sample", "dpo"
POSTTRAINING_ROUNDS = "posttraining-rounds"
EVALUATE, EXPORT, REPORT = "evaluate", "export", "report"
"""Names of the stages, and of their directories."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a recipe in a directory.

    Attributes:
      recipe: what to do.
      directory: where every stage has a directory of its name.
      commands: what a person types to make this run, for the report.
      profile: the first and the last of the steps of every training that are traced.
      runner: of Apache Beam, for the corpus: its name and its options; None for this process.
    """

    recipe: Recipe
    directory: epath.Path
    commands: tuple[str, ...] = ()
    profile: tuple[int, int] | None = None
    runner: Sequence[str] | None = None

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices."""
        return parallel.make_mesh(self.recipe.mesh)

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """The tokenizer that the corpus was made with."""
        return data.load_tokenizer(self.directory / CORPUS)

    def chat_tokenizer(self) -> data.Tokenizer:
        """The tokenizer with the template that post-training used, for whoever asks the model."""
        tokenizer = data.load_tokenizer(self.directory / CORPUS)
        if self.recipe.posttraining is not None:
            template = self.recipe.posttraining.rejection.template
            tokenizer.chat_template = posttraining.chat_template(tokenizer, template)
        return tokenizer

    def corpus(self, split: str) -> data.Corpus:
        """One split of the corpus."""
        return data.open_corpus(self.directory / CORPUS, split, tokenizer=self.tokenizer)

    def init(self, config: models.LlamaConfig, seed: int) -> models.Model:
        """A model of random parameters, each made where it lives."""
        initialise = jax.jit(
            lambda key: models.init_params(config, key), out_shardings=self.shardings(config)
        )
        return models.Model(config, initialise(jax.random.key(seed)))

    def load(self, stage: str, dtype: str = "float32") -> models.Model:
        """The model that a stage left, spread over the mesh."""
        place = self.directory / stage
        shardings = self.shardings(models.load_config(place))
        return models.load(place, dtype=dtype, shardings=shardings)

    def shardings(self, config: models.LlamaConfig) -> Any:
        """Where the parameters of a model of this shape live."""
        return parallel.shardings(
            self.mesh, models.logical_axes(config), models.abstract_params(config)
        )

    def save(self, place: epath.Path, model: models.Model) -> None:
        """Leaves a model with its tokenizer: a directory that is a teacher for other recipes."""
        if parallel.is_main():
            self.tokenizer.save(place)
        models.save(place, model)

    def stage(self, place: epath.Path) -> str:
        """The stage whose directory it is."""
        return str(place.relative_to(self.directory))

    def train(
        self,
        place: epath.Path,
        model: models.Model,
        loss_fn: training.LossFn,
        rows: data.RowSource,
        config: training.TrainConfig,
        teachers: Mapping[str, str] | None = None,
        *,
        split_time: bool = True,
    ) -> dict[str, Any]:
        """Trains a model on rows, leaves it in `place`, and returns the run's figures.

        `teachers` are the stages that left those that run beside it, by name. `split_time` is for
        losses of next tokens (see `training.train`); a loss of pairs needs whole rows.
        """

        def trained() -> models.Model:
            share = parallel.row_share(parallel.batch_sharding(self.mesh, split_time=split_time))
            batches = data.batches(
                rows,
                batch_rows=config.batch_rows,
                seed=config.seed,
                process_index=share.index,
                process_count=share.count,
            )
            beside = {n: self.load(of, config.compute_dtype) for n, of in (teachers or {}).items()}
            options = {"teachers": beside, "split_time": split_time}
            return self.loop(place, model, loss_fn, batches, config, **options)

        return self.leave(place, trained)

    def train_averaged(
        self,
        place: epath.Path,
        model: models.Model,
        loss_fn: training.LossFn,
        rows: data.RowSource,
        config: training.TrainConfig,
        *,
        runs: int,
        split_time: bool,
    ) -> dict[str, Any]:
        """As `train`; of several runs, each with the next seed, `place` has the mean of the models.

        Their metrics stand below it. The figures are of their work in all.
        """
        if runs == 1:
            return self.train(place, model, loss_fn, rows, config, split_time=split_time)
        places, name = [place / f"run-{number}" for number in range(runs)], self.stage(place)
        if not parallel.on_main(lambda: models.is_saved(place), what=name):
            for number, way in enumerate(places):
                one = dataclasses.replace(config, seed=config.seed + number)
                self.train(way, model, loss_fn, rows, one, split_time=split_time)
            shardings = self.shardings(model.config)
            self.save(place, models.average([*map(os.fspath, places)], shardings=shardings))

        def figures() -> dict[str, Any]:
            for way in places:
                models.remove(way)
            return _summed([_trained(way) for way in places])

        return parallel.on_main(figures, what=f"the end of {name}")

    def loop(
        self,
        place: epath.Path,
        model: models.Model,
        loss_fn: training.LossFn,
        batches: Iterator[dict[str, Any]],
        config: training.TrainConfig,
        **options: Any,
    ) -> models.Model:
        """`training.train` in a stage's directory, with the options that it has besides."""
        return training.train(
            model,
            loss_fn,
            batches,
            config,
            place,
            name=self.stage(place),
            mesh=self.mesh,
            profile=self.profile,
            **options,
        )

    def leave(self, place: epath.Path, trained: Callable[[], models.Model]) -> dict[str, Any]:
        """Leaves what `trained` returns in `place`, and returns the figures of its training.

        A model that stands there whole was trained by an earlier call, killed while it cleaned up.
        """
        name = self.stage(place)
        if not parallel.on_main(lambda: models.is_saved(place), what=name):
            self.save(place, trained())

        def figures() -> dict[str, Any]:
            # What only served to go on after a kill need not stay on disk.
            (place / "checkpoints").rmtree(missing_ok=True)
            return _trained(place)

        return parallel.on_main(figures, what=f"the end of {name}")


def teacher(name: str) -> str:
    """The stage that makes a teacher."""
    return f"teachers/{name}"


def targets(name: str) -> str:
    """The stage that stores a teacher's distributions."""
    return f"targets/{name}"


def stored_teachers(recipe: Recipe) -> list[str]:
    """The teachers of which targets are stored: all but those that are live wherever they teach.

    One that only reads answers of post-training is live.
    """
    trainings = recipe.trainings.values()
    live = {name for distill in trainings for name in distill.teachers(live=True)}
    read = {name for distill in trainings for name in distill.teachers(live=False)}
    for post in recipe.posttrainings.values():
        if post.on_policy_train is not None:
            live.add(post.on_policy.teacher or "")
    known = recipe.teachers if recipe.targets.schemes else ()
    return [name for name in known if name in read or name not in live]


def round_start(number: int) -> str:
    """The stage that cuts a model for a round before the last."""
    return f"{ROUNDS}/{number}/prune"


def round_student(number: int) -> str:
    """The stage that trains what `round_start` leaves."""
    return f"{ROUNDS}/{number}/distill"


def round_stages(recipe: Recipe) -> list[str]:
    """The stages of all rounds before the last, in order."""
    numbers = range(len(recipe.rounds))
    return [name(number) for number in numbers for name in (round_start, round_student)]


def student(seed: int) -> str:
    """The stage that distills one student."""
    return f"distill/seed-{seed}"


def control(kind: str, seed: int) -> str:
    """The stage that trains one control."""
    return f"controls/{kind}/seed-{seed}"


def model_stages(recipe: Recipe) -> list[str]:
    """The stages that leave a model that speaks, in the order they are made."""
    return [
        *map(teacher, recipe.teachers),
        PRUNE,
        *(control(kind, seed) for kind in recipe.controls for seed in recipe.seeds),
        *map(student, recipe.seeds),
        *(stage for stage in posttraining_stages(recipe) if kind(stage) != REWARD),
    ]


def kind(stage: str) -> str:
    """SFT, DPO and the like, of a stage of any round of post-training."""
    return stage.rpartition("/")[2]


def posttraining_stages(recipe: Recipe) -> dict[str, PostTrainingConfig]:
    """The stages of all rounds of post-training, in order, with what the recipe says of each's.

    Each starts from the model before it that answers; REWARD leaves one that judges. Those of the
    last round bear their plain names.
    """
    kinds = {
        "sft_train": SFT,
        "on_policy_train": ON_POLICY,
        "reward_train": REWARD,
        "rejection_train": REJECTION,
        "dpo_train": DPO,
    }
    before = [f"{POSTTRAINING_ROUNDS}/{n}/" for n in range(len(recipe.posttraining_rounds))]
    rounds = zip([*before, ""], recipe.posttrainings.values())
    return {prefix + kinds[field]: one for prefix, one in rounds for field in one.trainings}


def _trained(place: epath.Path) -> dict[str, Any]:
    """Figures of the training that went on in a directory."""
    spent = training.account(training.read_sessions(place))
    return _figures(training.read_metrics(place / "metrics.jsonl")) | {"goodput": spent}


def _summed(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of several trainings: their work added up, the mean of all other numbers."""
    numbers = [name for name, value in found[0].items() if isinstance(value, int | float)]
    means = {name: math.fsum(one[name] for one in found) / len(found) for name in numbers}
    work = {name: sum(one[name] for one in found) for name in ("steps", "tokens")}
    return means | work | {"averaged": len(found)}


def _figures(metrics: list[dict[str, float]]) -> dict[str, Any]:
    """Where a run ended: the mean of its last tenth, since one batch is noisy."""
    last = metrics[-max(len(metrics) // 10, 1) :]
    means = {
        name: sum(line[name] for line in last) / len(last)
        for name in last[0]
        if name not in ("step", "tokens")
    }
    ends: Mapping[str, Any] = metrics[-1]
    return {"steps": ends["step"], "tokens": ends["tokens"], **means}
