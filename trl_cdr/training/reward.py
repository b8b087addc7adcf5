"""Score -> TRL's reward-function contract. Touches no model; `scoring.scorer` does the work."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import CDRConfig
from ..errors import UnscorableError
from ..scoring.encoding import Message, Prompt
from ..scoring.scorer import DensityRatioScorer, Score

logger = logging.getLogger(__name__)


class CDRReward:
    """
    A reward function for TRL's trainers: the log-density ratio of a strong over a weak model, in nats.

    Pass it as `reward_funcs=` to `OnlineDPOTrainer`, `GRPOTrainer` or `RLOOTrainer`. The pair is loaded inside the
    first call, on the trainer process's own device, and stays there.

    Args:
        strong, weak (`str` or `nn.Module`): Better and less aligned model: a name, a path, or a loaded model, which is
            used as it is and never changed.
        strong_tokenizer, weak_tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed with a loaded model.
        **options: The fields of [`CDRConfig`] without their prefix.

    Raises:
        ConfigError: an argument is missing, unknown or not allowed.

    Example:

    ```python
    from trl.experimental.online_dpo import OnlineDPOTrainer
    from trl_cdr import CDRReward

    reward = CDRReward(
        strong="NousResearch/Nous-Hermes-2-Mistral-7B-DPO", weak="teknium/OpenHermes-2.5-Mistral-7B", dtype="bfloat16"
    )
    trainer = OnlineDPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    ```
    """

    def __init__(
        self,
        strong: str | nn.Module | None = None,
        weak: str | nn.Module | None = None,
        *,
        strong_tokenizer: PreTrainedTokenizerBase | None = None,
        weak_tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        self.scorer = DensityRatioScorer(
            strong, weak, strong_tokenizer=strong_tokenizer, weak_tokenizer=weak_tokenizer, **options
        )
        # TRL < 1.9 reads __name__ unguarded, and every version shows it in its logs (trl#6313).
        self.__name__ = f"{self.config.cdr_name}_reward"

    @classmethod
    def from_config(cls, config: CDRConfig, args: Any = None) -> "CDRReward":
        """
        Build from a parsed [`CDRConfig`].

        Args:
            config (`CDRConfig`): Every option; both models by name or path.
            args (`TrainingArguments`, *optional*): The trainer's; its `seed` stands in for the default `cdr_seed`.
        """
        return cls(**config.options(args))

    @property
    def config(self) -> CDRConfig:
        """The options in force."""
        return self.scorer.config

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[Message]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,  # noqa: ARG002 - TRL's contract: data set columns, trainer_state, log_extra, ...
    ) -> list[float | None]:
        """
        Reward each completion, as TRL calls it.

        Args:
            prompts, completions (`Sequence`): Strings or conversations, as many of one as of the other.
            completion_ids (`Sequence[Sequence[int]]`, *optional*): The policy's token ids, padded or not.
            log_metric (`Callable`, *optional*): GRPO's and RLOO's; receives the shares `<name>/unscorable` and
                `<name>/truncated` of each call.
            **columns: What else the trainer hands over; not used.

        Returns:
            `list[float | None]`: one finite reward for each completion, in nats; `None` only where
            `cdr_on_unscorable="none"` asks for it.

        Raises:
            UnscorableError: a row can't be scored and `cdr_on_unscorable="raise"`.
            InputError, ConfigError, ModelError: see `DensityRatioScorer.score`.
        """
        # GRPO and RLOO hand over a bound method of the trainer, the one way to its tokenizer that a callable has.
        policy_tokenizer = getattr(getattr(log_metric, "__self__", None), "processing_class", None)
        if policy_tokenizer is not None:
            self.scorer.use_policy_tokenizer(policy_tokenizer)
        scores = self.scorer.score(prompts, completions, completion_ids=completion_ids)
        unscorable = [index for index, score in enumerate(scores) if score.error is not None]
        if unscorable:
            logger.warning(
                "%s: %d of %d completions could not be scored. The first, row %d: %s.",
                self.__name__,
                len(unscorable),
                len(scores),
                unscorable[0],
                scores[unscorable[0]].error,
            )
        if log_metric is not None and scores:
            log_metric(f"{self.config.cdr_name}/unscorable", len(unscorable) / len(scores))
            log_metric(f"{self.config.cdr_name}/truncated", sum(score.truncated for score in scores) / len(scores))
        return rewards_from_scores(scores, on_unscorable=self.config.cdr_on_unscorable)


def rewards_from_scores(scores: Sequence[Score], *, on_unscorable: str) -> list[float | None]:
    """
    Turn scores into rewards.

    Args:
        scores (`Sequence[Score]`): One call's.
        on_unscorable (`str`): For a row without a value. `"floor"`: the worst finite reward of the call minus 1 nat, or
            -1 where there is none. Online DPO reads a missing reward as 0, which would win against honest negative
            log-ratios. `"none"`: `None`. `"raise"`: stop.

    Raises:
        UnscorableError: a row has no value and `on_unscorable="raise"`.
    """
    values = [score.value for score in scores]
    assert all(value is None or math.isfinite(value) for value in values)
    if on_unscorable == "raise":
        for index, score in enumerate(scores):
            if score.error is not None:
                raise UnscorableError(
                    f"row {index} can't be scored: {score.error}. Mend the row, or pass cdr_on_unscorable='floor'."
                )
    if on_unscorable != "floor":
        return values
    floor = min((value for value in values if value is not None), default=0.0) - 1.0
    return [floor if value is None else value for value in values]
