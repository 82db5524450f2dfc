"""sft and what follows it: from a model of text to one that answers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from distill_jax import data, evaluation, models, parallel, posttraining, training
from distill_jax.artifacts import InputError, fingerprint_path
from distill_jax.pipeline import Stage
from distill_jax.recipe import PostTrainingConfig, to_json
from distill_jax.stages import context, records
from distill_jax.stages.context import CORPUS, DPO, ON_POLICY, REJECTION, REWARD, SFT, Run


def stages(run: Run) -> list[Stage]:
    """The stages that the recipe has, each of which starts from the one before."""
    made: list[Stage] = []
    start = context.student(run.recipe.seeds[0])
    for name, config in context.posttraining_stages(run.recipe).items():
        made.append(stage(run, config, name, start))
        if context.kind(name) != REWARD:
            start = name
    return made


def stage(run: Run, config: PostTrainingConfig, name: str, start: str) -> Stage:
    """One stage of a round, which starts from the model that another left.

    The last part of its name says what it does; pairs of samples are those of the stage
    rejection-sample beside it, and a reward model is the one beside it.
    """
    kind = context.kind(name)
    prefix = name.removesuffix(kind)
    described = to_json(config)
    del described["rejection"]["rows_at_once"]  # says how, not what
    parts: dict[str, tuple[str, ...]] = {
        SFT: ("averaged", "sft", "sft_train", "replay"),
        ON_POLICY: ("sft", "on_policy", "on_policy_train"),
        REWARD: ("averaged", "reward_model", "reward_train"),
        REJECTION: ("averaged", "sft", "replay", "rejection", "rejection_train"),
        DPO: ("averaged", "rejection", "dpo", "dpo_train"),
    }
    files = {
        SFT: config.sft.files,
        ON_POLICY: tuple(dict.fromkeys([*config.sft.files, *config.on_policy.files])),
        REWARD: config.reward_model.files,
        REJECTION: config.rejection.files,
        DPO: config.dpo.files,
    }
    if config.rejection.function is not None:
        files[REJECTION] += (config.rejection.function.rpartition(":")[0],)
    judges: dict[str, tuple[str, ...]] = {}
    if config.on_policy.teacher is not None:
        judges[ON_POLICY] = (context.teacher(config.on_policy.teacher),)
    if config.rejection.teacher is not None:
        judges[REJECTION] = (context.teacher(config.rejection.teacher),)
    if config.rejection.reward == posttraining.REWARD_MODEL:
        judges[REJECTION] = (prefix + REWARD,)
    works = {
        SFT: _sft,
        ON_POLICY: _on_policy,
        REWARD: _reward_model,
        REJECTION: _rejection,
        DPO: _dpo,
    }
    return Stage(
        name=name,
        command=context.POSTTRAINING_ROUNDS if prefix else kind,
        recipe={part: described[part] for part in ("task", "problems", *parts[kind])}
        | {"template": config.rejection.template},
        inputs=(CORPUS, start, *judges.get(kind, ())),
        external={file: fingerprint_path(file) for file in files[kind]},
        work=functools.partial(works[kind], run, config, start),
    )


def _train(
    run: Run,
    place: epath.Path,
    model: models.Model,
    loss_fn: training.LossFn,
    rows: Sequence[Any],
    config: training.TrainConfig,
    *,
    averaged: int,
    split_time: bool = True,
) -> dict[str, Any]:
    """Trains on a few rows: a set smaller than a batch is repeated whole until it fills one.

    Raises:
      InputError: processes read other rows.
    """
    records.check_alike(place, (row["tokens"].tobytes() for row in rows))
    repeats = -(-config.batch_rows // len(rows))
    rows = [*rows] * repeats
    figures = run.train_averaged(
        place, model, loss_fn, rows, config, runs=averaged, split_time=split_time
    )
    if parallel.is_main():
        run.chat_tokenizer().save(place)
    return {"rows": len(rows) // repeats, **figures}


def _sft(run: Run, config: PostTrainingConfig, start: str, place: epath.Path) -> dict[str, Any]:
    model = run.load(start)
    conversations, figures = records.conversations(run, config, place)
    rows = records.fine_tuning_rows(run, config, conversations)
    loss_fn = sft_loss(config, model.config, run.mesh)
    return figures | _train(
        run, place, model, loss_fn, rows, _given(config.sft_train), averaged=config.averaged
    )


def _on_policy(
    run: Run, config: PostTrainingConfig, start: str, place: epath.Path
) -> dict[str, Any]:
    model, asked, train = run.load(start), config.on_policy, _given(config.on_policy_train)
    assert asked.teacher is not None  # PostTrainingConfig checks that
    teacher = run.load(context.teacher(asked.teacher), train.compute_dtype)
    problems, figures = records.problems(run, config, asked, asked.sequence_length, place)
    messages = map(posttraining.to_messages, problems)
    prompts = [posttraining.encode_prompt(run.tokenizer, one, asked.template) for one in messages]
    given: list[posttraining.Example] = []
    if asked.uses_conversations:
        told = None if config.sft_train is not None else place
        conversations, _ = records.conversations(run, config, told)
        given = posttraining.to_examples(run.tokenizer, conversations, asked.template)
    records.check_alike(place, (repr(one).encode() for one in [*prompts, *given]))
    rollouts = posttraining.Rollouts(
        model.config,
        teacher,
        run.tokenizer,
        asked,
        train,
        prompts,
        conversations=given,
        text=run.corpus("train") if asked.text_weight else None,
        mesh=run.mesh,
        directory=place,
    )
    loss_fn = on_policy_loss(config, model.config, teacher.config, run.mesh)
    beside = {posttraining.TEACHER: teacher}

    def trained() -> models.Model:
        return run.loop(
            place,
            model,
            loss_fn,
            rollouts,
            train,
            teachers=beside,
            before_batch=rollouts.draw,
            split_time=True,
        )

    figures |= run.leave(place, trained)
    if parallel.is_main():
        run.chat_tokenizer().save(place)
    return {"prompts": len(prompts), **figures}


def _reward_model(
    run: Run, config: PostTrainingConfig, start: str, place: epath.Path
) -> dict[str, Any]:
    model = run.load(start)
    rejects, template = data.Rejects(config.reward_model.bad_rows), config.rejection.template
    pairs = list(posttraining.read_pairs(run.tokenizer, config.reward_model, template, rejects))
    figures: dict[str, Any] = dict(records.figures_of(place, rejects, len(pairs)))
    held_out = [pair for pair in pairs if config.reward_model.is_held_out(pair)]
    learnt = [pair for pair in pairs if not config.reward_model.is_held_out(pair)]
    if not learnt:
        raise InputError(f"{place.name}: all {len(pairs)} pairs are held out; there are too few")
    token, pad_id = posttraining.reward_token(run.tokenizer, template), run.tokenizer.pad_id
    records.check_alike(place, (repr(pair).encode() for pair in pairs))
    rows = posttraining.pair_rows(learnt, config.reward_model, pad_id=pad_id)
    train = _given(config.reward_train)
    loss_fn = posttraining.reward_loss(
        model.config,
        token,
        remat=train.remat,
        compute_dtype=train.compute_dtype,
        mesh=run.mesh,
    )
    figures |= _train(
        run, place, model, loss_fn, rows, train, averaged=config.averaged, split_time=False
    )
    if held_out:
        rows = posttraining.pair_rows(held_out, config.reward_model, pad_id=pad_id)
        judge, dtype = run.load(run.stage(place)), train.compute_dtype
        accuracy = posttraining.preference_accuracy(
            judge, token, rows, compute_dtype=dtype, mesh=run.mesh
        )
        figures |= {"held_out_pairs": len(rows), "held_out_accuracy": accuracy}
    return figures


def _rejection(
    run: Run, config: PostTrainingConfig, start: str, place: epath.Path
) -> dict[str, Any]:
    train = _given(config.rejection_train)
    problems, used = records.problems(run, config, config.rejection, config.longest_answer, place)
    judge = _judge(run, config, place)
    task = records.FILES if config.task is None else records.task_of(config)
    figures: dict[str, Any] = used | posttraining.write_samples(
        place / "samples",
        run.load(start, train.compute_dtype),
        run.tokenizer,
        task,
        problems,
        config.rejection,
        judge,
        parallel.batch_sharding(run.mesh),
    )
    drawn = posttraining.read_samples(place / "samples")
    examples = posttraining.chosen_examples(run.tokenizer, drawn, config.rejection.template)
    if not examples:
        raise InputError(
            f"{place}: no sample of {figures['samples']} was good enough to choose; train longer "
            "before, draw more samples, or lower posttraining.rejection.threshold"
        )
    rows = records.fine_tuning_rows(run, config, examples)
    model = run.load(start)
    loss_fn = _sft_loss(config, model.config, run.mesh, train)
    return figures | _train(run, place, model, loss_fn, rows, train, averaged=config.averaged)


def _judge(run: Run, config: PostTrainingConfig, place: epath.Path) -> posttraining.Judge:
    """What scores the answers that the stage in `place` draws."""
    rejection = config.rejection
    dtype = _given(config.rejection_train).compute_dtype

    def by_model(reward: Callable[..., posttraining.Reward], stage: str) -> posttraining.Judge:
        model, template = run.load(stage, dtype), rejection.template
        options = {"compute_dtype": dtype, "mesh": run.mesh}
        return posttraining.by_reward(reward(model, run.tokenizer, template, **options))

    if rejection.teacher is not None:
        return by_model(posttraining.log_likelihood, context.teacher(rejection.teacher))
    if rejection.reward == posttraining.REWARD_MODEL:
        return by_model(posttraining.reward_of, run.stage(place.parent / REWARD))
    if rejection.function is not None:
        return posttraining.by_reward(_on_main(posttraining.load_function(rejection.function)))
    if rejection.reward == posttraining.TASK:
        return posttraining.by_program(records.task_of(config).scorer)
    return posttraining.by_program(posttraining.VERIFIERS[rejection.reward])


def _on_main(reward: posttraining.Reward) -> posttraining.Reward:
    """A user's function, called by one process: it may cost money, or not give the same twice."""
    return lambda *asked: parallel.on_main(
        lambda: [float(score) for score in reward(*asked)], what="the rewards"
    )


def _dpo(run: Run, config: PostTrainingConfig, start: str, place: epath.Path) -> dict[str, Any]:
    model = run.load(start)
    rejects, template = data.Rejects(config.dpo.bad_rows), config.rejection.template
    pairs = list(posttraining.read_pairs(run.tokenizer, config.dpo, template, rejects))
    figures = records.figures_of(place, rejects, len(pairs)) if config.dpo.files else {}
    if config.dpo.uses_samples:
        pairs += _sampled_pairs(run, place.parent / REJECTION, template)
    records.check_alike(place, (repr(pair).encode() for pair in pairs))
    rows = posttraining.pair_rows(pairs, config.dpo, pad_id=run.tokenizer.pad_id)
    train = _given(config.dpo_train)
    rows = posttraining.with_reference(
        model, rows, config.dpo, compute_dtype=train.compute_dtype, mesh=run.mesh
    )
    loss_fn = dpo_loss(config, model.config, run.mesh)
    figures |= _train(
        run, place, model, loss_fn, rows, train, averaged=config.averaged, split_time=False
    )
    return figures | {"kl_to_reference": _kl_to(model, run, place, rows)}


def _sampled_pairs(
    run: Run, rejection: epath.Path, template: str | None
) -> list[posttraining.Pair]:
    drawn = posttraining.read_samples(rejection / "samples")
    pairs = posttraining.sampled_pairs(run.tokenizer, drawn, template)
    if not pairs:
        raise InputError(
            f"{rejection}: no problem has both a right and a wrong answer; draw "
            "more samples, or raise posttraining.rejection.temperature"
        )
    return pairs


_COMPARED_PAIRS = 256


def _kl_to(
    reference: models.Model, run: Run, place: epath.Path, pairs: Sequence[posttraining.Record]
) -> float:
    """KL(policy || reference) in nats a token, exact at the tokens of the first pairs' answers.

    The policy is what the stage left in `place`.
    """
    halves = [
        {name: values[half] for name, values in pair.items()}
        for pair in pairs[:_COMPARED_PAIRS]
        for half in (0, 1)
    ]
    found = evaluation.evaluate(
        {"policy": run.load(run.stage(place)), "reference": reference},
        ["policy"],
        {"pairs": halves},
        dataclasses.replace(run.recipe.evaluation, speed=None),
        mesh=run.mesh,
    )
    return found["reference"]["pairs"]["kl"]["policy"]


def _given(train: training.TrainConfig | None) -> training.TrainConfig:
    assert train is not None  # without it there is no such stage
    return train


def sft_loss(config: PostTrainingConfig, shape: models.LlamaConfig, mesh: Mesh) -> training.LossFn:
    """The loss of the stage sft, for a model of this shape on a mesh."""
    return _sft_loss(config, shape, mesh, _given(config.sft_train))


def _sft_loss(
    config: PostTrainingConfig,
    shape: models.LlamaConfig,
    mesh: Mesh,
    train: training.TrainConfig,
) -> training.LossFn:
    return posttraining.sft_loss(
        shape, config.sft, remat=train.remat, compute_dtype=train.compute_dtype, mesh=mesh
    )


def on_policy_loss(
    config: PostTrainingConfig, shape: models.LlamaConfig, teacher: models.LlamaConfig, mesh: Mesh
) -> training.LossFn:
    """The loss of the stage on-policy, for models of these shapes on a mesh."""
    train = _given(config.on_policy_train)
    return posttraining.on_policy_loss(
        shape,
        teacher,
        config.on_policy,
        remat=train.remat,
        compute_dtype=train.compute_dtype,
        mesh=mesh,
    )


def dpo_loss(config: PostTrainingConfig, shape: models.LlamaConfig, mesh: Mesh) -> training.LossFn:
    """The loss of the stage dpo, for a model of this shape on a mesh."""
    train = _given(config.dpo_train)
    return posttraining.dpo_loss(
        shape, config.dpo, remat=train.remat, compute_dtype=train.compute_dtype, mesh=mesh
    )
