"""What to minimise: pure functions of arrays that know no model, no configuration, no files."""

from distill_jax.losses.chunks import default_chunk
from distill_jax.losses.divergences import (
    adaptive_kl,
    alpha_beta_divergence,
    forward_kl,
    interpolate_logits,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from distill_jax.losses.ensembles import (
    agreement,
    disagreement,
    distill_mixture,
    label_confidence,
    mixture,
)
from distill_jax.losses.features import hidden_cosine, hidden_mse
from distill_jax.losses.fused import fused_linear
from distill_jax.losses.labels import cross_entropy, token_log_probs
from distill_jax.losses.objectives import (
    Objective,
    Schedule,
    TokenWeight,
    distill,
    hard_labels,
    taid,
    token_weighted,
    weighted_sum,
)
from distill_jax.losses.policy import (
    clipped_surrogate,
    gkd,
    importance_weights,
    minillm,
    minillm_advantages,
    mix_log_probs,
)
from distill_jax.losses.preference import (
    bradley_terry,
    dpo,
    ipo,
    robust_dpo,
    sequence_nll,
    sum_log_probs,
)
from distill_jax.losses.reduction import Totals, reduce
from distill_jax.losses.sharded import fused_linear_of_shares, sharded_fused_linear
from distill_jax.losses.targets import LiveTargets, SampledTargets, Teacher, TopKTargets

DIVERGENCES = {
    divergence.__name__: divergence
    for divergence in (
        adaptive_kl,
        alpha_beta_divergence,
        forward_kl,
        gkd,
        jensen_shannon,
        reverse_kl,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
    )
}
"""Every divergence by its name, for whoever chooses one by configuration."""

__all__ = [
    "DIVERGENCES",
    "LiveTargets",
    "Objective",
    "SampledTargets",
    "Schedule",
    "Teacher",
    "TokenWeight",
    "TopKTargets",
    "Totals",
    "adaptive_kl",
    "agreement",
    "alpha_beta_divergence",
    "bradley_terry",
    "clipped_surrogate",
    "cross_entropy",
    "default_chunk",
    "disagreement",
    "distill",
    "distill_mixture",
    "dpo",
    "forward_kl",
    "fused_linear",
    "fused_linear_of_shares",
    "gkd",
    "hard_labels",
    "hidden_cosine",
    "hidden_mse",
    "importance_weights",
    "interpolate_logits",
    "ipo",
    "jensen_shannon",
    "label_confidence",
    "minillm",
    "minillm_advantages",
    "mix_log_probs",
    "mixture",
    "reduce",
    "reverse_kl",
    "robust_dpo",
    "sequence_nll",
    "sharded_fused_linear",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "sum_log_probs",
    "taid",
    "token_log_probs",
    "token_weighted",
    "total_variation",
    "weighted_sum",
]
