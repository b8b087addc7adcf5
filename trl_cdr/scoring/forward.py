"""Three ways to run rows through one model: packed, padded, or row by row through its own logits.

`causal_lm` owns the model, checks which ways give its own log-probabilities, and chooses. `packing` plans, this runs.
"""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from .encoding import Row
from .logps import Reduce, head_logps, token_logps
from .packing import Layout, Pack, plan_batches, visible
from .tree_attention import TreeAttention

KeyValues = list[tuple[Tensor, Tensor]]  # a layer each: (1, heads, P, head size)

# A pack's attention mask has (tokens run) x (tokens seen) entries, and eager attention as many scores for each head.
MASK_ENTRIES = 2**22
EAGER_SCORES = 2**24
# Fewer tokens at a time leave processors idle (a CPU's products come near their full rate here). Where a pack's trees
# cost each other nothing it may be more: two prompts x two completions take 10 % longer in packs of 640.
GOOD_TOKENS = 640
GOOD_TREE_TOKENS = 1536
# A larger batch no longer fits a CPU's caches (16 rows of 511 tokens take 10 % longer at once than in four batches).
CPU_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Job:
    """What one forward does. `rows` are indices of the layout; `num_tokens` counts padding."""

    rows: tuple[int, ...]
    num_tokens: int
    pack: Pack | None = None


class Way(Protocol):
    """
    A way to run rows. `run` returns a float32 tensor on the CPU, in nats, for each of the job's rows: what `reduce`
    keeps of each of its C completion tokens; (C,) log-probabilities with `token_logps`.
    """

    def plan(self, layout: Layout, token_budget: int) -> list[Job]: ...

    def run(self, layout: Layout, job: Job, reduce: Reduce = ...) -> list[Tensor]: ...


class Decoder:
    """A transformers model taken apart: the backbone, and the head with what the architecture does to its output."""

    def __init__(self, model: Any, config: PretrainedConfig) -> None:
        self.model = model
        self.config = config
        self._head = model.get_output_embeddings()
        # Gemma 3's base_model is the whole model in transformers 4; drop with that floor.
        self.backbone = model.base_model if model.base_model is not model else model.get_decoder()

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def rope_switch(self) -> float:
        """
        The length beyond which a forward turns all its positions differently, infinite for most models.

        LongRoPE and dynamic scaling look at the longest row of a forward, so that rows would depend on their company.
        """
        rope = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        if rope.get("rope_type", rope.get("type")) not in ("longrope", "su", "dynamic"):
            return float("inf")
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(self.config, "original_max_position_embeddings", None)
        return float(original or self.config.max_position_embeddings)

    def batch_tokens(self, token_budget: int) -> int:
        """Tokens of one padded batch, at most."""
        return min(token_budget, CPU_TOKENS) if self.device.type == "cpu" else token_budget

    def hidden(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """(B, T) token ids -> (B, T, H) hidden states, as the head reads them."""
        hidden: Tensor = self.backbone(
            input_ids=input_ids.to(self.device), return_dict=True, **{"use_cache": False, **kwargs}
        ).last_hidden_state
        return hidden

    def logps(
        self, hidden: Tensor, targets: Tensor, counts: Sequence[int], reduce: Reduce = token_logps
    ) -> list[Tensor]:
        """(N, H) hidden states and the (N,) tokens that they predict -> what `reduce` keeps, row by row, on the CPU."""
        logps = head_logps(
            hidden, targets.to(self.device), self._logits, vocab_size=self.config.vocab_size, reduce=reduce
        )
        return list(torch.split(logps.cpu(), list(counts)))

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V)."""
        logits: Tensor = self._head(hidden)
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits


class OwnLogits:
    """Row by row through the model's own forward: slow, and right by definition."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._keeps_logits = "logits_to_keep" in inspect.signature(decoder.model.forward).parameters

    def plan(self, layout: Layout, token_budget: int) -> list[Job]:  # noqa: ARG002 - a row is a job
        return [Job((index,), len(row.inputs)) for index, row in enumerate(layout.rows)]

    def run(self, layout: Layout, job: Job, reduce: Reduce = token_logps) -> list[Tensor]:
        return [self._run_row(layout.rows[index], reduce) for index in job.rows]

    def _run_row(self, row: Row, reduce: Reduce) -> Tensor:
        kept = len(row.completion_ids)
        output = self._decoder.model(
            input_ids=torch.tensor([row.inputs], device=self._decoder.device),
            use_cache=False,
            return_dict=True,
            **({"logits_to_keep": kept} if self._keeps_logits else {}),
        )
        targets = torch.tensor(row.completion_ids, device=self._decoder.device)  # (C,)
        logits = output.logits[0, output.logits.shape[1] - kept :]  # (C, V)
        return head_logps(logits, targets, lambda kept: kept, vocab_size=logits.shape[1], reduce=reduce).cpu()


class Padded:
    """Rows of similar length side by side, padded on the right."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def plan(self, layout: Layout, token_budget: int) -> list[Job]:
        token_budget = self._decoder.batch_tokens(token_budget)
        lengths = [len(row.inputs) for row in layout.rows]
        return [Job(tuple(batch), len(batch) * lengths[batch[0]]) for batch in plan_batches(lengths, token_budget)]

    def run(self, layout: Layout, job: Job, reduce: Reduce = token_logps) -> list[Tensor]:
        rows = [layout.rows[index] for index in job.rows]
        # Where length decides on positions the whole row counts, as in a trainer's own forward.
        inputs = [row.inputs if self._decoder.rope_switch == float("inf") else row.ids for row in rows]
        longest = max(map(len, inputs))
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T)
        mask = torch.zeros_like(input_ids)  # (B, T)
        predicting = torch.zeros_like(input_ids, dtype=torch.bool)  # (B, T)
        for index, (row, ids) in enumerate(zip(rows, inputs, strict=True)):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            mask[index, : len(ids)] = 1
            predicting[index, row.predicting] = True
        targets = torch.tensor([token for row in rows for token in row.completion_ids])  # (N,)
        hidden = self._decoder.hidden(input_ids, attention_mask=mask.to(self._decoder.device))  # (B, T, H)
        hidden = hidden[predicting.to(self._decoder.device)]  # (N, H)
        return self._decoder.logps(hidden, targets, [len(row.completion_ids) for row in rows], reduce)


class Packed:
    """
    Trees of a prompt and its completions in one sequence, behind a prefix whose keys and values are kept.

    Each pack is one row of the batch with a float additive mask (a boolean one is silently wrong in eager attention);
    a fresh cache is filled from the stored prefix, which stays as it was.

    Args:
        decoder (`Decoder`): The model.
        prefix_cache_tokens (`int`): Tokens whose keys and values are kept between calls, least recently used out.
    """

    def __init__(self, decoder: Decoder, *, prefix_cache_tokens: int) -> None:
        self._decoder = decoder
        self._prefixes = _PrefixStore(prefix_cache_tokens)
        self._of_call: WeakKeyDictionary[Layout, KeyValues] = WeakKeyDictionary()  # also what is too long to be kept
        self._windows = attention_windows(decoder.config)

    def plan(self, layout: Layout, token_budget: int) -> list[Job]:
        if self._attends_by_tree and set(self._windows.values()) == {None}:
            good = GOOD_TREE_TOKENS
        else:  # attention grows with the pack and the products with the weights do not: they balance near here
            good = max(GOOD_TOKENS, int(self._decoder.config.hidden_size))
        packs = layout.packs(self._most(token_budget, len(layout.prefix)), good)
        return [Job(pack.rows, len(pack.ids), pack) for pack in packs]

    def run(self, layout: Layout, job: Job, reduce: Reduce = token_logps) -> list[Tensor]:
        pack, device = job.pack, self._decoder.device
        assert pack is not None
        num_prefix = len(layout.prefix)
        masks = self._masks(pack, num_prefix)
        kwargs: dict[str, Any] = {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}
        if num_prefix:
            kwargs |= {"past_key_values": self.fill_cache(layout), "use_cache": True}
        with self._attention(pack, masks):
            hidden = self._decoder.hidden(pack.ids[None], position_ids=pack.positions[None].to(device), **kwargs)
        hidden = hidden[0, pack.predicting.to(device)]  # (N, H)
        del masks  # neither it nor the cache is needed beside the logits
        kwargs.clear()
        return self._decoder.logps(hidden, pack.targets, pack.counts, reduce)

    def keeps(self, layout: Layout) -> bool:
        """Whether the layout's prefix serves other calls too, so that running it is no cost of this one."""
        return 0 < len(layout.constant) <= self._prefixes.max_tokens

    def fill_cache(self, layout: Layout) -> DynamicCache:
        """A fresh cache that holds the layout's prefix, which is run if it is not kept."""
        if layout not in self._of_call:
            self._of_call[layout] = self._prefix(layout.prefix)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._of_call[layout]):
            cache.update(keys, values, layer)
        return cache

    def _most(self, token_budget: int, num_prefix: int) -> int:
        """Tokens of one pack, such that its mask of Q x (P + Q) entries stays small."""
        config = self._decoder.config
        entries = MASK_ENTRIES
        if config._attn_implementation == "eager":
            entries = min(entries, EAGER_SCORES // config.num_attention_heads)
        most = int((-num_prefix + (num_prefix**2 + 4 * entries) ** 0.5) / 2)
        return max(1, min(token_budget, most))

    @property
    def _attends_by_tree(self) -> bool:
        is_sdpa = self._decoder.config._attn_implementation == "sdpa"
        return is_sdpa and TreeAttention.suits(self._decoder.device, self._decoder.dtype)

    def _attention(self, pack: Pack, masks: dict[str, Tensor]) -> AbstractContextManager[Any]:
        full = masks.get("full_attention")
        return nullcontext() if full is None or not self._attends_by_tree else TreeAttention(pack, full)

    def _masks(self, pack: Pack, num_prefix: int) -> dict[str, Tensor]:
        """For each kind of layer (1, 1, Q, P + Q), 0 where a token is seen."""
        masks = {}
        for kind, window in self._windows.items():
            seen = visible(pack, num_prefix=num_prefix, window=window, device=self._decoder.device)
            mask = torch.zeros(seen.shape, dtype=self._decoder.dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None]
        return masks

    def _prefix(self, ids: tuple[int, ...]) -> KeyValues:
        # A model that the caller holds may have been trained since: its weights' versions are part of the key.
        weights = [
            (parameter.data_ptr(), None if parameter.is_inference() else parameter._version)
            for parameter in self._decoder.model.parameters()
        ]
        key = (ids, hash(tuple(weights)))
        states = self._prefixes.get(key)
        if states is None:
            cache = DynamicCache()
            self._decoder.hidden(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            states = [(layer.keys, layer.values) for layer in cache.layers]
            self._prefixes.put(key, states)
        return states


class _PrefixStore:
    """Keys and values of prefixes, the least recently used out."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._states: OrderedDict[tuple[tuple[int, ...], int], KeyValues] = OrderedDict()

    def get(self, key: tuple[tuple[int, ...], int]) -> KeyValues | None:
        states = self._states.get(key)
        if states is not None:
            self._states.move_to_end(key)
        return states

    def put(self, key: tuple[tuple[int, ...], int], states: KeyValues) -> None:
        if len(key[0]) > self.max_tokens:
            return
        self._states[key] = states
        while sum(len(ids) for ids, _ in self._states) > self.max_tokens:
            self._states.popitem(last=False)


def attention_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layer that a model has, as transformers names them, each with its sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def why_not_packed(decoder: Decoder) -> str | None:
    """What of a model's config rules packing out, or None. The load-time check has the last word."""
    config = decoder.config
    parameters = inspect.signature(decoder.backbone.forward).parameters
    strange = [kind for kind in attention_windows(config) if kind not in ("full_attention", "sliding_attention")]
    if strange:
        return f"it has {strange[0].replace('_', ' ')} layers"
    if getattr(decoder.model, "_is_stateful", False):
        return "it keeps a recurrent state"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its positions are distances in the sequence (ALiBi)"
    if not {"position_ids", "past_key_values", "attention_mask"} <= set(parameters):
        return "its forward takes no position_ids"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({config._attn_implementation}) takes no mask of ours"
    return None
