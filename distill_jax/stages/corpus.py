"""corpus: text -> tokenizer -> packed rows."""

from typing import Any

from etils import epath

from distill_jax import data, parallel, posttraining
from distill_jax.artifacts import InputError, fingerprint_path
from distill_jax.pipeline import Stage
from distill_jax.recipe import to_json
from distill_jax.stages.context import CORPUS, Run


def stages(run: Run) -> list[Stage]:
    """The one stage of this kind."""
    recipe = run.recipe
    write = None if run.runner is None else _on_beam(*run.runner)
    sources = (recipe.corpus.source, recipe.corpus.out_of_domain, recipe.tokenizer.source)
    return [
        Stage(
            name=CORPUS,
            command="corpus",
            recipe={"tokenizer": to_json(recipe.tokenizer), "corpus": to_json(recipe.corpus)},
            inputs=(),
            external={source: fingerprint_path(source) for source in sources if source},
            work=lambda place: parallel.on_main(lambda: _work(run, place, write), what=CORPUS),
        )
    ]


def _on_beam(runner: str, *options: str) -> data.Write:
    """`on_beam.writer`, where there is Beam.

    Raises:
      InputError: there is none, or it knows no such runner or option.
    """
    try:
        from distill_jax.data import on_beam
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("apache_beam"):
            raise
        raise InputError(
            "--runner: Apache Beam is not installed; `scripts/setup beam` makes .venv-beam with it"
        ) from None
    return on_beam.writer(runner, options)


def _work(run: Run, place: epath.Path, write: data.Write | None) -> dict[str, Any]:
    recipe = run.recipe
    if recipe.tokenizer.source is not None:
        tokenizer = data.load_tokenizer(recipe.tokenizer.source)
    else:
        assert recipe.tokenizer.vocab_size is not None  # TokenizerConfig gives one of the two
        texts = (text for split, text in data.passages(recipe.corpus) if split == "train")
        tokenizer = data.train_tokenizer(
            texts, recipe.tokenizer.vocab_size, specials=posttraining.CHATML_SPECIALS
        )
    tokenizer.save(place)
    splits = data.build_corpus(recipe.corpus, tokenizer, place, write=write)
    return {"vocab_size": tokenizer.vocab_size, "splits": splits}
