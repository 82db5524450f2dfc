"""The search for the shape of a recipe's student; no stage, since a person chooses from it."""

import itertools

from distill_jax import artifacts, data, parallel, pipeline, pruning
from distill_jax.artifacts import InputError
from distill_jax.stages import context
from distill_jax.stages.context import CORPUS, Run

SEARCH = "search"
"""The directory below the run's where scores, results and pictures are left."""


def search(run: Run, config: pruning.SearchConfig, *, rows: int) -> list[pruning.Candidate]:
    """Ranks shapes for the recipe's pruned teacher; writes search/COST.json in the run.

    Importance is that of `recipe.prune`, on its calibration rows; scores are kept for the next
    search. Nothing held out is read.

    Args:
      run: whose corpus and teacher must have been made.
      config: what is tried.
      rows: calibration rows on which shapes are ranked.

    Raises:
      InputError: corpus or teacher is missing, or no shape fits.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}; it must be positive")
    teacher = context.teacher(run.recipe.pruned_teacher)
    for stage in (CORPUS, teacher):
        pipeline.read_manifest(run.directory / stage)
    pruned, corpus = run.recipe.prune, run.corpus("train")
    model = run.load(teacher)
    pruning.candidate_shapes(model.config, config)  # refuses in vain budgets before the work
    each = parallel.whole_batch(run.recipe.evaluation.batch_rows, run.mesh)
    batches = data.batches(corpus, batch_rows=each, seed=0, shuffle=False, epochs=1)
    calibration = list(itertools.islice(batches, -(-pruned.calibration_rows // each)))
    place = run.directory / SEARCH
    place.mkdir(parents=True, exist_ok=True)
    by_perplexity = pruned.layer_choice == "perplexity"
    scores = pruning.find_or_measure(
        place / pruning.SCORES_FILE,
        model,
        calibration,
        pruned,
        removal_rows=calibration[: -(-pruned.removal_rows // each)] if by_perplexity else (),
        tokenizer=corpus.tokenizer_fingerprint,
        batch_sharding=parallel.batch_sharding(run.mesh),
    )
    found = pruning.search(
        model,
        scores,
        calibration[: -(-rows // each)],
        config,
        layer_choice=pruned.layer_choice,
        mesh=run.mesh,
    )
    artifacts.write_json(
        place / f"{config.cost}.json", [candidate.to_json() for candidate in found]
    )
    return found
