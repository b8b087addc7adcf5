"""Names, addresses and modules -> a pair: models, one base of both where they share it, tokenizers, templates.

`loading` loads one checkpoint, `served_lm` finds one on servers; `pair_source` says when.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import CDRConfig
from ..errors import ConfigError, ModelError
from .causal_lm import CausalLM
from .checkpoint import read_config
from .encoding import Encoder, PromptForm, own_chat_template
from .loading import hub_kwargs
from .offload import Bed, OnDisk, OnHost, Turns, check_movable, has_own_memory, reload_model
from .pair import Member, Pair
from .policy_base import check_shared
from .served_lm import ServedLM, connect, warn_of_twins
from .sources import Source, find_source, find_sources, share_base
from .weights import check_whole

logger = logging.getLogger(__name__)


def load_pair(
    config: CDRConfig,
    strong: str | nn.Module,
    weak: str | nn.Module,
    *,
    strong_tokenizer: PreTrainedTokenizerBase | None = None,
    weak_tokenizer: PreTrainedTokenizerBase | None = None,
    base: nn.Module | None = None,
    turns: Turns | None = None,
    form: PromptForm | None = None,
) -> Pair:
    """
    Load what is a name, take what is a module, and check that the two can be compared.

    Args:
        config (`CDRConfig`): Revisions, type, device, template and lengths.
        strong, weak (`str` or `nn.Module`): Name, path or loaded model; `check_sources` has passed.
        strong_tokenizer, weak_tokenizer: Loaded tokenizers; each model's own if `None`.
        base (`nn.Module`, *optional*): The policy's, to be used in place of one that is loaded.
        turns (`Turns`, *optional*): Who wakes models that `cdr_offload` puts to sleep.
        form (`PromptForm`, *optional*): How prompts are written. Default: as `config` has it, without tools.

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
        member = _make_member(config, lms[role], tokenizer, role, template=template or other, form=form)
        members.append(member)
        _warn_of_open_thoughts(member, role)
    here = [member.local for member in members if not member.is_served]
    if config.cdr_offload == "cpu" and not any(has_own_memory(model.decoder.device) for model in here):
        logger.warning(
            "cdr_offload is 'cpu', and the pair's device is the CPU: there is nowhere else to go, and it stays awake. "
            "cdr_offload='disk' lets go of its weights between calls."
        )
    return Pair(*members)


def load_member(config: CDRConfig, role: str, *, chat_template: str | None) -> Member:
    """
    One model of a pair alone, by its name or address. There is nothing else to make room for, and `cdr_offload` means
    nothing.

    Args:
        config (`CDRConfig`): As for `load_pair`.
        role (`str`): `"strong"` or `"weak"`: whose options are read.
        chat_template (`str` or `None`): Jinja text, see `find_template`.

    Raises:
        ConfigError, ModelError: as `load_pair`.
    """
    config = replace(config, cdr_offload="none")
    if role in config.served:
        asked = connect({role: getattr(config, f"cdr_{role}")})[role]
        tokenizer = _load_own_tokenizer(config, role, asked, {})
        asked.check(tokenizer, init_kwargs=config.cdr_model_init_kwargs)  # type: ignore[arg-type]
        return _make_member(config, asked, tokenizer, role, template=chat_template)
    source = find_source(config, role)
    tokenizer = _load_own_tokenizer(config, role, None, {role: source})
    lms = _load_models(config, {role: source.name}, {role: source}, base=None, turns=Turns())
    return _make_member(config, lms[role], tokenizer, role, template=chat_template)


def find_template(config: CDRConfig, role: str) -> str | None:
    """The chat template that a model has by itself, or by `cdr_chat_template`; errors as for `load_pair`."""
    if config.cdr_chat_template is not None:
        return _read_template(config.cdr_chat_template)
    served = connect({role: getattr(config, f"cdr_{role}")}).get(role)
    sources = {role: find_source(config, role)} if served is None else {}
    return own_chat_template(_load_own_tokenizer(config, role, served, sources))


def has_template(config: CDRConfig) -> bool:
    """Return True if one of the pair's models has a chat template. Errors as for `load_pair`."""
    return any(find_template(config, role) is not None for role in ("strong", "weak"))


def _warn_of_open_thoughts(member: Member, role: str) -> None:
    template = member.encoder.template
    if template is None or not template.opens_thought or template.thoughts is None:
        return
    remedy = "cdr_chat_template_kwargs={'enable_thinking': false}" if template.has_switch else "cdr_chat_template"
    logger.warning(
        "The generation prompt of %s (%s) opens a thought (%s). An answer of a data set without %s is read as an "
        "answer without thoughts; text that a policy writes in training is read as a thought up to %s. If the "
        "models are to answer without thoughts, set %s.",
        role,
        member.lm.name,
        template.thoughts.tag,
        template.thoughts.close,
        template.thoughts.close,
        remedy,
    )


def _make_member(
    config: CDRConfig,
    lm: CausalLM | ServedLM,
    tokenizer: PreTrainedTokenizerBase,
    role: str,
    *,
    template: str | None,
    form: PromptForm | None = None,
) -> Member:
    form = form or PromptForm.of(config)
    encoder = Encoder(
        tokenizer,
        role,
        chat_template=template,
        chat_template_kwargs=form.template_kwargs,
        tools=form.tools,
        today=form.today,
        add_special_tokens=form.add_special_tokens,
        generation_ends=lm.end_ids,
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
        if getattr(held, "is_loaded_in_8bit", False):
            # The first modules to run such weights take the scales out of them, and others would find none.
            logger.warning("%s stands on a base in 8 bits, which no two models can share: it is loaded again.", role)
            held = None
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
