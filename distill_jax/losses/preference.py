"""Losses on pairs of answers, of which one is preferred.

`bradley_terry` takes scores. All others take log-probabilities of whole answers, [B], as
`sum_log_probs` sums them, and return a float32 loss [B] and these terms [B], which carry no
gradient:

- "chosen_reward", "rejected_reward": beta (log pi - log pi_ref) of either answer;
- "reward_margin": the difference of the two; "reward_accuracy": 1 where it is above 0, else 0.

With both lengths each log-ratio is a mean over its answer's tokens instead of a sum. The reference
receives no gradient. All raise ValueError for shapes that differ, one length without the other and
parameters out of range.
"""

import jax
import jax.numpy as jnp

from distill_jax.losses.reduction import check_same_shape


def sum_log_probs(
    token_log_probs_BT: jax.Array, where_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log pi(y) = sum of log pi(y_t), and |y|, over the tokens of each answer that count.

    Llama 3 (section 4.1.4) leaves out the tokens of headers and of the end of a turn, since both
    answers share them: pushed up in one and down in the other, they make a model stutter or stop.

    Args:
      token_log_probs_BT: [B, T], as from `token_log_probs`.
      where_BT: [B, T], mask. What a token that is left out holds, be it NaN, changes nothing.

    Returns:
      float32 log-probabilities [B] and numbers of tokens [B]; an answer without any has 0 of both.

    Raises:
      ValueError: shapes that differ.
    """
    if token_log_probs_BT.shape != where_BT.shape:
        raise ValueError(
            f"where {where_BT.shape} does not fit log-probabilities {token_log_probs_BT.shape}"
        )
    counts = where_BT != 0
    log_probs = jnp.where(counts, jnp.asarray(token_log_probs_BT, jnp.float32), 0.0)
    return jnp.sum(log_probs, axis=-1), jnp.sum(counts, axis=-1, dtype=jnp.float32)


def sequence_nll(log_prob_B: jax.Array, length_B: jax.Array) -> jax.Array:
    """-log pi(y) / |y|: what Llama 3 adds to DPO for the chosen answer, at weight 0.2.

    It keeps the chosen answer likely while the margin grows (Pang et al. 2024). Being a mean over
    each answer, it weighs answers equally; TRL's term is a mean over the tokens of the batch.

    Args:
      log_prob_B: [B], log-probability of an answer under the policy, summed over its tokens.
      length_B: [B], its number of tokens; 0 counts as 1.

    Returns:
      float32 [B].
    """
    check_same_shape(log_prob_B=log_prob_B, length_B=length_B)
    return -_per_token(jnp.asarray(log_prob_B, jnp.float32), length_B)


def dpo(
    policy_chosen_logp_B: jax.Array,
    policy_rejected_logp_B: jax.Array,
    reference_chosen_logp_B: jax.Array,
    reference_rejected_logp_B: jax.Array,
    *,
    beta: float = 0.1,
    chosen_length_B: jax.Array | None = None,
    rejected_length_B: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), m = r_chosen - r_rejected.

    r = beta (log pi - log pi_ref); e = 0 is DPO (Rafailov et al. 2023), e > 0 conservative DPO
    (Mitchell 2023), which stops at the margin where sigmoid(m) = 1 - e. With both lengths a long
    answer is no larger a lever than a short one (Lambert et al. 2024, Tulu 3).

    Args:
      policy_chosen_logp_B: [B], log-probability of the chosen answer, summed over its tokens.
      policy_rejected_logp_B: [B], the same of the rejected one.
      reference_chosen_logp_B: [B], of the chosen one under the frozen reference.
      reference_rejected_logp_B: [B], of the rejected one under it.
      beta: how dear it is to leave the reference.
      chosen_length_B: [B], tokens of the chosen answer; 0 counts as 1.
      rejected_length_B: [B], tokens of the rejected one.
      label_smoothing: share e of pairs thought to be labelled the wrong way round, in [0, 0.5).

    Returns:
      Loss [B] and terms, see the module.
    """
    _check_smoothing(label_smoothing)
    margin, terms = _rewards(
        (policy_chosen_logp_B, reference_chosen_logp_B, chosen_length_B),
        (policy_rejected_logp_B, reference_rejected_logp_B, rejected_length_B),
        beta,
    )
    right, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return (1.0 - label_smoothing) * right + label_smoothing * flipped, terms


def robust_dpo(
    policy_chosen_logp_B: jax.Array,
    policy_rejected_logp_B: jax.Array,
    reference_chosen_logp_B: jax.Array,
    reference_rejected_logp_B: jax.Array,
    *,
    label_smoothing: float,
    beta: float = 0.1,
    chosen_length_B: jax.Array | None = None,
    rejected_length_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e) (Chowdhury et al. 2024).

    Where a share e of the pairs is labelled the wrong way round, its expectation is the loss of
    `dpo` on the right labels; it may be below 0. Arguments and returns are those of `dpo`.
    """
    _check_smoothing(label_smoothing)
    margin, terms = _rewards(
        (policy_chosen_logp_B, reference_chosen_logp_B, chosen_length_B),
        (policy_rejected_logp_B, reference_rejected_logp_B, rejected_length_B),
        beta,
    )
    right, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    loss = (1.0 - label_smoothing) * right - label_smoothing * flipped
    return loss / (1.0 - 2.0 * label_smoothing), terms


def ipo(
    policy_chosen_logp_B: jax.Array,
    policy_rejected_logp_B: jax.Array,
    reference_chosen_logp_B: jax.Array,
    reference_rejected_logp_B: jax.Array,
    *,
    beta: float = 0.1,
    chosen_length_B: jax.Array | None = None,
    rejected_length_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(h - 1 / (2 beta))^2, h = log(pi/ref)(chosen) - log(pi/ref)(rejected) (Azar et al. 2023).

    It has its minimum at a finite margin, so it does not overfit pairs that are always preferred.
    The paper's log-ratios (equation 17) are sums over tokens; TRL's are means: pass both lengths to
    have those, and choose beta anew, for 1 / (2 beta) is then a margin of means. Arguments and
    returns are those of `dpo`.
    """
    margin, terms = _rewards(
        (policy_chosen_logp_B, reference_chosen_logp_B, chosen_length_B),
        (policy_rejected_logp_B, reference_rejected_logp_B, rejected_length_B),
        beta,
    )
    return jnp.square((margin - 0.5) / beta), terms


def bradley_terry(
    chosen_score_B: jax.Array, rejected_score_B: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log sigmoid(r_chosen - r_rejected): what trains a reward model on pairs.

    The likelihood of Bradley and Terry (1952) that the chosen answer is preferred, as InstructGPT
    has it (Ouyang et al. 2022, equation 1) and Llama 3 (section 4.1.2), without a margin. Scores
    are known but for a constant.

    Args:
      chosen_score_B: [B], score of the chosen answer.
      rejected_score_B: [B], score of the rejected one.

    Returns:
      float32 loss [B] and these terms [B], which carry no gradient: "chosen_score",
      "rejected_score", "score_margin" and "score_accuracy", 1 where the margin is above 0, else 0.

    Raises:
      ValueError: shapes that differ.
    """
    check_same_shape(chosen_score_B=chosen_score_B, rejected_score_B=rejected_score_B)
    chosen, rejected = (
        jnp.asarray(score, jnp.float32) for score in (chosen_score_B, rejected_score_B)
    )
    terms = {
        "chosen_score": chosen,
        "rejected_score": rejected,
        "score_margin": chosen - rejected,
        "score_accuracy": (chosen > rejected).astype(jnp.float32),
    }
    return -jax.nn.log_sigmoid(chosen - rejected), jax.lax.stop_gradient(terms)


_Answer = tuple[jax.Array, jax.Array, jax.Array | None]  # policy, reference, length


def _rewards(
    chosen: _Answer, rejected: _Answer, beta: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The reward margin, which has a gradient, and the terms, which have none."""
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if (chosen[2] is None) != (rejected[2] is None):
        raise ValueError("pass both chosen_length_B and rejected_length_B, or neither")
    check_same_shape(
        policy_chosen=chosen[0],
        reference_chosen=chosen[1],
        chosen_length=chosen[2],
        policy_rejected=rejected[0],
        reference_rejected=rejected[1],
        rejected_length=rejected[2],
    )
    chosen_reward, rejected_reward = beta * _log_ratio(*chosen), beta * _log_ratio(*rejected)
    margin = chosen_reward - rejected_reward
    terms = {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).astype(jnp.float32),
    }
    return margin, jax.lax.stop_gradient(terms)


def _log_ratio(policy: jax.Array, reference: jax.Array, length: jax.Array | None) -> jax.Array:
    reference = jax.lax.stop_gradient(jnp.asarray(reference, jnp.float32))
    ratio = jnp.asarray(policy, jnp.float32) - reference
    return ratio if length is None else _per_token(ratio, length)


def _per_token(values_B: jax.Array, length_B: jax.Array) -> jax.Array:
    # An answer without tokens, such as a row that fills up a batch, must not become 0 / 0.
    return values_B / jnp.maximum(length_B, 1)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
