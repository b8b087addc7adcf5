"""OnlinePreferenceConfig: what `OnlinePreferenceTrainer` is told, and what it refuses before a model is loaded."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from trl import GRPOConfig

from ..errors import ConfigError
from ..scoring.selection import PairStrategy

PreferenceLoss = Literal["simpo", "dpo", "ipo"]

# Scale of each loss where the user names none: SimPO's paper (section 3) and TRL's DPOConfig.
_PREFERENCE_BETA = {"simpo": 2.0, "dpo": 0.1, "ipo": 0.1}
_GAMMA_BETA_RATIO = 0.5  # where SimPO's authors start their search
# Fields of GRPO's own loss, which this trainer does not compute: a value there would say what nobody does.
_GRPO_LOSS = {
    "num_iterations",
    "epsilon",
    "epsilon_high",
    "delta",
    "loss_type",
    "importance_sampling_level",
    "scale_rewards",
    "top_entropy_quantile",
    "entropy_coef",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "use_adaptive_entropy",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_cap",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
}


@dataclass
class OnlinePreferenceConfig(GRPOConfig):  # type: ignore[misc]
    """
    Arguments of [`OnlinePreferenceTrainer`]: GRPO's for generation, rewards, logging and vLLM, and the preference loss.

    Fields of GRPO's loss (`epsilon`, `loss_type`, ...) and its `beta` are not to be set. Where `load_best_model_at_end`
    or `save_strategy="best"` asks which checkpoint is best and nothing else is named, it is the one with the highest
    `eval_reward`: a loss is low where the pairs are easy, also because the completions got worse.

    Raises:
        ConfigError: a value is out of range, a field has no effect on the chosen loss, or a group of completions does
            not fit into a batch.
    """

    preference_loss: PreferenceLoss = field(
        default="simpo",
        metadata={"help": "simpo: without a reference, on mean log-probabilities; dpo, ipo: against the reference."},
    )
    preference_beta: float | None = field(
        default=None, metadata={"help": "Scale of the loss. Default: 2.0 for simpo, 0.1 for dpo and ipo."}
    )
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "simpo: the margin that is asked for, after scaling by preference_beta. Default: half of it."
        },
    )
    gamma_beta_ratio: float | None = field(
        default=None, metadata={"help": "simpo: gamma as a multiple of preference_beta, in place of gamma."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "simpo, dpo: probability that a label is the wrong way round."}
    )
    sft_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the chosen completion's mean negative log-likelihood, added to the loss (RPO). It keeps "
            "the chosen from becoming unlikely together with the rejected."
        },
    )
    pair_strategy: PairStrategy = field(
        default="best_worst",
        metadata={"help": "The best completion of a group is chosen. Rejected is the worst, or a random other."},
    )
    min_margin: float = field(
        default=0.0,
        metadata={
            "help": "A pair has no weight if its rewards differ by less. Unit: the reward's; standard deviations with "
            "multi_objective_aggregation=normalize_then_sum."
        },
    )
    beta: float | None = field(
        default=None, metadata={"help": "GRPO's; not to be set: see preference_beta. The trainer sets it."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Disable dropout: the loss compares log-probabilities of two completions."}
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={"help": "A completion that reached max_completion_length without ending is in no pair."},
    )
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Of evaluation; default, where the best checkpoint is asked for: eval_reward."}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether higher metric values are better; eval_reward's are."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "GRPO's; not to be set: pairs are not weighted by importance."}
    )

    def __post_init__(self) -> None:
        self._check_loss()
        self._check_grpo_fields()
        self._check_batches()
        self._choose_metric()
        super().__post_init__()
        self._check_generation()

    def _check_loss(self) -> None:
        """Choices and ranges; fills in what was left open."""
        for name, allowed in (("preference_loss", PreferenceLoss), ("pair_strategy", PairStrategy)):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"{name} is {getattr(self, name)!r}. Use one of: {', '.join(get_args(allowed))}.")
        if self.preference_beta is None:
            self.preference_beta = _PREFERENCE_BETA[self.preference_loss]
        if not _is_number(self.preference_beta) or self.preference_beta <= 0:
            raise ConfigError(f"preference_beta is {self.preference_beta!r}. Use a number above 0.")
        for name in ("gamma", "gamma_beta_ratio", "sft_coef", "min_margin"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= 0):
                raise ConfigError(f"{name} is {value!r}. Use a number of 0 or more.")
        if not (_is_number(self.label_smoothing) and 0 <= self.label_smoothing < 0.5):
            raise ConfigError(f"label_smoothing is {self.label_smoothing!r}. Use a number from 0 to below 0.5.")
        if self.preference_loss == "simpo":
            self._fill_gamma()
        else:
            for name in ("gamma", "gamma_beta_ratio"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} is {getattr(self, name)}, and {self.preference_loss} has no margin. Leave it out, or "
                        "pass preference_loss=simpo."
                    )
        if self.preference_loss == "ipo" and self.label_smoothing:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}, and ipo has none. Leave it out, or use simpo or dpo."
            )

    def _fill_gamma(self) -> None:
        assert self.preference_beta is not None
        ratio = self.gamma_beta_ratio
        if self.gamma is None:
            self.gamma = self.preference_beta * (_GAMMA_BETA_RATIO if ratio is None else ratio)
        elif ratio is not None and not math.isclose(self.gamma, self.preference_beta * ratio):
            raise ConfigError(
                f"gamma is {self.gamma}, and gamma_beta_ratio {ratio} makes it {self.preference_beta * ratio}. Pass "
                "one of them."
            )

    def _check_grpo_fields(self) -> None:
        """GRPO's `beta` is the trainer's to set; fields of its loss would have no effect."""
        expected = 0.0 if self.preference_loss == "simpo" else self.preference_beta
        if self.beta is not None and self.beta != expected:
            raise ConfigError(f"beta is {self.beta}: it belongs to GRPO's loss. Leave it out; pass preference_beta.")
        self.beta = expected  # above 0: GRPO loads the reference
        if getattr(self, "scale_rewards", None) is True:
            self.scale_rewards = "group"  # as GRPO reads it: its default
        for each in fields(self):
            if each.name in _GRPO_LOSS and getattr(self, each.name) != each.default:
                raise ConfigError(
                    f"{each.name} is {getattr(self, each.name)!r}: it belongs to GRPO's loss, which this trainer does "
                    "not compute. Leave it out."
                )

    def _check_batches(self) -> None:
        for name in ("num_generations", "num_generations_eval"):
            value = getattr(self, name)
            if value is None and name == "num_generations_eval":
                continue
            least = 2 if name == "num_generations" else 1  # an evaluation without pairs still has rewards
            if not isinstance(value, int) or value < least:
                reason = "a pair needs two completions" if least == 2 else "it counts completions"
                raise ConfigError(f"{name} is {value!r}: {reason}. Use {least} or more.")
        check_batch_size("per_device_train_batch_size", self.per_device_train_batch_size, self.num_generations)
        if getattr(self.eval_strategy, "value", self.eval_strategy) != "no":
            check_batch_size(
                "per_device_eval_batch_size",
                self.per_device_eval_batch_size,
                self.num_generations_eval or self.num_generations,
            )

    def _choose_metric(self) -> None:
        """What the best checkpoint is best at."""
        strategy = getattr(self.save_strategy, "value", self.save_strategy)
        scheduler = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        is_open = self.metric_for_best_model is None and self.greater_is_better is None
        # A scheduler that waits for a plateau takes the same metric, and takes it for one that is to fall.
        if is_open and (self.load_best_model_at_end or strategy == "best") and scheduler != "reduce_lr_on_plateau":
            self.metric_for_best_model = "eval_reward"
            self.greater_is_better = True

    def _check_generation(self) -> None:
        """Completions are the policy's own as it is: nothing here corrects for an older one's, as GRPO's loss does."""
        if self.gradient_accumulation_steps % self.steps_per_generation:
            raise ConfigError(
                f"steps_per_generation is {self.steps_per_generation} and gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}: some updates would learn from completions of a policy before the "
                f"last update, and GRPO would run each of these once more for nothing. Leave it out, or pass a divisor "
                f"of {self.gradient_accumulation_steps}."
            )


def check_batch_size(name: str, size: int, num_generations: int) -> None:
    """
    Whether a batch holds whole groups.

    Args:
        name (`str`): The argument that sets it.
        size (`int`): Completions in a batch of one process.
        num_generations (`int`): Completions of a group.

    Raises:
        ConfigError: a group would be split.
    """
    if size % num_generations:
        below = size - size % num_generations
        works = " or ".join(str(works) for works in (below, below + num_generations) if works)
        raise ConfigError(
            f"{name} is {size}, and a group has {num_generations} completions: it counts completions, and no group may "
            f"be split. Pass {works}, or another multiple of {num_generations}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
