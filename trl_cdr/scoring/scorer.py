"""The one entrance to scoring: read, encode, run strong and weak, reduce -> Score.

Adapters (`training.reward`, the command line) turn scores into what their callers want; none of them touches a model.
"""

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..config import CDRConfig
from ..errors import ConfigError, InputError
from .completions import CompletionReader
from .encoding import Completion, Message, Prompt, Row, Unscorable, shorten
from .packing import Layout
from .pair import Pair, check_sources, load_pair, load_tokenizer
from .ratio import log_ratio, sum_logps


@dataclass(frozen=True, slots=True)
class Score:
    """
    What the pair says of one completion.

    Attributes:
        value (`float` or `None`): The log-ratio after the reduction, nats (nats per token for `mean`); `None` where it
            can't be computed.
        strong_logps, weak_logps (`float` or `None`): Log-probability of the whole completion under each model, nats.
        n_tokens (`int`): Completion tokens, end token included, as the strong model's tokenizer counts them; 0 where
            there is no score.
        domain (`str` or `None`): The row's domain, as given.
        finished (`bool` or `None`): The policy ended its turn (the end token was scored), was cut off, or nobody knows.
        truncated (`bool`): The prompt lost tokens on its left, for at least one of the models.
        per_token (`Tensor` of shape (T,) or `None`): Log-ratio of each completion token, nats, float32 on the CPU;
            where both models read the same tokens.
        error (`str` or `None`): Why there is no value.
    """

    value: float | None
    strong_logps: float | None = None
    weak_logps: float | None = None
    n_tokens: int = 0
    domain: str | None = None
    finished: bool | None = None
    truncated: bool = False
    per_token: Tensor | None = field(default=None, repr=False, compare=False)
    error: str | None = None


class DensityRatioScorer:
    """
    Scores completions by the log-density ratio of two causal language models (arXiv 2411.02481):

        value(x, y) = log p_strong(y | x) - log p_weak(y | x)        (nats)

    The pair is loaded inside the first call, on the process's own device. Deterministic; draws from no global random
    state; safe to call from several threads (one at a time runs); can be pickled, without loaded models.

    Args:
        strong, weak (`str` or `nn.Module`): Better and less aligned model: a name, a path, or a loaded model, which is
            used as it is and never changed.
        strong_tokenizer, weak_tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed with a loaded model.
        **options: The fields of [`CDRConfig`] without their prefix.

    Raises:
        ConfigError: an argument is missing, unknown or not allowed.

    Example:

    ```python
    scorer = DensityRatioScorer(strong="Qwen/Qwen2.5-0.5B-Instruct", weak="Qwen/Qwen2.5-0.5B")
    [score] = scorer.score(["What is 2 + 2?"], [" 4"])
    print(score.value, score.n_tokens)
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
        check_sources(strong, weak, strong_tokenizer, weak_tokenizer)
        names = {
            role: f"<{type(model).__name__}>" if isinstance(model, nn.Module) else str(model)
            for role, model in (("strong", strong), ("weak", weak))
        }
        self.config = CDRConfig.from_options(**names, **options)
        self._set_up(
            {"strong": strong, "weak": weak}, {"strong_tokenizer": strong_tokenizer, "weak_tokenizer": weak_tokenizer}
        )

    def _set_up(self, models: dict[str, Any], tokenizers: dict[str, Any], policy: Any = None) -> None:
        self._models = models
        self._tokenizers = tokenizers
        self._policy = policy
        self._reader: CompletionReader | None = None  # with its pair, once loaded
        self._lock = threading.RLock()

    @classmethod
    def from_config(cls, config: CDRConfig, args: Any = None) -> "DensityRatioScorer":
        """
        Build from a parsed [`CDRConfig`].

        Args:
            config (`CDRConfig`): Every option; both models by name or path.
            args (`TrainingArguments`, *optional*): The trainer's; its `seed` stands in for the default `cdr_seed`.
        """
        return cls(**config.options(args))

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[Message]],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        finished: Sequence[bool | None] | None = None,
        domains: Sequence[str | None] | None = None,
    ) -> list[Score]:
        """
        Score each completion to the prompt of the same index.

        Args:
            prompts (`Sequence`): Strings or conversations (lists of messages).
            completions (`Sequence`): Strings, or lists with one assistant message.
            completion_ids (`Sequence[Sequence[int]]`, *optional*): The tokens that the policy wrote, padded on the
                right or not. Where they decode to the completion's text under the pair's shared tokenizer they are
                scored as they are, and say whether the completion is finished.
            finished (`Sequence[bool | None]`, *optional*): Whether the policy ended its turn; used where ids don't
                say. Default: finished without `completion_ids`; with them, what the policy's tokenizer says.
            domains (`Sequence[str | None]`, *optional*): Returned with the scores.

        Returns:
            `list[Score]`: one for each prompt, in order. A row that can't be scored has `error` set and no value.

        Raises:
            InputError: lengths differ.
            ConfigError: conversations without any chat template, or a pair that was lost by pickling.
            ModelError: a model can't be loaded or can't serve, or memory does not hold a single row.
        """
        _check_columns(prompts, completions, completion_ids=completion_ids, finished=finished, domains=domains)
        ids = None if completion_ids is None else _check_ids(completion_ids)
        if len(prompts) == 0:
            return []
        with self._lock:
            reader = self._load()
            pair = reader.pair
            read = reader.read(completions, ids, finished)
            rows = _encode(pair, prompts, read)
            runnable = [row for row in rows if not isinstance(row, Unscorable)]
            budget = self.config.cdr_token_budget
            layouts = [Layout([row[0] for row in runnable])]
            layouts.append(layouts[0] if pair.reads_alike else Layout([row[1] for row in runnable]))
            strong = pair.strong.lm.per_token_logps(layouts[0], token_budget=budget)
            weak = pair.weak.lm.per_token_logps(layouts[1], token_budget=budget)
        if domains is None:
            domains = [None] * len(rows)
        logps = iter(zip(strong, weak, strict=True))
        scores = []
        for row, completion, domain in zip(rows, read, domains, strict=True):
            if isinstance(row, Unscorable):
                score = Score(None, error=str(row))
            else:
                score = _reduce(
                    row,
                    *next(logps),
                    reduction=self.config.cdr_reduction,
                    shares_vocabulary=pair.shares_vocabulary,
                )
            ended = None if isinstance(completion, Unscorable) else completion.finished
            scores.append(replace(score, domain=domain, finished=ended))
        return scores

    def load(self) -> None:
        """
        Load the pair now, where the first call to `score` would.

        Raises:
            ConfigError: a model that was passed as an object did not survive pickling.
            ModelError: a model or tokenizer can't be loaded or can't serve.
        """
        with self._lock:
            self._load()

    def _load(self) -> CompletionReader:
        if self._reader is None:
            for role, model in self._models.items():
                if model is None:
                    raise ConfigError(
                        f"{role} was a loaded model, and loaded models are not pickled. Build the "
                        f"{type(self).__name__} in the process that uses it, or pass a name or a path."
                    )
            if self.config.cdr_policy_tokenizer is not None:
                self._policy = load_tokenizer(self.config, self.config.cdr_policy_tokenizer, "cdr_policy_tokenizer")
            pair = load_pair(self.config, **self._models, **self._tokenizers)
            self._reader = CompletionReader(pair, self._policy)
        return self._reader

    def describe(self) -> dict[str, Any]:
        """
        Load and check the pair, and tell how it will run.

        Returns:
            `dict`: `strong` and `weak` (each `name`, `architecture`, `parameters`, `weights_mb`, `dtype`, `device`,
            `attention`, `way`, `reason`, `max_length` in tokens, `end_of_turn`, `chat_template`),
            `shares_vocabulary` and `reads_alike`.

        Raises:
            ConfigError, ModelError: as `load`.
        """
        with self._lock:
            pair = self._load().pair
            return {
                "strong": pair.strong.describe(),
                "weak": pair.weak.describe(),
                "shares_vocabulary": pair.shares_vocabulary,
                "reads_alike": pair.reads_alike,
            }

    def unload(self) -> None:
        """Let go of the pair and of the prefixes kept for it; the next call loads it again."""
        with self._lock:
            self._reader = None

    def use_policy_tokenizer(self, tokenizer: Any) -> None:
        """
        Say which tokenizer wrote the `completion_ids`. `cdr_policy_tokenizer`, where it is set, wins.

        Args:
            tokenizer: The policy's tokenizer, or a processor that holds it.
        """
        with self._lock:
            if self.config.cdr_policy_tokenizer is None and tokenizer is not self._policy:
                self._policy = tokenizer
                if self._reader is not None:
                    self._reader = CompletionReader(self._reader.pair, tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        """Config, names and tokenizers; loaded models stay behind."""
        models = {role: None if isinstance(model, nn.Module) else model for role, model in self._models.items()}
        return {"config": self.config, "models": models, "tokenizers": self._tokenizers, "policy": self._policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._set_up(state["models"], state["tokenizers"], state["policy"])


def _check_columns(prompts: Any, completions: Any, **optional: Any) -> None:
    given = {name: values for name, values in optional.items() if values is not None}
    for name, values in {"prompts": prompts, "completions": completions, **given}.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise InputError(f"{name} is {shorten(values)}. Pass a list with one entry for each row.")
        if len(values) != len(prompts):
            raise InputError(
                f"{name} has {len(values)} rows and prompts has {len(prompts)}: the two are read side by side. "
                "Pass as many of one as of the other."
            )
    for index, said in enumerate(given.get("finished", ())):
        if said not in (True, False, None):
            raise InputError(f"finished[{index}] is {said!r}. Use True, False or None.")


def _check_ids(completion_ids: Sequence[Any]) -> list[list[int]]:
    """Plain integers, whatever kind of sequence a trainer hands over."""
    checked = []
    for index, row in enumerate(completion_ids):
        try:
            checked.append([operator.index(token) for token in row])
        except TypeError:
            raise InputError(
                f"completion_ids[{index}] is {shorten(row)}. Pass a list of token ids for each row, or none at all."
            ) from None
    return checked


def _encode(
    pair: Pair, prompts: Sequence[Prompt], completions: Sequence[Completion | Unscorable]
) -> list[tuple[Row, Row] | Unscorable]:
    """Each row as strong and weak read it, or why one of them can't."""
    encoded: list[tuple[Row, Row] | Unscorable] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(completion, Unscorable):
            encoded.append(completion)
            continue
        try:
            strong = pair.strong.encode(prompt, completion)
            encoded.append((strong, strong if pair.reads_alike else pair.weak.encode(prompt, completion)))
        except Unscorable as reason:
            encoded.append(reason)
    return encoded


def _reduce(
    rows: tuple[Row, Row], strong_logps: Tensor, weak_logps: Tensor, *, reduction: str, shares_vocabulary: bool
) -> Score:
    """Two models' per-token log-probabilities of one completion -> its score."""
    for role, logps in (("strong", strong_logps), ("weak", weak_logps)):
        broken = (~logps.isfinite()).nonzero()
        if len(broken):
            index = int(broken[0])
            return Score(
                None,
                error=f"{role} gave the log-probability {float(logps[index])} at completion token {index}: its weights "
                "are broken or its dtype overflows. Try cdr_dtype='float32'",
            )
    strong_row, weak_row = rows
    reads_alike = shares_vocabulary and strong_row.completion_ids == weak_row.completion_ids
    return Score(
        value=log_ratio(strong_logps, weak_logps, reduction),
        strong_logps=sum_logps(strong_logps),
        weak_logps=sum_logps(weak_logps),
        n_tokens=len(strong_logps),
        truncated=strong_row.truncated or weak_row.truncated,
        per_token=strong_logps - weak_logps if reads_alike else None,
    )
