"""evaluate and export: how good every model is, and the last one in the form others read."""

from typing import Any

from etils import epath

from distill_jax import evaluation, models, parallel, posttraining
from distill_jax.pipeline import Stage
from distill_jax.recipe import to_json
from distill_jax.stages import context
from distill_jax.stages.context import (
    CORPUS,
    EVALUATE,
    EXPORT,
    PRUNE,
    Run,
)


def stages(run: Run) -> list[Stage]:
    """Evaluation of all models, and the export of the last."""
    recipe = run.recipe
    made = context.model_stages(recipe)
    task = recipe.posttraining
    return [
        Stage(
            name=EVALUATE,
            command="evaluate",
            recipe={
                "evaluation": to_json(recipe.evaluation),
                "prompts": list(recipe.prompts),
                "teachers": list(recipe.teachers),
                "task": task
                and [task.task, task.rejection.max_new_tokens, task.rejection.template],
            },
            inputs=(CORPUS, *made),
            work=lambda place: _evaluate(run, place),
        ),
        Stage(
            name=EXPORT,
            command="export",
            recipe={"template": task and task.rejection.template},
            inputs=(CORPUS, made[-1]),
            work=lambda place: _export(run, made[-1], place),
        ),
    ]


def _evaluate(run: Run, place: epath.Path) -> dict[str, Any]:
    """All models on the same rows, the verifiable task, and the prompts."""
    recipe = run.recipe
    loaded = {name: run.load(name) for name in context.model_stages(recipe)}
    splits = {"held_out": run.corpus("held_out")}
    if recipe.corpus.out_of_domain is not None:
        splits["out_of_domain"] = run.corpus("out_of_domain")
    figures = evaluation.evaluate(
        loaded,
        [context.teacher(name) for name in recipe.teachers],
        splits,
        recipe.evaluation,
        mesh=run.mesh,
    )
    config = recipe.posttraining
    if config is not None and config.task is not None:
        task = posttraining.load_task(config.task)
        for name, model in loaded.items():
            found = posttraining.accuracy(
                model,
                run.tokenizer,
                task,
                max_new_tokens=config.rejection.max_new_tokens,
                template=config.rejection.template,
                sharding=parallel.batch_sharding(run.mesh),
            )
            figures[name] |= {f"task_{key}": value for key, value in found.items()}
    shown = [context.teacher(next(iter(recipe.teachers))), PRUNE, context.student(recipe.seeds[0])]
    prompts = [
        {"text": text, "answers": [_answer(run, loaded[name], name, text) for name in shown]}
        for text in recipe.prompts
    ]
    return {"models": figures, "prompts": prompts}


def _answer(run: Run, model: models.Model, name: str, text: str) -> dict[str, Any]:
    """The likeliest next tokens after a prompt, and the greedy continuation."""
    tokens = evaluation.next_tokens(model, run.tokenizer, text)
    prompt = run.tokenizer.encode(text, bos=run.tokenizer.adds_bos)
    (completion,) = models.generate(
        model,
        [prompt],
        max_new_tokens=24,
        sampling=models.Sampling(temperature=0.0),
        seeds=[0],
        stop_ids=() if run.tokenizer.eos_id is None else (run.tokenizer.eos_id,),
    )
    return {
        "stage": name,
        "next_tokens": [[one.token, one.text, one.probability] for one in tokens],
        "completion": run.tokenizer.decode(completion.tokens),
    }


def _export(run: Run, last: str, place: epath.Path) -> dict[str, Any]:
    model = run.load(last)
    tokenizer = run.chat_tokenizer()
    eos_ids = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if run.recipe.posttraining is not None:
        eos_ids.append(posttraining.end_of_turn(tokenizer))
    models.export_hugging_face(
        place, model, bos_id=tokenizer.bos_id, eos_id=sorted(set(eos_ids)) or None
    )
    if parallel.is_main():
        tokenizer.save(place)
    return {"stage": last, "parameters": model.config.parameters}
