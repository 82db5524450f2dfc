"""Direct preference optimisation (Rafailov et al. 2023) as the Llama 3 paper, 4.1.4, uses it.

Two changes against the original: the tokens of headers and of the end of a turn count in neither
answer, and the negative log-likelihood of the chosen answer is added, by token (Pang et al. 2024).
The starting model's log-probabilities are computed once and stored beside the pairs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from distill_jax import losses, parallel, progress
from distill_jax.artifacts import InputError, check_choices
from distill_jax.models import LlamaConfig, Model, Reading
from distill_jax.models.llama import Remat
from distill_jax.posttraining.log_probs import sequence_log_probs
from distill_jax.posttraining.pairs import PairConfig, both_answers
from distill_jax.posttraining.rows import Record, filled_batches
from distill_jax.training import LossFn, loss_of_rows, values_of_rows

PreferenceLoss = Literal["dpo", "robust_dpo", "ipo"]
"""A function of `distill_jax.losses`."""
_LOSSES: Mapping[PreferenceLoss, Any] = {
    "dpo": losses.dpo,
    "robust_dpo": losses.robust_dpo,
    "ipo": losses.ipo,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig(PairConfig):
    """Which pairs, see `PairConfig`, and what is minimised on them.

    Attributes:
      loss: "dpo"; "robust_dpo" (Chowdhury et al. 2024), unbiased where a share `label_smoothing`
        of the pairs is the wrong way round; "ipo" (Azar et al. 2023), which ends at a margin.
      label_smoothing: of "dpo" (conservative DPO, Mitchell 2023) and "robust_dpo", in [0, 0.5).
      length_normalised: take log-ratios as means over an answer's tokens, so that a long answer is
        no larger a lever (Tulu 3, 2024; TRL's IPO); beta then wants to be some ten times larger.
      beta: how strongly the policy is held to the starting model.
      nll_weight: weight of the chosen answer's negative log-likelihood, a mean over its tokens.
      chunk: tokens whose logits are held at a time.
    """

    loss: PreferenceLoss = "dpo"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    beta: float = 0.1
    nll_weight: float = 0.2
    chunk: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, {"loss": PreferenceLoss})
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(
                f"DpoConfig.label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)"
            )
        if self.label_smoothing and self.loss == "ipo":
            raise InputError("DpoConfig.label_smoothing: ipo has none")
        if self.beta <= 0:
            raise InputError(f"DpoConfig.beta is {self.beta}; it must be positive")
        if self.nll_weight < 0:
            raise InputError(f"DpoConfig.nll_weight is {self.nll_weight}; it must not be negative")
        if self.chunk < 1:
            raise InputError(f"DpoConfig.chunk is {self.chunk}; at least 1")


def with_reference(
    model: Model,
    rows: Sequence[Record],
    config: DpoConfig = DpoConfig(),
    *,
    pairs_per_batch: int = 8,
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> list[Record]:
    """The rows with "reference_log_probs", float32 [2]: what `model` gives to both answers.

    Args:
      model: the model from which the optimisation starts.
      rows: from `pair_rows`.
      config: the chunk of the log-probabilities.
      pairs_per_batch: pairs in one forward pass, on each device of a mesh.
      compute_dtype: type of the computation; that of the training, so that both round alike.
      mesh: where the model lies: every device reads pairs of its own. None leaves that to the
        compiler.
    """

    def of_pairs(params: Any, batch: Mapping[str, Any], reading: Reading) -> Array:
        return _pair_log_probs(model.config, params, batch, config, reading=reading)

    log_probs = values_of_rows(model.config, of_pairs, compute_dtype=compute_dtype, mesh=mesh)
    result: list[Record] = []
    with progress.bar("reference log-probabilities", len(rows), unit="pairs") as bar:
        for part, batch in filled_batches(rows, pairs_per_batch, mesh):
            values = parallel.to_host(log_probs(model.params, batch))
            result += [
                {**row, "reference_log_probs": value}
                for row, value in zip(part, values, strict=False)
            ]
            bar.advance(len(part), tokens=sum(int((row["segment_ids"] > 0).sum()) for row in part))
    return result


def dpo_loss(
    model: LlamaConfig,
    config: DpoConfig = DpoConfig(),
    *,
    remat: Remat = "none",
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
) -> LossFn:
    """The loss of `training.train` over batches of `with_reference`'s rows.

    A pair is its unit of weight. Per pair, with log-probabilities summed over an answer's tokens,
    and unless the config says otherwise:
    -log sigmoid(beta (log pi(c) / ref(c) - log pi(r) / ref(r))) - nll_weight log pi(c) / |c|.

    Terms: those of `losses.dpo`, the loss by its name, "nll", "chosen_log_prob" and
    "rejected_log_prob", the last two sums over an answer. `remat`, `compute_dtype` and `mesh` are
    those of `training.language_model_loss`.
    """

    def totals(
        params: Any, batch: Mapping[str, Any], step: Array, shares: parallel.Shares | None
    ) -> losses.Totals:
        del step
        reading = Reading() if shares is None else Reading.of(shares)
        log_probs_B2 = _pair_log_probs(model, params, batch, config, remat, reading)
        reference_B2 = batch["reference_log_probs"]
        lengths_B2 = jnp.sum(batch["where"], axis=-1)
        loss_B, terms = _preference_loss(config, log_probs_B2, reference_B2, lengths_B2)
        nll_B = losses.sequence_nll(log_probs_B2[:, 0], lengths_B2[:, 0])
        terms = {
            **terms,
            config.loss: loss_B,
            "nll": nll_B,
            "chosen_log_prob": log_probs_B2[:, 0],
            "rejected_log_prob": log_probs_B2[:, 1],
        }
        return losses.reduce(loss_B + config.nll_weight * nll_B, terms)

    return loss_of_rows(model, totals, compute_dtype=compute_dtype, mesh=mesh)


def _preference_loss(
    config: DpoConfig, log_probs_B2: Array, reference_B2: Array, lengths_B2: Array
) -> tuple[Array, dict[str, Array]]:
    """The config's loss [B] and its terms, from sums and numbers of tokens of both answers."""
    options: dict[str, Any] = {"beta": config.beta}
    if config.loss != "ipo":
        options["label_smoothing"] = config.label_smoothing
    if config.length_normalised:
        options["chosen_length_B"], options["rejected_length_B"] = lengths_B2.T
    return _LOSSES[config.loss](*log_probs_B2.T, *reference_B2.T, **options)


def _pair_log_probs(
    model: LlamaConfig,
    params: Any,
    batch: Mapping[str, Any],
    config: DpoConfig,
    remat: Remat = "none",
    reading: Reading = Reading(),
) -> Array:
    """[B, 2]: log-probability of the chosen and of the rejected answer of each pair."""
    rows = both_answers(batch)
    log_probs = sequence_log_probs(
        model, params, rows, chunk=config.chunk, remat=remat, reading=reading
    )
    return log_probs.reshape(-1, 2)
