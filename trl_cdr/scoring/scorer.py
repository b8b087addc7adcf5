"""The one entrance to scoring: route, condition, encode, run strong and weak, reduce -> Score.

Adapters (`training.reward`, the command line) turn scores into what their callers want; none of them touches a model.
"""

import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from ..conditioning.criteria import Conditioning, Criteria
from ..conditioning.router import NoDomain, Router, confusion
from ..config import PAIR_OPTIONS, CDRConfig, choose_template_kwargs
from ..errors import ConfigError
from .columns import check_columns, check_ids
from .completions import CompletionReader
from .encoding import PromptForm
from .gate import gate_statistics
from .logps import token_logps
from .memory import weight_bytes
from .packing import Layout, group_rows
from .pair import Pair
from .pair_loading import load_tokenizer
from .pair_source import PairSource, check_adapters, check_sources
from .ranks import Ranks
from .score import Score, score_from_logps
from .string_prompts import MEANINGS, read_strings, string_meaning
from .types import Completion, Message, Prompt, Row, Unscorable

logger = logging.getLogger(__name__)


class DensityRatioScorer:
    """
    Scores completions by the log-density ratio of two causal language models (arXiv 2411.02481):

        value(x, y) = log p_strong(y | c, x) - log p_weak(y | c, x)        (nats)

    c is what `criteria` say of the prompt's domain; nothing without them.

    The pair is loaded inside the first call, on the process's own device. Deterministic; draws from no global random
    state; safe to call from several threads (one at a time runs); can be pickled, without loaded models.

    Args:
        strong, weak (`str` or `nn.Module`): Better and less aligned model: a name, a path, the address of vLLM servers
            (`vllm://HOST:PORT/MODEL`), or a loaded model, which is used as it is and never changed.
        strong_tokenizer, weak_tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed with a loaded model.
        criteria (`str` or `Criteria`, *optional*): A TOML file, a preset, or [`Criteria`] that were built in Python.
        router (`str` or `Callable`, *optional*): How a prompt's domain is found: `"column:NAME"`, `"likelihood"`, or a
            function from a prompt to the name of its domain, itself or as a dotted path.
        share (`DensityRatioScorer`, *optional*): Another scorer whose models this one uses, in place of `strong` and
            `weak`: several criteria, one pair in memory. How the pair is loaded and reads prompts is the other's.
        **options: The other fields of [`CDRConfig`] without their prefix.

    Raises:
        ConfigError: an argument is missing, unknown or not allowed.

    Example:

    ```python
    scorer = DensityRatioScorer(strong="Qwen/Qwen2.5-0.5B-Instruct", weak="Qwen/Qwen2.5-0.5B")
    [score] = scorer.score([[{"role": "user", "content": "What is 2 + 2?"}]], ["4"])
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
        criteria: str | Path | Criteria | None = None,
        router: str | Callable[[Prompt], str] | None = None,
        share: "DensityRatioScorer | None" = None,
        **options: Any,
    ) -> None:
        models = {
            role: str(model) if isinstance(model, Path) else model
            for role, model in (("strong", strong), ("weak", weak))
        }
        options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        tokenizers = {"strong_tokenizer": strong_tokenizer, "weak_tokenizer": weak_tokenizer}
        if share is None:
            check_sources(models["strong"], models["weak"], strong_tokenizer, weak_tokenizer)
            check_adapters(models, options)
            options |= {role: model if isinstance(model, str) else _show(model) for role, model in models.items()}
        else:
            options |= _shared_options(share, {**models, **tokenizers, **options})
        options["criteria"] = str(criteria) if isinstance(criteria, (str, Path)) else _show(criteria)
        options["router"] = router if isinstance(router, str) else _show(router)
        self.config = CDRConfig.from_options(**options)
        self.criteria = Criteria.load(str(criteria)) if isinstance(criteria, (str, Path)) else criteria
        self.router: Router | None = None
        if self.criteria is not None:
            if not isinstance(self.criteria, Criteria):
                raise ConfigError(f"criteria is {criteria!r}. Pass Criteria, a TOML file or a preset's name.")
            self.router = Router(self.criteria, domain=self.config.cdr_domain, router=router)
        self._source: PairSource = PairSource(self.config, models, tokenizers) if share is None else share._source
        self._policy: Any = None
        self._policy_ends: frozenset[int] = frozenset()
        self._has_warned = False
        self._told_meanings: set[str] = set()
        # Of the loaded pair, which it does not keep alive: others who share it may unload it.
        self._reader: tuple[weakref.ref[Pair], CompletionReader] | None = None

    @classmethod
    def from_config(cls, config: CDRConfig, args: Any = None) -> "DensityRatioScorer":
        """
        Build from a parsed [`CDRConfig`].

        Args:
            config (`CDRConfig`): Every option; both models by name or path.
            args (`TrainingArguments`, *optional*): The trainer's, for defaults that the config leaves open: see
                `CDRConfig.options`.
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
        is_generated: Sequence[bool] | None = None,
        in_trainer: bool = False,
    ) -> list[Score]:
        """
        Score each completion to the prompt of the same index.

        Args:
            prompts (`Sequence`): Conversations (lists of messages) or strings; `cdr_string_prompts` decides how strings
                are read.
            completions (`Sequence`): Strings, or lists with one assistant message.
            completion_ids (`Sequence[Sequence[int]]`, *optional*): The tokens that the policy wrote, padded on the
                right or not. Where they decode to the completion's text under the pair's shared tokenizer they are
                scored as they are, and say whether the completion is finished.
            finished (`Sequence[bool | None]`, *optional*): Whether the policy ended its turn; used where ids don't
                say. Default: finished without `completion_ids`; with them, what the policy's tokenizer says.
            domains (`Sequence[str | None]`, *optional*): Each prompt's domain; it wins over the router's. `None` leaves
                a row to the router. One that the criteria do not know is its row's reason. Without criteria, returned
                as they are.
            is_generated (`Sequence[bool]`, *optional*): If a model wrote the completion right after the generation
                prompt, nothing is put between the two. Otherwise it is an answer of a data set, and is put where the
                chat template puts answers. Default: true for all with `completion_ids`, else false.
            in_trainer (`bool`, *optional*, defaults to `False`): A trainer asks, whose policy reads string prompts as
                raw text (for `cdr_string_prompts="auto"`).

        Returns:
            `list[Score]`: one for each prompt, in order. A row that can't be scored has `error` set and no value.

        Raises:
            InputError: lengths differ, or nothing at all says what the domains are.
            ConfigError: conversations without any chat template, a pair that was lost by pickling, or, with
                `cdr_replicas="node"`, a process that holds no pair (see `together`).
            ModelError: a model can't be loaded or can't serve, or memory does not hold a single row.
        """
        check_columns(
            prompts,
            completions,
            completion_ids=completion_ids,
            finished=finished,
            domains=domains,
            is_generated=is_generated,
        )
        ids = None if completion_ids is None else check_ids(completion_ids)
        if len(prompts) == 0:
            return []
        with self._source.use():
            found = self._route(prompts, domains)
            pair, reader = self._load()
            prompts = self._read_strings(pair, prompts, completions, in_trainer=in_trainer)
            conditioned, conditionings = self._condition(prompts, found)
            read = reader.read(completions, ids, finished, is_generated=is_generated)
            rows = _encode(pair, conditioned, read)
            runnable = [index for index, row in enumerate(rows) if not isinstance(row, Unscorable)]
            # Equal rows are run once: rounding would tell them apart, by their place in a pack.
            firsts: dict[tuple[Row, Row], int] = {}
            for index in runnable:
                firsts.setdefault(cast(tuple[Row, Row], rows[index]), index)
            strong, weak = self._run(
                pair,
                list(firsts),
                [(conditionings[index], isinstance(prompts[index], str)) for index in firsts.values()],
            )
        logps = dict(zip(firsts, zip(strong, weak, strict=True), strict=True))
        scores = []
        for row, completion, domain in zip(rows, read, found, strict=True):
            ended = None if isinstance(completion, Unscorable) else completion.finished
            if isinstance(row, Unscorable):
                score = Score(None, error=str(row))
            else:
                score = score_from_logps(
                    row,
                    *logps[row],
                    reduction=self.config.cdr_reduction,
                    gate=self.config.cdr_gate,
                    least_typicality=-self.config.typicality_bound,
                    finished=ended,
                    shares_vocabulary=pair.shares_vocabulary,
                )
            scores.append(replace(score, domain=_name(domain), finished=ended))
        return scores

    def route(self, prompts: Sequence[Prompt], domains: Sequence[str | None] | None = None) -> list[str | None]:
        """
        The domain whose criteria each prompt gets.

        Args:
            prompts (`Sequence`): Strings or conversations.
            domains (`Sequence[str | None]`, *optional*): What is known; it wins.

        Returns:
            `list[str | None]`: `None` where a prompt can't be read or classified, or its domain is unknown.

        Raises:
            InputError: nothing at all says what the domains are.
        """
        return [_name(domain) for domain in self._route(prompts, domains)]

    def _route(
        self, prompts: Sequence[Prompt], domains: Sequence[str | None] | None
    ) -> Sequence[str | NoDomain | None]:
        """As `route`, with the reason where there is no domain; `None` without criteria."""
        if self.router is None:
            return [None] * len(prompts) if domains is None else list(domains)

        def find_model() -> Pair | None:
            """Return the loaded pair; `None` for an object, a server's model or the policy's base: they may change."""
            pair = self._load()[0]
            may_change = pair.strong.is_served or pair.strong.local.weights is None or self.config.cdr_share_policy
            return None if may_change else pair

        with self._source.use():  # the router remembers
            return self.router.route(prompts, domains, self._score_labels, find_model)

    def confusion(self, prompts: Sequence[Prompt], domains: Sequence[str]) -> dict[str, dict[str, int]]:
        """
        Count the router's domains of labelled prompts: for each right domain, how often each was found.

        Args:
            prompts (`Sequence`): Strings or conversations.
            domains (`Sequence[str]`): The right domain of each.
        """
        check_columns(prompts, prompts, domains=domains)
        return confusion(domains, self.route(prompts))

    def _run(
        self, pair: Pair, rows: Sequence[tuple[Row, Row]], behind: Sequence[tuple[Conditioning | None, bool]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What both models give for each token. `behind`: each row's conditioning, and whether it is raw text."""
        groups = None
        runs = []
        # Only the strong model's whole distributions are needed, and only by the gate.
        reduces = (gate_statistics(self.config.cdr_gate, pair.strong.final_ids), token_logps)
        for index, (member, reduce) in enumerate(zip((pair.strong, pair.weak), reduces, strict=True)):
            if groups is None or not pair.reads_alike:
                constants = [
                    () if conditioning is None else member.constant_ids(conditioning, is_text=is_text)
                    for conditioning, is_text in behind
                ]
                groups = group_rows([row[index] for row in rows], constants)
            run = partial(member.per_token_logps, groups, token_budget=self.config.cdr_token_budget, reduce=reduce)
            runs.append((member.is_served, run))
        strong, weak = _run_both(runs)
        return strong, weak

    def _score_labels(self, texts: Sequence[str], labels: Sequence[str]) -> list[list[float] | NoDomain]:
        """
        Compute the strong model's mean log-probability of each label's tokens as the completion of each text, nats.

        `Member.encode` cuts a prompt that is too long on the left, by more for longer labels, and there the labels are
        named. A text of which one row is cut therefore gets a reason, and so does one that can't be encoded.
        """
        with self._source.use():
            member = self._load()[0].strong
            is_chat = member.encoder.chat_template is not None
            rows: dict[int, list[Row]] = {}
            reasons: dict[int, NoDomain] = {}
            for index, text in enumerate(texts):
                try:
                    rows[index] = [
                        member.encode([{"role": "user", "content": text}], Completion(label, None))
                        if is_chat
                        else member.encode(text, Completion(f" {label}", None))
                        for label in labels
                    ]
                except Unscorable as reason:
                    reasons[index] = NoDomain(f"its domain can't be told: {reason}")
                    continue
                if any(row.truncated for row in rows[index]):
                    del rows[index]
                    reasons[index] = NoDomain(
                        "its domain can't be told: the classification prompt has more tokens than strong reads "
                        f"({member.max_length}), and all labels must see the same prompt. Pass domains=, a larger "
                        "cdr_max_length or another router"
                    )
            layout = Layout([row for labelled in rows.values() for row in labelled])
            logps = iter(member.lm.per_token_logps(layout, token_budget=self.config.cdr_token_budget))
        means = {index: [float(next(logps).mean()) for _ in labels] for index in rows}
        return [means[index] if index in means else reasons[index] for index in range(len(texts))]

    def read_prompts(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[Message]] | None = None,
        *,
        in_trainer: bool = False,
    ) -> list[Prompt]:
        """
        Return prompts as the pair reads them: strings become a user's turn or stay raw text, see `cdr_string_prompts`.
        Loads the pair.

        Args:
            prompts (`Sequence`): Strings or conversations.
            completions (`Sequence`, *optional*): Their completions. A string whose completion is a message is a turn.
            in_trainer (`bool`, *optional*, defaults to `False`): See `score`.
        """
        with self._source.use():
            return self._read_strings(self._load()[0], prompts, completions, in_trainer=in_trainer)

    def _read_strings(
        self,
        pair: Pair,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[Message]] | None,
        *,
        in_trainer: bool,
    ) -> list[Prompt]:
        if not any(isinstance(prompt, str) for prompt in prompts):
            return list(prompts)
        meaning = string_meaning(self.config.cdr_string_prompts, has_template=pair.has_template, in_trainer=in_trainer)
        if meaning not in self._told_meanings:
            self._told_meanings.add(meaning)
            logger.log(
                logging.INFO if in_trainer or self.config.cdr_string_prompts != "auto" else logging.WARNING,
                "String prompts are read as %s (cdr_string_prompts=%r).",
                MEANINGS[meaning],
                self.config.cdr_string_prompts,
            )
        return read_strings(prompts, meaning, completions)

    def _condition(
        self, prompts: Sequence[Prompt], domains: Sequence[str | NoDomain | None]
    ) -> tuple[list[Prompt | Unscorable], list[Conditioning | None]]:
        """Each prompt as the models read it, and what was put before it."""
        if self.criteria is None:
            return list(prompts), [None] * len(prompts)
        conditionings = {
            domain: self.criteria.conditioning(
                domain,
                num_exemplars=self.config.cdr_num_exemplars,
                style=self.config.cdr_exemplar_style,
                seed=self.config.cdr_seed,
            )
            for domain in dict.fromkeys(domains)
            if isinstance(domain, str)
        }
        conditioned: list[Prompt | Unscorable] = []
        for prompt, domain in zip(prompts, domains, strict=True):
            if isinstance(domain, NoDomain):
                conditioned.append(Unscorable(domain.reason))
            else:
                conditioned.append(conditionings[cast(str, domain)].apply(prompt))
        return conditioned, [conditionings.get(cast(str, domain)) for domain in domains]

    def condition(
        self, prompts: Sequence[Prompt], domains: Sequence[str | None] | None = None
    ) -> tuple[list[Prompt | Unscorable], list[Conditioning | None]]:
        """
        Each prompt as the models read it, or why they can't, and what was put before it. Only the router
        `"likelihood"` runs a model.

        Args:
            prompts (`Sequence`): Strings or conversations.
            domains (`Sequence[str | None]`, *optional*): What is known; it wins.

        Raises:
            InputError: nothing at all says what the domains are.
        """
        return self._condition(prompts, self._route(prompts, domains))

    def load(self) -> Pair:
        """
        Load the pair now, where the first call to `score` would, and return it. To run it, see `use`.

        Raises:
            ConfigError: a model that was passed as an object did not survive pickling.
            ModelError: a model or tokenizer can't be loaded or can't serve.
        """
        with self.use() as pair:
            return pair

    @contextmanager
    def use(self) -> Iterator[Pair]:
        """
        Keep the pair to this thread, to have it run otherwise than by `score`; loaded where it is not yet. Models that
        `cdr_offload` puts to sleep are woken as they are run, and asleep at the end.

        Raises:
            ConfigError, ModelError: as `load`.
        """
        with self._source.use():
            yield self._load()[0]

    def _load(self) -> tuple[Pair, CompletionReader]:
        if self.config.cdr_policy_tokenizer is not None and self._policy is None:
            self._policy = load_tokenizer(self.config, self.config.cdr_policy_tokenizer, "cdr_policy_tokenizer")
        pair = self._source.get()
        if self._reader is None or self._reader[0]() is not pair:
            self._reader = weakref.ref(pair), CompletionReader(pair, self._policy, self._policy_ends)
        if self.config.cdr_gate == "surprise" and not pair.strong.final_ids and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "strong (%s) has no end token: that a completion goes on where it would have ended is not seen by "
                "gate='surprise'. Set eos_token of its tokenizer.",
                pair.strong.lm.name,
            )
        return pair, self._reader[1]

    def describe(self) -> dict[str, Any]:
        """
        Load and check the pair, and tell how it will run.

        Returns:
            `dict`: `strong` and `weak` (each `name`, `weights`, `adapter`, `adapter_weights`, `architecture`,
            `parameters`, `weights_mb`, `dtype`, `device`, `prefix_mb`, `work_mb`, `attention`, `way`, `reason`,
            `max_length` in tokens, `end_of_turn`, `end_tokens`, `chat_template`, `thoughts`, `date`), `weights_mb`,
            `shares_vocabulary`, `reads_alike`, `gate`, `chat_template_kwargs` (the trainer's, or the config's),
            `string_prompts` (`"user"` or `"text"`: how strings are read outside trainers) and `date` (that chat
            templates write, or `None`). `weights` is the commit on the Hub or a hash of the folder, `None` for models
            that were passed as objects, and `adapter_weights` the same of an adapter. MB are 2**20 bytes; in
            `weights_mb` of the pair what both models stand on counts once; `prefix_mb` is the most that
            `cdr_prefix_cache_tokens` allows, `work_mb` an estimate for a forward of `cdr_token_budget`. Of a model on
            servers most is `None`; it has `servers` and `root`, where they have it from.

        Raises:
            ConfigError, ModelError: as `load`.
        """
        with self._source.use():
            pair, _ = self._load()
            here = [member for member in (pair.strong, pair.weak) if not member.is_served]
            return {
                "strong": pair.strong.describe(token_budget=self.config.cdr_token_budget),
                "weak": pair.weak.describe(token_budget=self.config.cdr_token_budget),
                "weights_mb": weight_bytes(*(member.local.model for member in here)) / 2**20,
                "shares_vocabulary": pair.shares_vocabulary,
                "reads_alike": pair.reads_alike,
                "gate": self.config.cdr_gate,
                "chat_template_kwargs": self.form.template_kwargs,
                "string_prompts": string_meaning(self.config.cdr_string_prompts, has_template=pair.has_template),
                "date": next(
                    (one for one in (pair.strong.encoder.written_date, pair.weak.encoder.written_date) if one), None
                ),
            }

    def show(
        self,
        prompt: Prompt,
        completion: str | Sequence[Message],
        *,
        domain: str | None = None,
        finished: bool | None = True,
        is_generated: bool = False,
        console: Any = None,
    ) -> None:
        """
        Print one prompt and completion as each model reads them, with token counts, log-probabilities and the score.

        Args:
            prompt (`str` or `Sequence`): A conversation or a string.
            completion (`str` or `Sequence`): A string, or a list with one assistant message.
            domain (`str`, *optional*): The prompt's domain. Default: the router's.
            finished (`bool` or `None`, *optional*, defaults to `True`): See `score`.
            is_generated (`bool`, *optional*, defaults to `False`): See `score`.
            console (`rich.console.Console`, *optional*): Prints. Default: stdout.

        Raises:
            InputError, ConfigError, ModelError: as `score`.
        """
        from rich.console import Console

        from .show import print_row, read_row

        row = read_row(self, prompt, completion, domain=domain, finished=finished, is_generated=is_generated)
        print_row(row, console or Console())

    def unload(self) -> None:
        """Let go of the pair and of the prefixes kept for it, for all who share it; the next call loads it again."""
        self._source.unload()
        if self.router is not None:
            self.router.forget()

    @property
    def moving_seconds(self) -> float | None:
        """
        What this thread has spent on waking the pair and putting it to sleep since the pair was loaded; `None` with
        `cdr_offload="none"`.
        """
        return None if self.config.cdr_offload == "none" else self._source.turns.seconds

    @property
    def ranks(self) -> Ranks:
        """The other processes of the run, and whether this one holds the pair (`cdr_replicas`)."""
        return self._source.ranks

    def modules(self) -> list[nn.Module]:
        """The models that were passed as objects."""
        return self._source.held

    def use_policy_tokenizer(self, tokenizer: Any, *, end_ids: Collection[int] = ()) -> None:
        """
        Say which tokenizer wrote the `completion_ids`, and where they stop.

        Args:
            tokenizer: The policy's tokenizer, or a processor that holds it. `cdr_policy_tokenizer`, where it is set,
                stays.
            end_ids (`Collection[int]`, *optional*): Where the policy's generation stops beside the tokenizer's ends.
        """
        with self._source.lock:
            policy = tokenizer if self.config.cdr_policy_tokenizer is None else self._policy
            ends = frozenset(end_ids)
            if policy is not self._policy or ends != self._policy_ends:
                self._policy, self._policy_ends, self._reader = policy, ends, None

    @property
    def form(self) -> PromptForm:
        """How prompts are written: the template's variables, tools, the date and BOS."""
        return self._source.form

    def use_date(self, today: date) -> None:
        """Render chat templates with this date from now on."""
        self._source.use_form(replace(self.form, today=today))

    def use_conversations(
        self, template_kwargs: Mapping[str, Any] | None, tools: Sequence[Any] | None, *, adds_bos: bool = True
    ) -> None:
        """
        Write prompts as a trainer writes them for the policy.

        Args:
            template_kwargs (`Mapping` or `None`): The trainer's `chat_template_kwargs`.
            tools (`Sequence` or `None`): The trainer's tools: functions or JSON schemas.
            adds_bos (`bool`, *optional*, defaults to `True`): False if the trainer puts no BOS before string prompts.
                `cdr_add_special_tokens`, if it is not `"auto"`, decides instead.

        Raises:
            ConfigError: the variables differ from `cdr_chat_template_kwargs`.
        """
        own: Any = self.config.cdr_chat_template_kwargs
        bos = self.config.cdr_add_special_tokens
        form = PromptForm(
            choose_template_kwargs(own, template_kwargs),
            # As schemas, which can be compared and pickled.
            tools=[get_json_schema(tool) if callable(tool) else tool for tool in tools or ()] or None,
            today=self.form.today,
            add_special_tokens="false" if bos == "auto" and not adds_bos else bos,
        )
        self._source.use_form(form)

    def use_dtype(self, dtype: str) -> None:
        """Load the pair with this `cdr_dtype`. A pair that is loaded already keeps its own."""
        self._source.use_dtype(dtype)

    def use_policy(self, policy: nn.Module) -> None:
        """
        Say whose base the pair stands on, with `cdr_share_policy`; without it nothing happens.

        Args:
            policy (`nn.Module`): As the trainer has it, unwrapped; it is neither changed nor kept alive.
        """
        self._source.use_policy(policy)

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to loaded models, which stay behind."""
        return {**self.__dict__, "_reader": None}


def _name(domain: str | NoDomain | None) -> str | None:
    return None if domain is None or isinstance(domain, NoDomain) else str(domain)  # a label's number, say


def _show(given: Any) -> str | None:
    """What stands in the config for an object that was passed in place of a name."""
    if given is None:
        return None
    return f"<{getattr(given, '__name__', type(given).__name__)}>"


def _shared_options(share: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a scorer takes over from the one whose pair it shares."""
    if not isinstance(share, DensityRatioScorer):
        raise ConfigError(f"share is a {type(share).__name__}. Pass the scorer (or reward) whose pair is to be shared.")
    tokenizers = ("strong_tokenizer", "weak_tokenizer")
    for name in (*PAIR_OPTIONS, *tokenizers):
        if given.get(name) is not None:
            raise ConfigError(
                f"share is given, and {name} too: the pair and how it reads are those of the one that shares. "
                f"Leave {name} out."
            )
    options = share.config.options()
    return {name: options[name] for name in PAIR_OPTIONS}


def _run_both(runs: Sequence[tuple[bool, Callable[[], list[Tensor]]]]) -> list[list[Tensor]]:
    """The results of functions, one after the other; those that wait for a server (`True`) do so meanwhile."""
    with ThreadPoolExecutor() as pool:
        waiting = {place: pool.submit(run) for place, (is_served, run) in enumerate(runs) if is_served}
        here = {place: run() for place, (_, run) in enumerate(runs) if place not in waiting}
        return [here[place] if place in here else waiting[place].result() for place in range(len(runs))]


def _encode(
    pair: Pair, prompts: Sequence[Prompt | Unscorable], completions: Sequence[Completion | Unscorable]
) -> list[tuple[Row, Row] | Unscorable]:
    """Each row as strong and weak read it, or why one of them can't."""
    encoded: list[tuple[Row, Row] | Unscorable] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(completion, Unscorable) or isinstance(prompt, Unscorable):
            encoded.append(completion if isinstance(completion, Unscorable) else prompt)  # type: ignore[arg-type]
            continue
        try:
            encoded.append(pair.encode(prompt, completion))
        except Unscorable as reason:
            encoded.append(reason)
    return encoded
