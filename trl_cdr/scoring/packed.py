"""The way that runs no token twice: trees of a prompt and its completions in one sequence, behind kept prefixes.

`packing` plans, this runs; `causal_lm` checks that it gives the model's own log-probabilities before it is used.
"""

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from .. import _compat
from .forward import Decoder, Job
from .kv_cache import KeyValues, fill_cache, read_cache
from .logps import Reduce, token_logps
from .packing import Layout, Pack, PackLimits, visible
from .tree_attention import TreeAttention

PrefixKey = tuple[int, tuple[int, ...]]  # tokens of a forward, at most, and the prefix

# Architectures that are compared with their own logits in the tests, windows shorter than the rows included. Others
# may take our mask and positions and still count on a token's place in the sequence (GPT-Neo's local layers do).
VERIFIED = frozenset(
    {"cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral"}
    | {"mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
)
# Its eager attention cuts a causal mask of so many places for each forward, whatever the positions are.
_PLACES_ARE_COUNTED = {"gpt2"}

# A pack's attention mask has (tokens run) x (tokens seen) entries. On an accelerator 4,096 tokens keep every processor
# busy, and their mask takes 32 MiB in bfloat16.
_CPU_MASK, _MASK = 2**22, 2**24
# On a CPU products come near their full rate here, and attention grows with the pack. Where a pack's trees cost each
# other nothing it may be more: two prompts x two completions take 10 % longer in packs of 640.
_CPU_GOOD_TOKENS = 640
_CPU_GOOD_TREE_TOKENS = 1536


class Packed:
    """
    Trees of a prompt and its completions in one sequence, behind a prefix whose keys and values are kept.

    Each pack is one row of the batch with a float additive mask (a boolean one is silently wrong in eager attention);
    a fresh cache is filled from the stored prefix, which stays as it was.

    Args:
        decoder (`Decoder`): The model.
        prefix_cache_tokens (`int`): Tokens of constant prefixes whose keys and values are kept between calls, least
            recently used out. A call's other prefixes and stems are held until `forget`.
    """

    def __init__(self, decoder: Decoder, *, prefix_cache_tokens: int) -> None:
        self._decoder = decoder
        self._kept = _PrefixStore(prefix_cache_tokens)
        self._held: dict[tuple[int, ...], KeyValues] = {}  # of the call that is running
        self._num_by_tree = 0  # calls of attention by trees, so far

    def plan(self, layout: Layout, token_budget: int) -> list[Job]:
        jobs = []
        stem: tuple[int, ...] = ()
        chunk = self._decoder.batch_tokens(token_budget)
        for pack in layout.packs(self.limits(token_budget)):
            new = len(pack.stem) if pack.stem != stem else 0
            stem = pack.stem
            width = max(len(pack.ids), min(len(layout.prefix) + len(stem), chunk))
            jobs.append(Job(pack.rows, len(pack.ids) + new, width, pack, chunk))
        return jobs

    def run(self, layout: Layout, job: Job, reduce: Reduce = token_logps) -> Tensor:
        pack, device = job.pack, self._decoder.device
        assert pack is not None
        num_before = len(layout.prefix) + len(pack.stem)
        kwargs: dict[str, Any] = {}
        if num_before:
            kwargs["cache"] = self.fill_cache(layout, job)
        masks = self._masks(pack, num_before)
        kwargs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        with self._attention(pack, masks) as by_tree:
            hidden = self._decoder.hidden(
                pack.ids[None], position_ids=pack.positions[None].to(device, non_blocking=True), **kwargs
            )
        self._num_by_tree += 0 if by_tree is None else by_tree.num_calls
        hidden = hidden[0, pack.predicting.to(hidden.device, non_blocking=True)]  # (N, H)
        del masks  # neither it nor the cache is needed beside the logits
        kwargs.clear()
        return self._decoder.logps(hidden, pack.targets, reduce)

    def limits(self, token_budget: int) -> PackLimits:
        """What a pack may hold, with `token_budget` tokens of a forward at most."""
        decoder, config = self._decoder, self._decoder.config
        is_cpu = decoder.device.type == "cpu"
        entries = _CPU_MASK if is_cpu else _MASK
        if decoder.scores is not None:
            entries = min(entries, decoder.scores // config.num_attention_heads)
        if not is_cpu:
            good = token_budget
        elif self._attends_by_tree and set(attention_windows(config).values()) == {None}:
            good = _CPU_GOOD_TREE_TOKENS
        else:  # attention grows with the pack and the products with the weights do not: they balance near here
            good = max(_CPU_GOOD_TOKENS, int(config.hidden_size))
        counted = config.model_type in _PLACES_ARE_COUNTED
        return PackLimits(token_budget, entries, good, config.max_position_embeddings if counted else None)

    def keeps(self, layout: Layout) -> bool:
        """Whether the layout's prefix serves other calls too, so that running it is no cost of this one."""
        return 0 < len(layout.constant) <= self._kept.max_tokens

    @property
    def is_keeping(self) -> bool:
        """Whether keys and values of a prefix are kept now."""
        return self._kept.is_filled

    def fill_cache(self, layout: Layout, job: Job) -> DynamicCache:
        """A fresh cache of what stands before a job's pack, prefix and stem; what of it is not kept is run."""
        assert job.pack is not None
        return fill_cache(self._states(layout, job.pack.stem, job.chunk))

    def forget(self) -> None:
        """Let go of what is held for the call that was running."""
        self._held.clear()

    def drop(self) -> None:
        """Let go of all keys and values: the memory is needed."""
        self.forget()
        self._kept.clear()

    def rest(self) -> None:
        """Have what is kept leave the device for the host's memory, until it is needed again."""
        self.forget()
        self._kept.move(torch.device("cpu"))

    @property
    def lost_speed(self) -> str | None:
        """Why packs that were run took longer than they should, or `None`."""
        decoder = self._decoder
        is_sdpa = _compat.attention_implementation(decoder.config) == "sdpa"
        is_wanted = is_sdpa and decoder.device.type == "cpu" and decoder.dtype == torch.float32
        if not is_wanted or self._num_by_tree or "full_attention" not in attention_windows(decoder.config):
            return None
        if not self._attends_by_tree:
            return "under its mask: this torch has no attention kernel for a CPU that returns the scores' log-sum-exp"
        return "under its mask: its attention does not call scaled_dot_product_attention with the mask that it is given"

    @property
    def _attends_by_tree(self) -> bool:
        is_sdpa = _compat.attention_implementation(self._decoder.config) == "sdpa"
        return is_sdpa and TreeAttention.suits(self._decoder.device, self._decoder.dtype)

    def _attention(self, pack: Pack, masks: dict[str, Tensor]) -> AbstractContextManager[Any]:
        full = masks.get("full_attention")
        return nullcontext() if full is None or not self._attends_by_tree else TreeAttention(pack, full)

    def _masks(self, pack: Pack, num_before: int) -> dict[str, Tensor]:
        """For each kind of layer (1, 1, Q, P + Q), 0 where a token is seen."""
        masks = {}
        for kind, window in attention_windows(self._decoder.config).items():
            seen = visible(pack, num_prefix=num_before, window=window, device=self._decoder.device)
            mask = torch.zeros(seen.shape, dtype=self._decoder.dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None]
        return masks

    def _states(self, layout: Layout, stem: tuple[int, ...], chunk: int) -> KeyValues:
        """Keys and values of the layout's prefix and, behind it, a stem."""
        ids = layout.prefix + stem
        if ids not in self._held:
            if stem:
                before = self._states(layout, (), chunk) if layout.prefix else []
                self._held = {layout.prefix: before} if before else {}  # one stem at a time
                self._held[ids] = self._extend(before, len(layout.prefix), stem, chunk)
            else:
                key = (chunk, ids)  # other chunks give other bits
                states = self._kept.get(key)
                if states is None:
                    states = self._extend([], 0, ids, chunk)
                    if layout.constant:
                        self._kept.put(key, states)
                self._held[ids] = _move(states, self._decoder.device)
        return self._held[ids]

    def _extend(self, before: KeyValues, num_before: int, ids: tuple[int, ...], chunk: int) -> KeyValues:
        """Keys and values of tokens that follow others, in forwards of at most `chunk` tokens."""
        cache, limits, start = fill_cache(before), self.limits(chunk), 0
        while start < len(ids):
            seen = num_before + start
            # Behind nothing, causal attention needs no mask; eager attention has its scores all the same.
            needs_entries = seen > 0 or self._decoder.scores is not None
            stop = start + (limits.most(seen) if needs_entries else chunk)
            self._decoder.hidden(torch.tensor([ids[start:stop]]), cache=cache)
            start = stop
        return read_cache(cache)


class _PrefixStore:
    """Keys and values of prefixes, the least recently used out."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._states: OrderedDict[PrefixKey, KeyValues] = OrderedDict()

    @property
    def is_filled(self) -> bool:
        return bool(self._states)

    def get(self, key: PrefixKey) -> KeyValues | None:
        states = self._states.get(key)
        if states is not None:
            self._states.move_to_end(key)
        return states

    def put(self, key: PrefixKey, states: KeyValues) -> None:
        if len(key[1]) > self.max_tokens:
            return
        self._states[key] = states
        while sum(len(ids) for _, ids in self._states) > self.max_tokens:
            self._states.popitem(last=False)

    def move(self, device: torch.device) -> None:
        for key, states in self._states.items():
            self._states[key] = _move(states, device)

    def clear(self) -> None:
        self._states.clear()


def attention_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layer that a model has, as transformers names them, each with its sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def why_not_packed(decoder: Decoder) -> str | None:
    """Return what in a model's config rules packing out, or `None`. `load_check` finds out what its forward takes."""
    config = decoder.config
    attention = _compat.attention_implementation(config)
    strange = [kind for kind in attention_windows(config) if kind not in ("full_attention", "sliding_attention")]
    if strange:
        return f"it has {strange[0].replace('_', ' ')} layers"
    if _compat.keeps_recurrent_state(decoder.model):
        return "it keeps a recurrent state"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its positions are distances in the sequence (ALiBi)"
    if config.model_type not in VERIFIED:
        return f"its architecture ({config.model_type}) has not been compared with its own logits in packs"
    if attention not in ("sdpa", "eager"):
        return f"its attention ({attention}) takes no mask of ours; load it with attn_implementation='sdpa'"
    return None


def _move(states: KeyValues, device: torch.device) -> KeyValues:
    return [(keys.to(device, non_blocking=True), values.to(device, non_blocking=True)) for keys, values in states]
