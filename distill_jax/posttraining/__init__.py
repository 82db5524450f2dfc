"""Post-training: chat templates, SFT, on-policy distillation, reward models, samples, DPO."""

from distill_jax.posttraining.answers import Answer, accuracy, answer
from distill_jax.posttraining.chat import (
    CHATML,
    CHATML_SPECIALS,
    LLAMA3,
    Example,
    Message,
    chat_template,
    encode_chat,
    encode_prompt,
    end_of_turn,
    render,
)
from distill_jax.posttraining.checks import check_files
from distill_jax.posttraining.config import PostTrainingConfig
from distill_jax.posttraining.conversations import (
    read_conversations,
    to_conversation,
    to_problem,
)
from distill_jax.posttraining.dpo import DpoConfig, dpo_loss, with_reference
from distill_jax.posttraining.log_probs import label_log_probs, sequence_log_probs
from distill_jax.posttraining.on_policy import (
    CONVERSATIONS,
    TEACHER,
    TEXT,
    OnPolicyConfig,
    on_policy_loss,
    on_policy_objective,
)
from distill_jax.posttraining.pairs import (
    Pair,
    PairConfig,
    encode_pair,
    pair_rows,
    sampled_pairs,
)
from distill_jax.posttraining.preferences import (
    Preference,
    read_pairs,
    read_preferences,
    to_preference,
)
from distill_jax.posttraining.prompts import PromptConfig, read_problems
from distill_jax.posttraining.rejection import (
    REWARD_MODEL,
    Choice,
    RejectionConfig,
    choose,
    chosen_examples,
    read_samples,
    sample,
    write_samples,
)
from distill_jax.posttraining.reward_model import (
    RewardModelConfig,
    preference_accuracy,
    reward_loss,
    reward_of,
    reward_token,
)
from distill_jax.posttraining.rewards import (
    VERIFIERS,
    Judge,
    Reward,
    by_program,
    by_reward,
    load_function,
    log_likelihood,
)
from distill_jax.posttraining.rollouts import Rollouts
from distill_jax.posttraining.rows import Record, pack, with_replay
from distill_jax.posttraining.sft import (
    SftConfig,
    read_examples,
    sft_loss,
    sft_rows,
    to_examples,
)
from distill_jax.posttraining.tasks import (
    TASK,
    TASKS,
    Problem,
    Task,
    demonstrations,
    load_task,
    to_messages,
)

__all__ = [
    "CHATML",
    "CHATML_SPECIALS",
    "CONVERSATIONS",
    "LLAMA3",
    "REWARD_MODEL",
    "TASK",
    "TASKS",
    "TEACHER",
    "TEXT",
    "VERIFIERS",
    "Answer",
    "Choice",
    "DpoConfig",
    "Example",
    "Judge",
    "Message",
    "OnPolicyConfig",
    "Pair",
    "PairConfig",
    "PostTrainingConfig",
    "Preference",
    "Problem",
    "PromptConfig",
    "Record",
    "RejectionConfig",
    "Reward",
    "RewardModelConfig",
    "Rollouts",
    "SftConfig",
    "Task",
    "accuracy",
    "answer",
    "by_program",
    "by_reward",
    "chat_template",
    "check_files",
    "choose",
    "chosen_examples",
    "demonstrations",
    "dpo_loss",
    "encode_chat",
    "encode_pair",
    "encode_prompt",
    "end_of_turn",
    "label_log_probs",
    "load_function",
    "load_task",
    "log_likelihood",
    "on_policy_loss",
    "on_policy_objective",
    "pack",
    "pair_rows",
    "preference_accuracy",
    "read_conversations",
    "read_examples",
    "read_pairs",
    "read_preferences",
    "read_problems",
    "read_samples",
    "render",
    "reward_loss",
    "reward_of",
    "reward_token",
    "sample",
    "sampled_pairs",
    "sequence_log_probs",
    "sft_loss",
    "sft_rows",
    "to_conversation",
    "to_examples",
    "to_messages",
    "to_preference",
    "to_problem",
    "with_reference",
    "with_replay",
    "write_samples",
]
