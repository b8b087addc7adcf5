"""Rewards of one prompt's completions -> which is better: TRL's judge protocol. Touches no model; `reward` is compared.

TRL 1.0 hands conversations to a judge as rendered text; `read_rendered` turns them back into messages.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .._compat import has_judges, register_pairwise_judge
from ..conditioning.router import COLUMN
from ..config import CDRConfig
from ..errors import ConfigError, InputError, UnscorableError
from ..scoring.rewards import rewards_from_scores
from ..scoring.types import Message, Prompt, shorten
from .reward import CDRReward

logger = logging.getLogger(__name__)

Text = str | Sequence[Message]

# TRL 1.0 renders each turn before a judge sees it as "User: hello\n\n", whatever the policy's chat template.
_TURN = re.compile(r"(?:\A|(?<=\n\n))(System|User|Assistant): ")
_OPENING, _CLOSING = "Assistant: ", "\n\n"


class CDRJudge:
    """
    A judge: of two completions to a prompt, the one with the higher density-ratio reward is better.

    Takes the place of TRL's `PairRMJudge` and its like as `judge=` of `OnlineDPOTrainer`, `XPOTrainer`,
    `NashMDTrainer` and `WinRateCallback` in TRL 1.0, the last version with judges; in later versions it judges pairs in
    your own code. For training, `reward_funcs=` with [`CDRReward`] says the same and knows more: a judge is told no
    token ids, so that it takes every completion for finished, and scores an end token also where the policy was cut
    off.

    What is compared are rewards: log-ratios behind the gate, as of [`CDRReward`].

    Args:
        reward (`CDRReward`, *optional*): The reward to judge by; its models are shared.
        temperature (`float`, *optional*, defaults to `1.0`): Nats of margin for each unit of log-odds, in the
            probabilities that `return_scores=True` asks for. Margins of long completions are tens of nats: raise it
            where all probabilities are 0 or 1.
        **options: In place of `reward`: those of [`CDRReward`]. `on_unscorable="raise"` stops at a completion that
            can't be scored; otherwise there is no verdict, whatever it says.

    Raises:
        ConfigError: an argument is missing, unknown or not allowed.

    Example:

    ```python
    judge = CDRJudge(strong="Qwen/Qwen2.5-0.5B-Instruct", weak="Qwen/Qwen2.5-0.5B")
    judge.judge([[{"role": "user", "content": "What is 2 + 2?"}]], [["4", "5"]])  # [0]: the first is better
    ```
    """

    def __init__(self, reward: CDRReward | None = None, *, temperature: float = 1.0, **options: Any) -> None:
        if reward is None:
            reward = CDRReward(**options)
        elif not isinstance(reward, CDRReward):
            raise ConfigError(
                f"reward is {shorten(reward)}. Pass a CDRReward, or the options of one by name: strong=, weak=."
            )
        elif options:
            raise ConfigError(
                f"reward is given, and {next(iter(options))} too: a judge compares what the reward says. "
                "Give the option to the CDRReward."
            )
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ConfigError(
                f"temperature is {temperature!r}: margins are divided by it. Use a number above 0, such as 1.0."
            )
        if (reward.config.cdr_router or "").startswith(COLUMN):
            raise ConfigError(
                f"router is {reward.config.cdr_router!r}, and a judge is told no columns. Use router='likelihood', a "
                "function of the prompt, or domain=."
            )
        self.reward = reward
        self.temperature = temperature
        register_pairwise_judge(CDRJudge)

    @classmethod
    def from_config(cls, config: CDRConfig, args: Any = None) -> "CDRJudge":
        """
        Build from a parsed [`CDRConfig`].

        Args:
            config (`CDRConfig`): Every option; both models by name or path.
            args (`TrainingArguments`, *optional*): The trainer's; its `seed` stands in for the default `cdr_seed`.
        """
        return cls(CDRReward.from_config(config, args))

    def judge(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Text]],
        shuffle_order: bool = True,  # noqa: ARG002 - TRL's protocol
        return_scores: bool = False,
    ) -> list[int] | list[float]:
        """
        Judge pairs of completions, as TRL calls it.

        Args:
            prompts (`Sequence`): Strings, conversations, or conversations as TRL 1.0 renders them.
            completions (`Sequence[Sequence]`): Two completions to each prompt, of the same kind.
            shuffle_order (`bool`, *optional*, defaults to `True`): Without effect: each completion is scored by itself,
                so its place in the pair can't matter.
            return_scores (`bool`, *optional*, defaults to `False`): Whether to return probabilities.

        Returns:
            `list[int]`: For each pair the index of the better completion. A tie (equal texts, say) is 0, as where TRL
            compares two rewards. -1 where a completion can't be scored, with one warning a call that counts them; TRL's
            trainers then take the second.

            `list[float]`, with `return_scores`: the probability that the first is better, `sigmoid(margin /
            temperature)`. Both a tie and a pair without a verdict are 0.5, where Nash-MD draws nothing from the pair;
            `WinRateCallback(use_soft_judge=True)` counts 0.5 as a win of the policy in `eval_win_rate`, not in
            `eval_avg_win_prob`.

        Raises:
            InputError: lengths differ, or a prompt has not two completions.
            UnscorableError: a completion can't be scored and `on_unscorable="raise"`.
            ConfigError, ModelError: see `DensityRatioScorer.score`.
        """
        groups = _read_groups(prompts, completions)
        for index, group in enumerate(groups):
            if len(group) != 2:
                raise InputError(
                    f"completions[{index}] has length {len(group)}: a judge compares two completions to each prompt. "
                    "Pass two, or use rank for larger groups."
                )
        pairs = self._rewards(prompts, groups)
        if return_scores:
            return [win_probability(first, second, temperature=self.temperature) for first, second in pairs]
        return [better(first, second) for first, second in pairs]

    def rank(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Text]],
        shuffle_order: bool = True,  # noqa: ARG002 - TRL's protocol
    ) -> list[list[int]]:
        """
        Order groups of completions, in the convention of TRL's `BaseRankJudge`.

        Args:
            prompts (`Sequence`): As of `judge`.
            completions (`Sequence[Sequence]`): Two or more completions to each prompt; groups may differ in size.
            shuffle_order (`bool`, *optional*, defaults to `True`): Without effect.

        Returns:
            `list[list[int]]`: For each group its indices, best first. Ties keep their order; what can't be scored is
            last, with one warning a call.

        Raises:
            InputError: lengths differ, or a prompt has fewer than two completions.
            UnscorableError, ConfigError, ModelError: as `judge`.
        """
        groups = _read_groups(prompts, completions)
        for index, group in enumerate(groups):
            if len(group) < 2:
                raise InputError(
                    f"completions[{index}] has length {len(group)}: an order needs at least two completions. Pass "
                    "more, or score single ones with CDRReward."
                )
        return [best_first(rewards) for rewards in self._rewards(prompts, groups)]

    def _rewards(self, prompts: Sequence[Prompt], groups: list[list[Text]]) -> list[list[float | None]]:
        """The reward of each completion of each prompt, nats; `None` where it can't be scored."""
        read = [read_rendered(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
        places = [(row, index) for row, (_, group) in enumerate(read) for index in range(len(group))]
        in_trainer = has_judges()  # trainers of TRL 1.0 ask it about their policy's texts
        found = self.reward.scorer.score(
            [read[row][0] for row, _ in places],
            [read[row][1][index] for row, index in places],
            is_generated=[in_trainer] * len(places),
            in_trainer=in_trainer,
        )
        scores = dict(zip(places, found, strict=True))
        unscorable = [place for place in places if scores[place].error is not None]
        if unscorable:
            row, index = unscorable[0]
            reason = f"completion {index} of prompt {row} can't be scored: {scores[row, index].error}"
            if self.reward.config.cdr_on_unscorable == "raise":
                raise UnscorableError(f"{reason}. Mend it, or pass cdr_on_unscorable='none'.")
            logger.warning(
                "%s_judge: %d of %d prompts have a completion that can't be scored. The first: %s.",
                self.reward.config.cdr_name,
                len({row for row, _ in unscorable}),
                len(groups),
                reason,
            )
        values = rewards_from_scores(found, on_unscorable="none", reduction=self.reward.config.cdr_reduction)
        rewards = dict(zip(places, values, strict=True))
        return [[rewards[row, index] for index in range(len(group))] for row, (_, group) in enumerate(read)]


def better(first: float | None, second: float | None) -> int:
    """The index of the higher reward, 0 for equal ones; -1 where one is missing."""
    if first is None or second is None:
        return -1
    return 0 if first >= second else 1


def win_probability(first: float | None, second: float | None, *, temperature: float) -> float:
    """
    The probability that the first is better (Bradley-Terry), `sigmoid((first - second) / temperature)`.

    Args:
        first, second (`float` or `None`): Rewards, nats. Where one is missing nothing is known: 0.5.
        temperature (`float`): Nats for each unit of log-odds, above 0.
    """
    if first is None or second is None:
        return 0.5
    return 0.5 + 0.5 * math.tanh((first - second) / (2 * temperature))


def best_first(rewards: Sequence[float | None]) -> list[int]:
    """The indices of rewards from the highest to the lowest, equal ones in their order, missing ones last."""
    known = [(-reward, index) for index, reward in enumerate(rewards) if reward is not None]
    return [index for _, index in sorted(known)] + [index for index, reward in enumerate(rewards) if reward is None]


def read_rendered(prompt: Prompt, completions: list[Text]) -> tuple[Prompt, list[Text]]:
    """
    Turn what TRL 1.0 renders for a judge back into messages, so that each model's own chat template is used.

        "User: What is 2 + 2?\\n\\n", ["Assistant: 4\\n\\n", "Assistant: 5\\n\\n"]

    Only where the prompt and all its completions have that form; all else is returned as it is. The rendering can't be
    undone with certainty: a turn that itself holds an empty line and then `User: ` is read as two.

    Args:
        prompt (`str` or `Sequence[Message]`): What is continued.
        completions (`list`): Its completions.
    """
    if not isinstance(prompt, str) or not _TURN.match(prompt) or not prompt.endswith(_CLOSING):
        return prompt, completions
    answers: list[Text] = []
    for completion in completions:
        if not (isinstance(completion, str) and completion.startswith(_OPENING) and completion.endswith(_CLOSING)):
            return prompt, completions
        content = completion.removeprefix(_OPENING).removesuffix(_CLOSING)
        answers.append([{"role": "assistant", "content": content}])
    turns = list(_TURN.finditer(prompt))
    ends = [turn.start() for turn in turns[1:]] + [len(prompt)]
    messages: list[Message] = [
        {"role": turn[1].lower(), "content": prompt[turn.end() : end - len(_CLOSING)]}
        for turn, end in zip(turns, ends, strict=True)
    ]
    return messages, answers


def _read_groups(prompts: Any, completions: Any) -> list[list[Text]]:
    """The completions of each prompt, of which there are as many."""
    for name, values in {"prompts": prompts, "completions": completions}.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise InputError(f"{name} is {shorten(values)}. Pass a list with one entry for each prompt.")
    if len(prompts) != len(completions):
        raise InputError(
            f"completions has {len(completions)} groups and prompts has {len(prompts)} entries: each prompt has a "
            "group of completions. Pass as many of one as of the other."
        )
    for index, group in enumerate(completions):
        if isinstance(group, (str, Mapping)) or not hasattr(group, "__len__"):
            raise InputError(
                f"completions[{index}] is {shorten(group)}: a judge compares several completions to a prompt. Pass a "
                "list of them."
            )
    return [list(group) for group in completions]
