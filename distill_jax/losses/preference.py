"""Direct preference optimisation."""

import jax
import jax.numpy as jnp


def dpo(
    policy_chosen_logp_B: jax.Array,
    policy_rejected_logp_B: jax.Array,
    reference_chosen_logp_B: jax.Array,
    reference_rejected_logp_B: jax.Array,
    *,
    beta: float = 0.1,
    chosen_length_B: jax.Array | None = None,
    rejected_length_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log sigmoid(r_chosen - r_rejected), r = beta (log pi - log pi_ref) (Rafailov et al. 2023).

    With both lengths, each log-ratio is divided by its completion's number of tokens, so that a
    long completion is no larger a lever than a short one (Lambert et al. 2024, Tulu 3).

    Args:
      policy_chosen_logp_B: [B], log-probability of the chosen completion, summed over its tokens.
      policy_rejected_logp_B: [B], the same of the rejected one.
      reference_chosen_logp_B: [B], of the chosen one under the frozen reference.
      reference_rejected_logp_B: [B], of the rejected one under it.
      beta: how dear it is to leave the reference.
      chosen_length_B: [B], tokens of the chosen completion, at least 1.
      rejected_length_B: [B], tokens of the rejected one, at least 1.

    Returns:
      float32 loss [B], and the terms "reward_margin" and "reward_accuracy" [B].

    Raises:
      ValueError: shapes that differ, or one length without the other.
    """
    if (chosen_length_B is None) != (rejected_length_B is None):
        raise ValueError("pass both chosen_length_B and rejected_length_B, or neither")
    chosen = _log_ratio(policy_chosen_logp_B, reference_chosen_logp_B, chosen_length_B)
    rejected = _log_ratio(policy_rejected_logp_B, reference_rejected_logp_B, rejected_length_B)
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen {chosen.shape} and rejected {rejected.shape} differ in shape")
    margin = beta * (chosen - rejected)
    terms = {"reward_margin": margin, "reward_accuracy": (margin > 0).astype(jnp.float32)}
    return -jax.nn.log_sigmoid(margin), jax.lax.stop_gradient(terms)


def _log_ratio(policy: jax.Array, reference: jax.Array, length: jax.Array | None) -> jax.Array:
    shapes = {array.shape for array in (policy, reference, length) if array is not None}
    if len(shapes) != 1:
        raise ValueError(f"log-probabilities and lengths differ in shape: {sorted(shapes)}")
    ratio = jnp.asarray(policy, jnp.float32) - jax.lax.stop_gradient(
        jnp.asarray(reference, jnp.float32)
    )
    return ratio if length is None else ratio / length
