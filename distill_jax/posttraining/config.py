"""What a recipe says of post-training."""

import dataclasses

from distill_jax.artifacts import InputError
from distill_jax.posttraining.dpo import DpoConfig
from distill_jax.posttraining.on_policy import OnPolicyConfig
from distill_jax.posttraining.rejection import REWARD_MODEL, RejectionConfig
from distill_jax.posttraining.reward_model import RewardModelConfig
from distill_jax.posttraining.sft import SftConfig
from distill_jax.posttraining.tasks import TASK, TASKS
from distill_jax.training import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostTrainingConfig:
    """From the distilled model to one that answers: SFT, what follows it, rejection sampling, DPO.

    Attributes:
      task: the verifiable task, a key of `posttraining.TASKS`, whose held-out problems every model
        is measured with; None: there is none, and all data come from files.
      problems: at most so many training problems are used; None for all.
      averaged: every training but the on-policy one is made so many times, each with the next seed
        and so another order of rows, and leaves the mean of what came of them. (Llama 3, 2024,
        section 4.1.5, averages over data and settings: `models.average`.)
      sft: rows and loss of supervised fine-tuning.
      sft_train: how it goes; None leaves it out, as in a round that starts from samples.
      replay: the share of fine-tuning's rows that are plain text of the corpus, in [0, 1): without
        any, a small model forgets the text while it learns to answer (Ibrahim et al., 2024). Every
        token of the text is learnt, and only answers of the others: of the loss it is far more.
        Rows of both must be of one length.
      on_policy: how the model so far writes, and what a teacher corrects.
      on_policy_train: how it goes; None leaves on-policy distillation out.
      reward_model: what a reward model learns from.
      reward_train: how it goes; None leaves it out. It starts from the model so far, and is the
        reward of rejection sampling if `rejection.reward` is "reward_model".
      rejection: how answers are drawn and chosen.
      rejection_train: fine-tuning on the chosen answers; None leaves rejection sampling out.
      dpo: pairs and loss of preference optimisation.
      dpo_train: how it goes; None leaves preference optimisation out.
    """

    task: str | None = None
    problems: int | None = None
    averaged: int = 1
    sft: SftConfig = SftConfig()
    sft_train: TrainConfig | None = None
    replay: float = 0.0
    on_policy: OnPolicyConfig = OnPolicyConfig()
    on_policy_train: TrainConfig | None = None
    reward_model: RewardModelConfig = RewardModelConfig()
    reward_train: TrainConfig | None = None
    rejection: RejectionConfig = RejectionConfig()
    rejection_train: TrainConfig | None = None
    dpo: DpoConfig = DpoConfig()
    dpo_train: TrainConfig | None = None

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"posttraining.task: {self.task!r} is none of {', '.join(TASKS)}")
        for field, data in (
            ("sft.data", self.sft.data),
            ("on_policy.prompts", self.on_policy.prompts),
            ("rejection.prompts", self.rejection.prompts),
            ("reward_model.pairs", self.reward_model.pairs),
            ("dpo.pairs", self.dpo.pairs),
        ):
            if not data:
                raise InputError(f"posttraining.{field}: no source")
        if not self.trainings:
            raise InputError("posttraining: no stage is trained; set sft_train, or another")
        if self.averaged < 1:
            raise InputError(f"posttraining.averaged is {self.averaged}; it must be positive")
        samples = self.rejection_train is not None
        if self.task is None and self.learns_conversations and self.sft.uses_task:
            raise InputError("posttraining.sft.data: needs the problems of posttraining.task")
        if self.task is None and samples and self.rejection.asks_task:
            raise InputError("posttraining.rejection.prompts: need those of posttraining.task")
        if samples and self.rejection.files and self.rejection.reward == TASK:
            raise InputError("posttraining.rejection.reward: the task's cannot score files")
        if samples and self.rejection.reward == REWARD_MODEL and self.reward_train is None:
            raise InputError("posttraining.rejection.reward: needs the model of reward_train")
        if self.reward_train is not None and self.reward_model.uses_samples:
            raise InputError("posttraining.reward_model.pairs: name files; nothing is sampled yet")
        if self.dpo_train is not None and self.dpo.uses_samples and not samples:
            raise InputError("posttraining.dpo.pairs: needs the samples of rejection_train")
        if self.sft.template != self.rejection.template:
            raise InputError("posttraining: sft.template and rejection.template differ")
        if not 0 <= self.replay < 1:
            raise InputError(f"posttraining.replay is {self.replay}; it must be in [0, 1)")
        if self.on_policy_train is not None:
            self._check_on_policy(self.on_policy_train)

    def _check_on_policy(self, train: TrainConfig) -> None:
        config = self.on_policy
        if config.teacher is None:
            raise InputError("posttraining.on_policy.teacher: name a teacher of the recipe")
        if self.task is None and config.asks_task:
            raise InputError("posttraining.on_policy.prompts: need those of posttraining.task")
        if config.template != self.sft.template:
            raise InputError("posttraining: sft.template and on_policy.template differ")
        if config.rollout_rows is not None and config.rollout_rows % train.batch_rows:
            raise InputError(
                f"posttraining.on_policy.rollout_rows: {config.rollout_rows} is no multiple of "
                f"on_policy_train.batch_rows {train.batch_rows}"
            )
        if config.uses_conversations and config.sequence_length < self.sft.sequence_length:
            raise InputError(
                f"posttraining.on_policy.sequence_length: {config.sequence_length} is less than "
                f"sft.sequence_length {self.sft.sequence_length}, whose conversations are learnt"
            )

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Those that there are, in order, by the field they stand in."""
        fields = ("sft", "on_policy", "reward", "rejection", "dpo")
        trains = {f"{field}_train": getattr(self, f"{field}_train") for field in fields}
        return {field: train for field, train in trains.items() if train is not None}

    @property
    def learns_conversations(self) -> bool:
        """Whether a stage reads `sft.data`."""
        given = self.on_policy_train is not None and self.on_policy.uses_conversations
        return given or self.sft_train is not None

    @property
    def learns_rows(self) -> bool:
        """Whether a stage makes rows of `sft.sequence_length`."""
        return self.learns_conversations or self.rejection_train is not None

    @property
    def longest_answer(self) -> int:
        """Tokens that a question and a sampled answer may have, so that all stages can learn it."""
        lengths = [self.sft.sequence_length]
        if self.dpo_train is not None and self.dpo.uses_samples:
            lengths.append(self.dpo.sequence_length)
        return min(lengths)
