"""Models that write: seeded samples of a pair's model or of a policy, as completions that can be scored.

`probe` asks for them. Trains nothing and scores nothing.
"""

from collections.abc import Sequence

import torch

from ..config import CDRConfig
from ..scoring.causal_lm import CausalLM
from ..scoring.encoding import Completion, Encoder, Prompt, Unscorable, own_chat_template
from ..scoring.pair import Member, Pair, load_tokenizer

_AT_ONCE = 64  # sequences


def load_policy(name: str, config: CDRConfig, pair: Pair) -> Member:
    """
    A policy that only writes, loaded as the pair is.

    Args:
        name (`str`): Name on the Hub or path.
        config (`CDRConfig`): The pair's, for type, device and template.
        pair (`Pair`): Its strong model's template serves a policy that has none.

    Raises:
        ModelError: it can't be loaded.
    """
    tokenizer = load_tokenizer(config, name, "policy")
    encoder = Encoder(
        tokenizer,
        "policy",
        chat_template=own_chat_template(tokenizer) or pair.strong.encoder.chat_template,
        chat_template_kwargs=config.cdr_chat_template_kwargs,  # type: ignore[arg-type]
        add_special_tokens=config.cdr_add_special_tokens,
    )
    init_kwargs = config.cdr_model_init_kwargs
    lm = CausalLM.load(
        name,
        "policy",
        dtype=config.cdr_dtype,
        device=config.cdr_device,
        init_kwargs=init_kwargs,  # type: ignore[arg-type]
    )
    return Member(lm, encoder, lm.num_positions)


def write(
    member: Member,
    prompts: Sequence[Prompt],
    *,
    per_prompt: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[list[Completion]]:
    """
    Let a model write completions to each prompt. The global random state and the model are as before when it returns;
    one of a pair that sleeps is woken, and asleep again after `DensityRatioScorer.use`.

    Args:
        member (`Member`): The model and what encodes for it.
        prompts (`Sequence[Prompt]`): Strings or conversations.
        per_prompt (`int`): Completions to each.
        temperature (`float`): Of the whole distribution: no top-k, no nucleus.
        max_new_tokens (`int`): At most so many; one that has not ended by then is cut off.
        seed (`int`): Of the draws.

    Returns:
        `list[list[Completion]]`: for each prompt; empty for one that can't be encoded. `finished` is `None` where the
        model has no end token.
    """
    encoded = [_encode(member, prompt, max_new_tokens) for prompt in prompts]
    places = [place for place, ids in enumerate(encoded) for _ in range(per_prompt) if ids]
    groups: list[list[Completion]] = [[] for _ in prompts]
    if not places:
        return groups
    model = member.local.model
    member.local.wake()  # loading may draw numbers, and does so before the seed is set
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.inference_mode():
            torch.manual_seed(seed)
            for start in range(0, len(places), _AT_ONCE):
                batch = places[start : start + _AT_ONCE]
                rows = [encoded[place] for place in batch]
                written = _generate(member, rows, temperature=temperature, max_new_tokens=max_new_tokens)
                for place, completion in zip(batch, written, strict=True):
                    groups[place].append(completion)
    finally:
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
    return member.encoder.encode(prompt, Completion("", None, ids=(0,))).prompt_ids


def _encode(member: Member, prompt: Prompt, max_new_tokens: int) -> tuple[int, ...]:
    """The prompt's tokens, so many of them, from the right, as leave room for a completion."""
    try:
        ids = prompt_ids(member, prompt)
    except Unscorable:
        return ()
    return ids if member.max_length is None else ids[-max(1, member.max_length - max_new_tokens) :]


def _generate(
    member: Member, rows: Sequence[tuple[int, ...]], *, temperature: float, max_new_tokens: int
) -> list[Completion]:
    model, tokenizer = member.local.model, member.encoder.tokenizer
    longest = max(len(ids) for ids in rows)
    if member.max_length is not None:
        max_new_tokens = max(1, min(max_new_tokens, member.max_length - longest))
    device = member.local.decoder.device
    pad = tokenizer.pad_token_id or 0  # masked
    batch = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in rows], device=device)  # (B, P)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)  # (B, P)
    ends = set(member.final_ids)
    found = model.generate(
        batch,
        attention_mask=mask,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        max_new_tokens=max_new_tokens,
    )[:, longest:].tolist()  # (B, T)
    completions = []
    for ids in found:
        length = next((place for place, id in enumerate(ids) if id in ends), len(ids))
        text = str(tokenizer.decode(ids[:length], skip_special_tokens=True))
        completions.append(Completion(text, (length < len(ids)) if ends else None))
    return completions
