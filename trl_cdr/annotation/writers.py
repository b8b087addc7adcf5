"""Models that write: seeded samples of a pair's model or of a policy, as completions that can be scored.

`probe` and `annotate` ask for them. Trains nothing and scores nothing.

A prompt's draws are its own: a table of random numbers, one for each completion and token, made from its seed; a token
is where the cumulated probability passes its number. So what a prompt gets depends neither on the prompts beside it nor
on how many there are, but for rounding, which follows the shape of the batch; and no random state is touched.
A prompt is read once for all its completions.
"""

import hashlib
import logging
from collections.abc import Sequence
from datetime import date
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..config import CDRConfig
from ..errors import ConfigError
from ..scoring.causal_lm import CausalLM
from ..scoring.encoding import Encoder, own_chat_template
from ..scoring.kv_cache import find_shareable
from ..scoring.pair import Member, Pair
from ..scoring.pair_loading import load_tokenizer
from ..scoring.sources import find_model
from ..scoring.types import Completion, Prompt, Unscorable

logger = logging.getLogger(__name__)

_AT_ONCE = 64  # sequences
_unshared: WeakSet[CausalLM] = WeakSet()  # models that can't continue several sequences from one prompt


def load_policy(name: str, config: CDRConfig, pair: Pair, *, revision: str | None = None) -> Member:
    """
    A policy that only writes, loaded as the pair is.

    Args:
        name (`str`): Name on the Hub or path, of a model or of an adapter, whose base is then the one that it names.
        config (`CDRConfig`): The pair's, for type, device and template.
        pair (`Pair`): Its strong model's template serves a policy that has none.
        revision (`str`, *optional*): Branch, tag or commit.

    Raises:
        ModelError: it can't be loaded.
        ConfigError: it is an adapter, and peft is not installed.
    """
    init_kwargs: Any = config.cdr_model_init_kwargs
    source = find_model(name, "policy", revision=revision, init_kwargs=init_kwargs)
    tokenizer = load_tokenizer(config, source.tokenizer[0], "policy", revision=source.tokenizer[1])
    lm = CausalLM.load(
        source.name,
        "policy",
        revision=source.revision,
        dtype=config.cdr_dtype,
        device=config.cdr_device,
        init_kwargs=init_kwargs,
        adapter=source.adapter,
    )
    encoder = Encoder(
        tokenizer,
        "policy",
        chat_template=own_chat_template(tokenizer) or pair.strong.encoder.chat_template,
        chat_template_kwargs=config.cdr_chat_template_kwargs,  # type: ignore[arg-type]
        today=None if config.cdr_date is None else date.fromisoformat(config.cdr_date),
        add_special_tokens=config.cdr_add_special_tokens,
        generation_ends=lm.end_ids,
    )
    return Member(lm, encoder, lm.num_positions)


def write(
    member: Member,
    prompts: Sequence[Prompt],
    *,
    per_prompt: int,
    temperature: float,
    max_new_tokens: int,
    seeds: Sequence[str],
) -> list[list[Completion]]:
    """
    Let a model write completions to each prompt. The global random state and the model are as before when it returns;
    one of a pair that sleeps is woken, and asleep again after `DensityRatioScorer.use`.

    Args:
        member (`Member`): The model and what encodes for it.
        prompts (`Sequence[Prompt]`): Strings or conversations.
        per_prompt (`int`): Completions to each.
        temperature (`float`): Of the whole distribution: no top-k, no nucleus, no penalty, whatever the model's own
            `generation_config.json` has.
        max_new_tokens (`int`): At most so many; one that has not ended by then is cut off.
        seeds (`Sequence[str]`): Of the draws, one for each prompt.

    Returns:
        `list[list[Completion]]`: for each prompt; empty for one that can't be encoded, or that leaves no room for a
        completion of `max_new_tokens`. `finished` is `None` where the model has no end token.

    Raises:
        ConfigError: no prompt would leave room for such a completion.
    """
    if member.max_length is not None and max_new_tokens >= member.max_length:
        raise ConfigError(
            f"a completion may have {max_new_tokens} tokens, and the model that writes takes {member.max_length} with "
            "its prompt: there is room for none. Let completions be shorter."
        )
    encoded = [_encode(member, prompt, max_new_tokens) for prompt in prompts]
    places = [(place, number) for place, ids in enumerate(encoded) for number in range(per_prompt) if ids]
    groups: list[list[Completion]] = [[] for _ in prompts]
    if not places:
        return groups
    tables = [_numbers(seed, per_prompt, max_new_tokens) for seed in seeds]
    model = member.local.model
    training = [module for module in model.modules() if module.training]
    own = model.generation_config
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.inference_mode():
        member.local.wake()  # loading may draw numbers
        model.eval()
        model.generation_config = _unshaped(own)
        try:
            for start in range(0, len(places), _AT_ONCE):
                batch = places[start : start + _AT_ONCE]
                rows = [encoded[place] for place, _ in batch]
                numbers = torch.stack([tables[place][number] for place, number in batch])  # (B, T)
                written = _generate(
                    member, rows, numbers=numbers, temperature=temperature, max_new_tokens=max_new_tokens
                )
                for (place, _), completion in zip(batch, written, strict=True):
                    groups[place].append(completion)
        finally:
            model.generation_config = own
            for module in training:
                module.training = True
    return groups


def end_id(member: Member, prompt: Prompt) -> int | None:
    """The token that ends a completion to such a prompt."""
    tokenizer = member.encoder.tokenizer
    if isinstance(prompt, str):
        return tokenizer.eos_token_id  # type: ignore[no-any-return]
    end = member.encoder.end_of_turn
    return None if end is None else int(tokenizer.convert_tokens_to_ids(end))


def prompt_ids(member: Member, prompt: Prompt) -> tuple[int, ...]:
    """
    The prompt as the model reads it before the first token of a completion.

    Raises:
        Unscorable: it can't be encoded.
    """
    return member.encoder.prompt_ids(prompt)


def _encode(member: Member, prompt: Prompt, max_new_tokens: int) -> tuple[int, ...]:
    """The prompt's tokens; none where it can't be encoded, or leaves no room for a completion."""
    try:
        ids = prompt_ids(member, prompt)
    except Unscorable:
        return ()
    return ids if member.max_length is None or len(ids) + max_new_tokens <= member.max_length else ()


def _unshaped(own: GenerationConfig) -> GenerationConfig:
    """A model's `generation_config` without what shapes its distribution, such as penalties, or searches in it."""
    runs = ("bos_token_id", "eos_token_id", "cache_implementation")
    return GenerationConfig(**{name: getattr(own, name) for name in runs})


def _numbers(seed: str, count: int, length: int) -> Tensor:
    """Random numbers from 0 to 1, of shape (count, length): the same on every device."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, length, generator=generator, dtype=torch.float64)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """
    Leaves of each distribution the one token that a given number draws.

    Args:
        numbers (`Tensor` of shape (B, T)): One for each sequence and each token that it may get.
        temperature (`float`): Of the distributions.
        start (`int`): Length of the prompts, padded.
    """

    def __init__(self, numbers: Tensor, temperature: float, start: int) -> None:
        self.numbers, self.temperature, self.start = numbers, temperature, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        probabilities = (scores.float() / self.temperature).softmax(dim=-1)
        cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)  # (B, V)
        drawn = torch.searchsorted(cumulated, self.numbers[:, step, None] * cumulated[:, -1:], right=True)  # (B, 1)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, drawn.clamp_(max=scores.shape[1] - 1), 0.0)


def _generate(
    member: Member, rows: Sequence[tuple[int, ...]], *, numbers: Tensor, temperature: float, max_new_tokens: int
) -> list[Completion]:
    model, tokenizer = member.local.model, member.encoder.tokenizer
    longest = max(map(len, rows))
    device = member.local.decoder.device
    pad = tokenizer.pad_token_id or 0  # masked
    ends = set(member.final_ids)
    distinct = list(dict.fromkeys(rows))
    batch = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in distinct], device=device)  # (D, P)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in distinct], device=device)  # (D, P)
    places = {ids: place for place, ids in enumerate(distinct)}
    of = torch.tensor([places[ids] for ids in rows], device=device)  # (B,)
    shared = _read_once(member.local, batch, mask, of, pad=pad) if len(distinct) < len(rows) else {}
    found = model.generate(
        batch[of],
        attention_mask=mask[of],
        do_sample=False,  # `_Draw` leaves one token
        logits_processor=LogitsProcessorList([_Draw(numbers.to(device), temperature, longest)]),
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        max_new_tokens=max_new_tokens,
        **shared,
    )[:, longest:].tolist()  # (B, T)
    completions = []
    for ids in found:
        length = next((place for place, id in enumerate(ids) if id in ends), len(ids))
        text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
        completions.append(Completion(text, (length < len(ids)) if ends else None, is_generated=True))
    return completions


def _read_once(lm: CausalLM, batch: Tensor, mask: Tensor, of: Tensor, *, pad: int) -> dict[str, DynamicCache]:
    """
    Let a model read prompts that several sequences share, less their last token; `generate` goes on from there.

    Args:
        lm (`CausalLM`): The model.
        batch, mask (`Tensor` of shape (D, P)): The prompts, padded on the left.
        of (`Tensor` of shape (B,)): For each sequence the place of its prompt.
        pad (`int`): What they are padded with.

    Returns:
        `dict`: arguments for `generate` of B sequences. Empty if the model can't continue several sequences from one
        prompt: each sequence then reads its prompt.
    """
    num_read = batch.shape[1] - 1
    # Beyond the switch all positions turn at once: each sequence has to be read whole.
    if lm in _unshared or not 1 <= num_read < lm.decoder.rope_switch:
        return {}
    implementation = lm.model.generation_config.cache_implementation
    if implementation is not None:
        _keep_apart(lm, f"its generation config has cache_implementation={implementation!r}")
        return {}
    output = lm.model.generate(
        batch[:, :-1],
        attention_mask=mask[:, :-1],
        do_sample=False,
        pad_token_id=pad,
        max_new_tokens=1,
        return_dict_in_generate=True,
    )
    try:
        shared = find_shareable(output, length=num_read)
    except TypeError as error:
        _keep_apart(lm, str(error))
        return {}
    for cache in shared.values():
        cache.reorder_cache(of)
    return shared


def _keep_apart(lm: CausalLM, reason: str) -> None:
    """Let a model read each prompt for each completion from now on, and log why: a warning if it should not have to."""
    _unshared.add(lm)
    level = logging.WARNING if lm.is_known_to_pack else logging.INFO
    logger.log(level, "%s reads each prompt once for each of its completions: %s.", lm.name, reason)
