"""What can be known to be wrong before any work begins."""

import dataclasses

from distill_jax import data, models, parallel, pruning
from distill_jax.artifacts import InputError, resolve
from distill_jax.recipe import Recipe


def check(recipe: Recipe) -> None:
    """Finds files that are missing, teachers that do not fit, and shapes that cannot be cut.

    Raises:
      InputError: one line that names the field.
    """
    parallel.make_mesh(recipe.mesh)
    for source in (recipe.corpus.source, recipe.corpus.out_of_domain):
        if source is not None:
            resolve(source)
    tokenizer = None
    vocab_size = recipe.tokenizer.vocab_size
    if recipe.tokenizer.source is not None:
        tokenizer = data.load_tokenizer(recipe.tokenizer.source)
        vocab_size = tokenizer.vocab_size
    assert vocab_size is not None  # TokenizerConfig gives one of the two
    shapes: dict[str, models.LlamaConfig] = {}
    for name, teacher in recipe.teachers.items():
        if teacher.source is not None:
            shapes[name] = models.load_config(teacher.source)
            _check_tokenizer(name, teacher.source, tokenizer)
        elif teacher.teacher is not None:
            shapes[name] = shapes[teacher.teacher]
        else:
            assert teacher.shape is not None  # TeacherConfig gives one of the three
            shapes[name] = dataclasses.replace(teacher.shape, vocab_size=vocab_size)
        if shapes[name].vocab_size < vocab_size:
            raise InputError(
                f"teachers.{name}: has {shapes[name].vocab_size} token ids, the tokenizer "
                f"{vocab_size}"
            )
    large = shapes[recipe.pruned_teacher]
    small = dataclasses.replace(recipe.prune.target, vocab_size=large.vocab_size)
    pruning.check_shapes(large, small)


def _check_tokenizer(name: str, source: str, tokenizer: data.Tokenizer | None) -> None:
    """Refuses a teacher that comes with another tokenizer; equal sizes do not make them equal."""
    place = resolve(source)
    has_own = place.is_file() or any(
        (place / file).exists() for file in ("tokenizer.json", "tokenizer.model")
    )
    if not has_own:
        return
    own = data.load_tokenizer(source).fingerprint
    if tokenizer is None or own != tokenizer.fingerprint:
        wanted = tokenizer.fingerprint if tokenizer else "one trained on the corpus"
        raise InputError(f"teachers.{name}: its tokenizer is {own}, the recipe's is {wanted}")
