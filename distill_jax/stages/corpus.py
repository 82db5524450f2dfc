"""corpus: text -> tokenizer -> packed rows."""

from typing import Any

from etils import epath

from distill_jax import data, parallel, posttraining
from distill_jax.artifacts import fingerprint_path
from distill_jax.pipeline import Stage
from distill_jax.recipe import to_json
from distill_jax.stages.context import CORPUS, Run


def stages(run: Run) -> list[Stage]:
    """The one stage of this kind."""
    recipe = run.recipe
    sources = (recipe.corpus.source, recipe.corpus.out_of_domain, recipe.tokenizer.source)
    return [
        Stage(
            name=CORPUS,
            command="corpus",
            recipe={"tokenizer": to_json(recipe.tokenizer), "corpus": to_json(recipe.corpus)},
            inputs=(),
            external={source: fingerprint_path(source) for source in sources if source},
            work=lambda place: parallel.on_main(lambda: _work(run, place), what=CORPUS),
        )
    ]


def _work(run: Run, place: epath.Path) -> dict[str, Any]:
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
    splits = data.build_corpus(recipe.corpus, tokenizer, place)
    return {"vocab_size": tokenizer.vocab_size, "splits": splits}
