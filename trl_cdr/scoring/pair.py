"""Strong and weak together: loading both, their tokenizers, and what makes their scores comparable.

Knows no conversation and no score: `scorer` asks it for two encoders and two models.
"""

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..conditioning.criteria import Conditioning
from ..config import CDRConfig, is_served
from ..errors import ConfigError, ModelError
from .causal_lm import CausalLM
from .checkpoint import read_config
from .encoding import Completion, Encoder, Prompt, Row, Unscorable, fit, own_chat_template, vocabulary_hash
from .loading import hub_kwargs
from .logps import Reduce, token_logps
from .offload import Bed, OnDisk, OnHost, Turns, check_movable, has_own_memory, reload_model
from .packing import Group, Layout, common_prefix
from .policy_base import PolicyBase, check_shared
from .ranks import Ranks
from .served_lm import ServedLM, connect, warn_of_twins
from .sources import Source, find_source, find_sources, read_served, share_base
from .weights import check_whole

logger = logging.getLogger(__name__)

# Prompts that start differently: what their conditioned forms share is the conditioning's and the template's.
_PROBES = ("a", "B", "7", "(", "-", "é", "中")


@dataclass(frozen=True)
class Member:
    """One model of the pair with the encoder that feeds it, and the longest row in tokens (None: no limit)."""

    lm: CausalLM | ServedLM
    encoder: Encoder
    max_length: int | None
    _constants: dict[tuple[Conditioning, bool], tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def is_served(self) -> bool:
        """The model is on servers."""
        return isinstance(self.lm, ServedLM)

    @property
    def local(self) -> CausalLM:
        """The model, of which the caller knows that it is here."""
        assert isinstance(self.lm, CausalLM), "on servers"
        return self.lm

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids at which a completion ends. A generation config is believed only where it names special tokens."""
        added = self.encoder.tokenizer.added_tokens_decoder
        return self.encoder.end_ids | {id for id in self.lm.end_ids if id in added and added[id].special}

    @property
    def final_ids(self) -> tuple[int, ...]:
        """Those of `end_ids` that the model predicts."""
        return tuple(sorted(id for id in self.end_ids if id < self.lm.num_embeddings))

    def describe(self, *, token_budget: int) -> dict[str, Any]:
        """How this model will run, for people; see `CausalLM.describe`."""
        own = own_chat_template(self.encoder.tokenizer)
        template = "own" if self.encoder.chat_template == own else "its partner's, or cdr_chat_template"
        return {
            **self.lm.describe(token_budget=token_budget),
            "max_length": self.max_length,
            "end_of_turn": self.encoder.end_of_turn,
            "end_tokens": self.encoder.tokenizer.convert_ids_to_tokens(self.final_ids),
            "chat_template": template if self.encoder.chat_template else "none",
        }

    def encode(self, prompt: Prompt, completion: Completion) -> Row:
        """One row that fits the model; see `Encoder.encode` and `fit`."""
        row = fit(self.encoder.encode(prompt, completion), self.max_length)
        self.check(row)
        return row

    def check(self, row: Row) -> None:
        """
        Raises:
            Unscorable: the model can't read one of the row's ids.
        """
        if max(row.ids) >= self.lm.num_embeddings:
            raise Unscorable(f"the row holds the token id {max(row.ids)}, for which {self.lm.name} has no embedding")

    def constant_ids(self, conditioning: Conditioning, *, is_text: bool) -> tuple[int, ...]:
        """
        The tokens that every prompt under a conditioning starts with; nothing where they are too few to be kept.

        Args:
            conditioning (`Conditioning`): What the prompts are conditioned with.
            is_text (`bool`): The prompts are strings, not conversations.
        """
        if conditioning.is_empty:
            return ()
        key = (conditioning, is_text)
        if key not in self._constants:
            prompts: list[Prompt] = [text if is_text else [{"role": "user", "content": text}] for text in _PROBES]
            try:
                rows = [self.encoder.encode(conditioning.apply(prompt), Completion("a", None)) for prompt in prompts]
            except Unscorable:  # the rows themselves will say why
                rows = []
            self._constants[key] = common_prefix(rows)
        return self._constants[key]

    def per_token_logps(
        self, groups: Sequence[Group], *, token_budget: int, reduce: Reduce = token_logps
    ) -> list[Tensor]:
        """Log-probabilities of every row of the groups in the call's order; see `CausalLM.per_token_logps`."""
        if isinstance(self.lm, ServedLM):  # servers find by themselves what rows have in common, and get all at once
            together = {
                index: row for group in groups for index, row in zip(group.indices, group.layout.rows, strict=True)
            }
            layout = Layout([together[index] for index in range(len(together))])
            return self.lm.per_token_logps(layout, token_budget=token_budget, reduce=reduce)
        results: dict[int, Tensor] = {}
        for group in groups:
            logps = self.lm.per_token_logps(group.layout, token_budget=token_budget, reduce=reduce)
            results.update(zip(group.indices, logps, strict=True))
        return [results[index] for index in range(len(results))]


@dataclass(frozen=True)
class Pair:
    """
    The two scoring models.

    Attributes:
        strong, weak (`Member`): Better and less aligned model.
        shares_vocabulary (`bool`): A token id means the same token to both, so ids that the policy wrote can be scored
            as they are, and log-ratios exist per token.
        reads_alike (`bool`): Both encode every row to the same ids, so that it is encoded and laid out once.
        end_ids (`frozenset[int]`): Ids at which a completion ends, of both models: templates, tokenizers and generation
            configs.
    """

    strong: Member
    weak: Member
    shares_vocabulary: bool = field(init=False)
    reads_alike: bool = field(init=False)
    end_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        strong, weak = self.strong.encoder, self.weak.encoder
        is_alike = self.strong.max_length == self.weak.max_length and strong.is_like(weak)
        shares = vocabulary_hash(strong.tokenizer) == vocabulary_hash(weak.tokenizer)
        object.__setattr__(self, "shares_vocabulary", shares)
        object.__setattr__(self, "reads_alike", is_alike)
        object.__setattr__(self, "end_ids", self.strong.end_ids | self.weak.end_ids)

    def encode(self, prompt: Prompt, completion: Completion) -> tuple[Row, Row]:
        """
        One row as strong and weak read it.

        Raises:
            Unscorable: one of them can't; see `Member.encode`.
            ConfigError, ModelError: see `Encoder.encode`.
        """
        strong = self.strong.encode(prompt, completion)
        if not self.reads_alike:
            return strong, self.weak.encode(prompt, completion)
        self.weak.check(strong)  # it may embed fewer tokens
        return strong, strong


class PairSource:
    """
    A pair that is loaded when it is first asked for. Scorers that hold the same source share its models.

    Pickled without loaded models; what is pickled together stays shared.

    Args:
        config (`CDRConfig`): How to load and read.
        models (`dict[str, str | nn.Module]`): `strong` and `weak`: names, paths or loaded models.
        tokenizers (`dict`): `strong_tokenizer` and `weak_tokenizer`, each a tokenizer or `None`.

    Attributes:
        lock (`RLock`): Held by whoever uses the models.
        turns (`Turns`): Whose weights are awake, where `cdr_offload` puts them to sleep between calls.
        ranks (`Ranks`): The other processes, and whether this one holds the pair.
    """

    def __init__(self, config: CDRConfig, models: dict[str, Any], tokenizers: dict[str, Any]) -> None:
        self.config = config
        self.lock = threading.RLock()
        self.turns = Turns()
        self.ranks = Ranks(config.cdr_replicas)
        for role, model in models.items():
            if isinstance(model, nn.Module) and config.cdr_offload != "none":
                raise ConfigError(
                    f"offload is {config.cdr_offload!r}, and {role} is a loaded {type(model).__name__}: models that "
                    "are passed as objects are not moved. Pass its name or path, or leave offload out."
                )
            if isinstance(model, nn.Module) and config.cdr_replicas != "rank":
                raise ConfigError(
                    f"replicas is {config.cdr_replicas!r}, and {role} is a loaded {type(model).__name__}: what is "
                    "passed as an object is in every process. Pass its name or path, or leave replicas out."
                )
        self._models = models
        self._tokenizers = tokenizers
        self._pair: Pair | None = None
        self._policy: weakref.ref[nn.Module] | None = None
        self._base: PolicyBase | None = None  # of the policy, where the pair stands on it

    def use_policy(self, policy: nn.Module) -> None:
        """
        Say whose base the pair stands on, with `cdr_share_policy`; without it nothing happens.

        Args:
            policy (`nn.Module`): As the trainer has it, unwrapped; it is not kept alive.
        """
        if self.config.cdr_share_policy:
            with self.lock:
                self._policy = weakref.ref(policy)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the models to this thread, for a call at whose end they may go to sleep."""
        with self.lock, self.turns.call():
            yield

    def get(self) -> Pair:
        """
        The pair; asked for within `use`.

        Raises:
            ConfigError: a model that was passed as an object did not survive pickling, with `cdr_share_policy` there is
                no policy, or none that can be shared, or this process is to hold no pair.
            ModelError: a model or tokenizer can't be loaded or can't serve.
        """
        with self.lock:
            self.ranks.check_holds()
            self._find_base()
            if self._pair is None:
                for role, model in self._models.items():
                    if model is None:
                        raise ConfigError(
                            f"{role} was a loaded model, and loaded models are not pickled. Build the scorer or reward "
                            "in the process that uses it, or pass a name or a path."
                        )
                self.turns.clear()  # of a pair of which one could not be loaded
                base = None if self._base is None else self._base.model
                self._pair = load_pair(self.config, **self._models, **self._tokenizers, base=base, turns=self.turns)
            return self._pair

    def _find_base(self) -> None:
        """See that the pair stands on the policy's base as it is now, where it is to stand there."""
        if not self.config.cdr_share_policy:
            return
        policy = None if self._policy is None else self._policy()
        if policy is None:
            raise ConfigError(
                "cdr_share_policy is set, and no policy is known. Pass CDRCallback(reward, trainer) to the trainer, or "
                "call reward.attach(trainer), before the first step."
            )
        if self._base is None or not self._base.is_of(policy):
            self._base, self._pair = PolicyBase(policy), None
        self._base.check()
        # Merging an adapter and taking it out again, as trainers do for vLLM, leaves a base with other roundings.
        lms = [] if self._pair is None else [self._pair.strong.local, self._pair.weak.local]
        if any(lm.keeps_prefixes for lm in lms) and self._base.has_changed():
            for lm in lms:
                lm.drop_prefixes()

    @property
    def held(self) -> list[nn.Module]:
        """The models that the caller holds and trains, maybe, himself."""
        return [model for model in self._models.values() if isinstance(model, nn.Module)]

    def unload(self) -> None:
        """Let go of the models and of all that is kept for them, an accelerator's cached memory too."""
        with self.lock:
            self._pair = self._base = None
            self.turns.clear()
            clear_device_cache(garbage_collection=True)

    def __getstate__(self) -> dict[str, Any]:
        models = {role: None if isinstance(model, nn.Module) else model for role, model in self._models.items()}
        return {"config": self.config, "models": models, "tokenizers": self._tokenizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def check_sources(
    strong: Any, weak: Any, strong_tokenizer: PreTrainedTokenizerBase | None, weak_tokenizer: Any
) -> None:
    """
    What can be known about a pair before anything is loaded.

    Raises:
        ConfigError: one is missing or of the wrong kind, both are one object, or a loaded model has no tokenizer.
    """
    for role, model, tokenizer in (("strong", strong, strong_tokenizer), ("weak", weak, weak_tokenizer)):
        if not isinstance(model, (str, Path, nn.Module)):
            raise ConfigError(f"{role} is {model!r}. Pass a model's name, a path or a loaded model.")
        if isinstance(model, str) and is_served(model):
            read_served(model, role)
        if isinstance(model, nn.Module) and tokenizer is None:
            raise ConfigError(
                f"{role} is a loaded {type(model).__name__} and {role}_tokenizer is missing. Pass its tokenizer too."
            )
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(f"{role}_tokenizer is a {type(tokenizer).__name__}. Pass a transformers tokenizer.")
    if strong is weak and isinstance(strong, nn.Module):
        raise ConfigError(
            f"strong and weak are the same {type(strong).__name__} object: every log-ratio would be 0. Pass two models."
        )


def check_adapters(models: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: an adapter is to be put on a model that was passed as an object, or such a model on the policy's
            base.
    """
    for role, model in models.items():
        if isinstance(model, nn.Module) and options.get("share_policy"):
            raise ConfigError(
                f"{role} is a loaded {type(model).__name__}, and share_policy is set: the pair stands on the policy's "
                "base. Pass names, or leave out share_policy."
            )
        if isinstance(model, nn.Module) and options.get(f"{role}_adapter") is not None:
            raise ConfigError(
                f"{role} is a loaded {type(model).__name__}, and {role}_adapter is {options[f'{role}_adapter']!r}: a "
                "model that you hold is used as it is. Pass its name, or put the adapter on it with peft."
            )


def load_pair(
    config: CDRConfig,
    strong: str | nn.Module,
    weak: str | nn.Module,
    *,
    strong_tokenizer: PreTrainedTokenizerBase | None = None,
    weak_tokenizer: PreTrainedTokenizerBase | None = None,
    base: nn.Module | None = None,
    turns: Turns | None = None,
) -> Pair:
    """
    Load what is a name, take what is a module, and check that the two can be compared.

    Args:
        config (`CDRConfig`): Revisions, type, device, template and lengths.
        strong, weak (`str` or `nn.Module`): Name, path or loaded model; `check_sources` has passed.
        strong_tokenizer, weak_tokenizer: Loaded tokenizers; each model's own if `None`.
        base (`nn.Module`, *optional*): The policy's, to be used in place of one that is loaded.
        turns (`Turns`, *optional*): Who wakes models that `cdr_offload` puts to sleep.

    Raises:
        ConfigError: `cdr_max_length` exceeds a model's positions, `cdr_offload` asks for what can't be moved, or the
            policy's base is not the pair's.
        ModelError: a model or tokenizer can't be loaded or can't serve.
    """
    models = {"strong": strong, "weak": weak}
    served = connect(models)
    models = {role: model for role, model in models.items() if role not in served}
    sources = _find_sources(config, models)
    tokenizers = {"strong": strong_tokenizer, "weak": weak_tokenizer}
    for role in tokenizers:
        if tokenizers[role] is None:
            tokenizers[role] = _load_own_tokenizer(config, role, served.get(role), sources)
    given = _read_template(config.cdr_chat_template)
    templates = [given or own_chat_template(tokenizer) for tokenizer in tokenizers.values()]
    if base is not None:
        check_shared(config, sources, base)
    for role, asked in served.items():
        asked.check(tokenizers[role], init_kwargs=config.cdr_model_init_kwargs)  # type: ignore[arg-type]
    warn_of_twins(served)
    lms = _load_models(config, models, sources, base=base, turns=turns or Turns()) | served
    members = []
    for (role, tokenizer), template, other in zip(tokenizers.items(), templates, reversed(templates), strict=True):
        # a base model has none: it reads its partner's
        members.append(_make_member(config, lms[role], tokenizer, role, template=template or other))
    here = [member.local for member in members if not member.is_served]
    if config.cdr_offload == "cpu" and not any(has_own_memory(model.decoder.device) for model in here):
        logger.warning(
            "cdr_offload is 'cpu', and the pair's device is the CPU: there is nowhere else to go, and it stays awake. "
            "cdr_offload='disk' lets go of its weights between calls."
        )
    return Pair(*members)


def load_member(config: CDRConfig, role: str, *, chat_template: str | None) -> Member:
    """
    One model of a pair alone, by its name. There is nothing else to make room for, and `cdr_offload` means nothing.

    Args:
        config (`CDRConfig`): As for `load_pair`.
        role (`str`): `"strong"` or `"weak"`: whose options are read.
        chat_template (`str` or `None`): Jinja text, see `find_template`.

    Raises:
        ConfigError, ModelError: as `load_pair`.
    """
    config = replace(config, cdr_offload="none")
    source = find_source(config, role)
    name, revision = source.tokenizer
    tokenizer = load_tokenizer(config, name, f"{role}_tokenizer", revision=revision)
    lms = _load_models(config, {role: source.name}, {role: source}, base=None, turns=Turns())
    return _make_member(config, lms[role], tokenizer, role, template=chat_template)


def find_template(config: CDRConfig, role: str) -> str | None:
    """The chat template that a model has by itself, or by `cdr_chat_template`; errors as for `load_pair`."""
    if config.cdr_chat_template is not None:
        return _read_template(config.cdr_chat_template)
    name, revision = find_source(config, role).tokenizer
    return own_chat_template(load_tokenizer(config, name, f"{role}_tokenizer", revision=revision))


def _make_member(
    config: CDRConfig, lm: CausalLM | ServedLM, tokenizer: PreTrainedTokenizerBase, role: str, *, template: str | None
) -> Member:
    encoder = Encoder(
        tokenizer,
        role,
        chat_template=template,
        chat_template_kwargs=config.cdr_chat_template_kwargs,  # type: ignore[arg-type]
        add_special_tokens=config.cdr_add_special_tokens,
    )
    if isinstance(lm, CausalLM):
        _check_embeddings(lm, tokenizer, role)
    return Member(lm, encoder, _choose_max_length(config, lm, role))


def load_tokenizer(
    config: CDRConfig, name: str, argument: str, *, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. `argument` names it in the error."""
    kwargs = {"revision": revision, "trust_remote_code": False}
    kwargs |= hub_kwargs(config.cdr_model_init_kwargs or {})  # type: ignore[arg-type]
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:  # a library's many ways to say that a folder holds no tokenizer
        raise ModelError(f"{argument} can't be loaded from {name!r}: {error}") from error


def _load_own_tokenizer(
    config: CDRConfig, role: str, served: ServedLM | None, sources: Mapping[str, Source]
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to strong or weak."""
    if served is None:
        name, revision = sources[role].tokenizer
        return load_tokenizer(config, name, f"{role}_tokenizer", revision=revision)
    try:
        return load_tokenizer(config, served.tokenizer, f"{role}_tokenizer")
    except ModelError as error:
        raise ModelError(
            f"{error}. The server has {served.name!r} from there: name the tokenizer behind its address, "
            f"?tokenizer=NAME, or pass {role}_tokenizer."
        ) from error


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cdr_chat_template is {path!r}, which can't be read: {error}. Give a UTF-8 file.") from None


def _find_sources(config: CDRConfig, models: dict[str, str | nn.Module]) -> dict[str, Source]:
    """Where the weights of those come from that are names of what is here."""
    named = [role for role, model in models.items() if not isinstance(model, nn.Module)]
    return find_sources(config) if len(named) == 2 else {role: find_source(config, role) for role in named}


def _load_models(
    config: CDRConfig,
    models: dict[str, str | nn.Module],
    sources: dict[str, Source],
    *,
    base: nn.Module | None,
    turns: Turns,
) -> dict[str, CausalLM]:
    """Strong and weak; a base of both is loaded once, and sleeps in one bed."""
    is_shared = len(sources) == 2 and share_base(config, sources)
    adapters = {source.adapter.weights if source.adapter else None for source in sources.values()}
    if is_shared and len(adapters) == 1:
        logger.warning("strong and weak are both %r: every log-ratio will be 0.", models["strong"])
    lms: dict[str, CausalLM] = {}
    bed: Bed | None = None
    for role, model in models.items():
        if isinstance(model, nn.Module):  # the caller may change its weights: nothing of them is kept between calls
            check_whole(model, role)
            lms[role] = CausalLM(model, role, seed=config.cdr_seed)
            continue
        source = sources[role]
        held = lms["strong"].base if is_shared and lms else base
        if held is None:
            _check_movable(config, source, role)
            turns.sleep()  # the other one's memory is needed; a base of both stays awake, to be read
        lm = lms[role] = CausalLM.load(
            source.name,
            role,
            **_loading(config, source),
            adapter=source.adapter,
            base=held,
            prefix_cache_tokens=config.cdr_prefix_cache_tokens,
            seed=config.cdr_seed,
        )
        if held is None:
            bed = _make_bed(config, lm, source, role)
        if bed is not None:
            turns.add(bed, partial(lm.rest, keep=config.cdr_offload == "cpu"))
            lm.wake = partial(turns.wake, bed)
    return lms


def _loading(config: CDRConfig, source: Source) -> dict[str, Any]:
    return {
        "revision": source.revision,
        "dtype": config.cdr_dtype,
        "device": config.cdr_device,
        "init_kwargs": config.cdr_model_init_kwargs,
    }


def _check_movable(config: CDRConfig, source: Source, role: str) -> None:
    if config.cdr_offload != "none":
        init_kwargs: Any = config.cdr_model_init_kwargs
        found = read_config(source.name, role, revision=source.revision, init_kwargs=init_kwargs)
        check_movable(config.cdr_offload, role, source.name, found)


def _make_bed(config: CDRConfig, lm: CausalLM, source: Source, role: str) -> Bed | None:
    """Where a model's weights sleep that was just loaded, if they do; of an adapted one the base's."""
    assert lm.base is not None
    if config.cdr_offload == "disk":
        reload = partial(reload_model, source.name, role, weights=str(lm.weights), **_loading(config, source))
        return OnDisk(lm.base, reload)
    if config.cdr_offload == "cpu" and has_own_memory(lm.decoder.device):
        return OnHost(lm.base, role)
    return None


def _check_embeddings(lm: CausalLM, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    """Added tokens may lie beyond the embeddings (Gemma 3's placeholder of images does); what is read daily may not."""
    added = tokenizer.added_tokens_decoder
    largest = max((id for id in tokenizer.get_vocab().values() if id not in added), default=0)
    if largest >= lm.num_embeddings:
        raise ModelError(
            f"{role}_tokenizer has the token id {largest}, and {role} ({lm.name}) embeds {lm.num_embeddings} tokens. "
            "Pass the tokenizer that belongs to the model."
        )


def _choose_max_length(config: CDRConfig, lm: CausalLM | ServedLM, role: str) -> int | None:
    asked, positions = config.cdr_max_length, lm.num_positions
    if asked is not None and positions is not None and asked > positions:
        remedy = " Or start the server with a larger --max-model-len." if isinstance(lm, ServedLM) else ""
        raise ConfigError(
            f"cdr_max_length is {asked}, and {role} ({lm.name}) has {positions} positions. Use fewer.{remedy}"
        )
    return positions if asked is None else asked
