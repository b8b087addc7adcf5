"""Two plain ways to run rows through one model: padded, or row by row through its own logits.

`packed` is the third, which runs no token twice. `causal_lm` owns the model, checks which ways give its own
log-probabilities, and chooses.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from .. import _compat
from .adapters import unwrap
from .kv_cache import find_argument
from .logps import Reduce, head_logps, token_logps
from .packing import Layout, Pack, plan_batches
from .types import Row

# A larger batch no longer fits a CPU's caches (16 rows of 511 tokens take 10 % longer at once than in four batches).
CPU_TOKENS = 2048
# Eager attention makes a score of every two tokens for each head, and more of the same size in its softmax: 64 MiB in
# float32 on a CPU, 256 MiB in bfloat16 on an accelerator.
CPU_SCORES = 2**24
ACCELERATOR_SCORES = 2**27


@dataclass(frozen=True, slots=True)
class Job:
    """
    What is run for some rows.

    Attributes:
        rows (`tuple[int, ...]`): Indices of the layout.
        num_tokens (`int`): Tokens that are run, padding included.
        width (`int`): Tokens of its largest forward: what has to shrink where memory runs out.
        pack (`Pack`, *optional*): How they are laid out, where they are packed.
        chunk (`int`, *optional*): Tokens of a forward over what stands before the pack, at most.
    """

    rows: tuple[int, ...]
    num_tokens: int
    width: int
    pack: Pack | None = None
    chunk: int = 0


class Way(Protocol):
    """
    A way to run rows. `run` returns what `reduce` keeps of each completion token of the job's rows, one row after the
    other: a float32 tensor of shape (N, ...) on the model's device, nats; (N,) log-probabilities with `token_logps`.
    """

    def plan(self, layout: Layout, token_budget: int) -> list[Job]: ...

    def run(self, layout: Layout, job: Job, reduce: Reduce = ...) -> Tensor: ...


class Decoder:
    """A transformers model taken apart: the backbone, and the head with what the architecture does to its output."""

    def __init__(self, model: Any, config: PretrainedConfig) -> None:
        self.model = model
        self.config = config
        inner = unwrap(model)
        self._head = inner.get_output_embeddings()
        self.backbone = _find_backbone(inner)

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
        If layer types have parameters of their own, the smallest length of all of them is returned.
        """
        return min(map(self._switch_of, self._rope))

    @property
    def has_experts(self) -> bool:
        """True if the config counts experts: a router chooses among them for each token."""
        return _counts_experts(self.config.to_dict())

    def read_ids(self, row: Row) -> tuple[int, ...]:
        """
        Return the ids that a forward reads of a row: all but the last one, which is only predicted.

        If the length decides on positions, the whole row is read, as in a trainer's own forward.
        """
        return row.inputs if self.rope_switch == float("inf") else row.ids

    def forget_rows(self, longest: int) -> None:
        """
        Make dynamic RoPE forget the rows that it has seen, before a forward that is not shorter than `rope_switch`.

        Transformers keeps the frequencies of the longest row until a row below the switch is run.

        Args:
            longest (`int`): Tokens of the next forward's longest row.
        """
        if longest >= self.rope_switch and any("dynamic" in _rope_type(rope) for rope in self._rope):
            self.model(input_ids=torch.tensor([[0]], device=self.device), use_cache=False, return_dict=True)

    @property
    def _rope(self) -> list[Mapping[str, Any]]:
        """RoPE's parameters: of each layer type (transformers 5), or one for all layers."""
        rope = getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}
        return [value for value in rope.values() if isinstance(value, Mapping)] or [rope]

    def _switch_of(self, rope: Mapping[str, Any]) -> float:
        kind = _rope_type(rope)
        if kind not in ("longrope", "su") and "dynamic" not in kind:
            return float("inf")
        name = "original_max_position_embeddings"
        original = rope.get(name) or getattr(self.config, name, None)
        if original is None or "dynamic" in kind:  # transformers looks at the config's positions alone
            original = min(original or math.inf, self.config.max_position_embeddings)
        return float(original)

    def batch_tokens(self, token_budget: int) -> int:
        """Tokens of one padded batch, at most."""
        return min(token_budget, CPU_TOKENS) if self.device.type == "cpu" else token_budget

    @property
    def scores(self) -> int | None:
        """
        Scores of one layer's attention, at most, where it makes them all (eager), else None.

        Models without attention (Mamba, RWKV) have no heads in their config and make no scores.
        """
        has_heads = getattr(self.config, "num_attention_heads", None) is not None
        if not has_heads or _compat.attention_implementation(self.config) != "eager":
            return None
        return CPU_SCORES if self.device.type == "cpu" else ACCELERATOR_SCORES

    @cached_property
    def cache_argument(self) -> str:
        """
        The argument by which the backbone takes keys and values of earlier tokens.

        Raises:
            TypeError: it takes none, see `find_argument`.
        """
        return find_argument(self.backbone, torch.tensor([[0, 1]], device=self.device))

    @cached_property
    def keeps_logits(self) -> bool:
        """True if the model's own forward computes the last logits alone when it is asked to (`logits_to_keep`)."""
        inputs = {"input_ids": torch.tensor([[0, 1]], device=self.device), "use_cache": False, "return_dict": True}
        try:
            logits = self.model(**inputs, logits_to_keep=1).logits
        except Exception as error:  # remote code may raise any exception
            if _compat.is_out_of_memory(error):
                raise
            return False
        return bool(logits.shape[1] == 1)

    def hidden(self, input_ids: Tensor, *, cache: DynamicCache | None = None, **kwargs: Any) -> Tensor:
        """
        Run the backbone.

        Args:
            input_ids (`Tensor` of shape (B, T)): Token ids.
            cache (`DynamicCache`, *optional*): Keys and values of earlier tokens; the forward adds those of its own.
            **kwargs: `position_ids` and `attention_mask`, as transformers takes them.

        Returns:
            `Tensor` of shape (B, T, H): hidden states, as the head reads them.
        """
        if cache is not None:
            kwargs[self.cache_argument] = cache
        hidden: Tensor = self.backbone(
            input_ids=input_ids.to(self.device, non_blocking=True),
            return_dict=True,
            use_cache=cache is not None,
            **kwargs,
        ).last_hidden_state
        return hidden

    def logps(self, hidden: Tensor, targets: Tensor, reduce: Reduce = token_logps) -> Tensor:
        """(N, H) hidden states and the (N,) tokens that they predict -> what `reduce` keeps, (N, ...) nats."""
        return head_logps(
            hidden,
            targets.to(hidden.device, non_blocking=True),
            self._logits,
            vocab_size=self.config.vocab_size,
            reduce=reduce,
        )

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

    def plan(self, layout: Layout, token_budget: int) -> list[Job]:  # noqa: ARG002 - a row is a job
        return [Job((index,), len(row.inputs), len(row.inputs)) for index, row in enumerate(layout.rows)]

    def run(self, layout: Layout, job: Job, reduce: Reduce = token_logps) -> Tensor:
        return torch.cat([self._run_row(layout.rows[index], reduce) for index in job.rows])

    def _run_row(self, row: Row, reduce: Reduce) -> Tensor:
        kept, ids = len(row.completion_ids), self._decoder.read_ids(row)
        unread = len(ids) - len(row.inputs)
        self._decoder.forget_rows(len(ids))
        output = self._decoder.model(
            input_ids=torch.tensor([ids], device=self._decoder.device),
            use_cache=False,
            return_dict=True,
            **({"logits_to_keep": kept + unread} if self._decoder.keeps_logits else {}),
        )
        stop = output.logits.shape[1] - unread
        logits = output.logits[0, stop - kept : stop]  # (C, V)
        targets = torch.tensor(row.completion_ids, device=logits.device)  # (C,)
        return head_logps(logits, targets, lambda kept: kept, vocab_size=logits.shape[1], reduce=reduce)


class Padded:
    """
    Rows of similar length side by side, padded on the right.

    No mask: in a causal model no token sees what stands on its right, and without one attention runs its fastest
    kernels (flash; heads that are grouped stay so).
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def plan(self, layout: Layout, token_budget: int) -> list[Job]:
        token_budget = self._decoder.batch_tokens(token_budget)
        lengths = [len(row.inputs) for row in layout.rows]
        if self._decoder.scores is not None:  # rows x T x T of them for each head: rows x T at the longest T
            entries = self._decoder.scores // int(self._decoder.config.num_attention_heads)
            token_budget = min(token_budget, max(1, entries // max(1, layout.longest)))
        batches = [(batch, len(batch) * lengths[batch[0]]) for batch in plan_batches(lengths, token_budget)]
        return [Job(tuple(batch), num_tokens, num_tokens) for batch, num_tokens in batches]

    def run(self, layout: Layout, job: Job, reduce: Reduce = token_logps) -> Tensor:
        rows = [layout.rows[index] for index in job.rows]
        inputs = [self._decoder.read_ids(row) for row in rows]
        longest = max(map(len, inputs))
        self._decoder.forget_rows(longest)
        input_ids = torch.zeros(len(rows), longest, dtype=torch.long)  # (B, T)
        predicting: list[int] = []  # places in the batch as one sequence, (N,)
        for index, (row, ids) in enumerate(zip(rows, inputs, strict=True)):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            start = index * longest
            predicting += range(start + row.predicting.start, start + row.predicting.stop)
        targets = torch.tensor([token for row in rows for token in row.completion_ids])  # (N,)
        hidden = self._decoder.hidden(input_ids)  # (B, T, H)
        # Places, not a mask of them, and copies that block nothing: the host need not wait for the device.
        hidden = hidden.flatten(0, 1)[torch.tensor(predicting).to(hidden.device, non_blocking=True)]  # (N, H)
        return self._decoder.logps(hidden, targets, reduce)


def _find_backbone(model: Any) -> Any:
    """Return the part of a model that computes its hidden states."""
    # Gemma 3's base_model is the whole model in transformers 4; drop with that floor.
    backbone = model.base_model if model.base_model is not model else model.get_decoder()
    if backbone is not model:
        return backbone
    # Llama 4's text model names no part as its base: it is the child that has the embeddings.
    embeddings = model.get_input_embeddings()
    children: list[nn.Module] = [child for child in model.children() if child is not embeddings]
    return next((child for child in children if any(part is embeddings for part in child.modules())), model)


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type")))


def _counts_experts(config: Mapping[Any, Any]) -> bool:
    """Return True if a value of a config, or of one inside of it, is the number of several experts."""
    for name, value in config.items():
        if isinstance(value, Mapping) and _counts_experts(value):
            return True
        is_count = str(name).endswith("experts") and "shared" not in str(name)
        if is_count and isinstance(value, int) and value > 1:
            return True
    return False
