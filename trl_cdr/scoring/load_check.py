"""Whether a way to run rows gives the model's own log-probabilities, found out on a few short rows when it is loaded.

Chooses nothing: `causal_lm` asks and decides. The tests compare whole architectures; this catches what they can't know,
a checkpoint with code or kernels of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .. import _compat
from .forward import Decoder, Way
from .kv_cache import describe_error
from .logps import Reduce, token_logps
from .packed import attention_windows
from .packing import MIN_PREFIX, Layout
from .types import Row

# Largest difference, in nats per token, at which two ways to the same log-probability count as equal. Of the probe's 22
# tokens SmolLM2-135M is off by at most 1.4e-5 in float32, 0.04 in float16 and 0.20 in bfloat16 (three seeds); with
# places counted in the sequence by 0.6 to 1.8, and where branches see each other by 2.8 to 8.4.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 1e-1, torch.bfloat16: 3e-1}

# Share of the tokens that may differ if a model in half precision has experts: a router often rates two of them nearly
# equal, and rounding decides. In tiny models (Qwen3-MoE, Mixtral, OLMoE, 12 seeds) one or two of the probe's 22 tokens
# differ, and 8 or more in wrong ways.
FLIPPED_SHARE = 0.25

_BUDGETS = (512, MIN_PREFIX)  # whole trees in a pack; and trees that are cut at their fork
_SHORT_WINDOW = 16  # shorter than the probe's rows
# Tokens of a row, and of its start that two rows share. 7 is no multiple of a block in which tokens see each other.
_ROW, _SHARED = 24, 7
_NUM_LOGITS = 64  # ids whose log-probabilities are compared at each token of the start


class LoadCheck:
    """
    The probe, and what the model's own logits say of it.

    Args:
        own (`Way`): Row by row through the model's own logits.
        dtype (`torch.dtype`): The type that the model computes in.
        num_ids (`int`): Token ids that it can read.
        num_positions (`int`, *optional*): Tokens that it can read at once.
        seed (`int`): Draws the tokens.
        has_experts (`bool`, *optional*, defaults to `False`): A router chooses among experts. In half precision a
            quarter of the tokens may then differ by more than the tolerance.
    """

    def __init__(
        self,
        own: Way,
        *,
        dtype: torch.dtype,
        num_ids: int,
        num_positions: int | None,
        seed: int,
        has_experts: bool = False,
    ) -> None:
        self._own = own
        self._may_flip = has_experts and dtype.itemsize < torch.float32.itemsize
        num_single = 4 if self._may_flip else 1  # of a single one no share may differ
        self._probes = _probes(min(num_ids, 256), num_positions, seed=seed, num_single=num_single)
        self._pair, self._num_same = _same_start(min(num_ids, 256), num_positions, seed=seed)
        found = [_run_all(own, probe, 1, reduce=_logps_and_largest) for probe in self._probes]  # (N, 2) each
        self._expected = [each[:, 0] for each in found]
        largest = max(float(each[:, 1].max()) for each in found)
        # A logit is rounded where the head writes it: two steps of its type may lie between two right ways.
        self._tolerance = max(TOLERANCE.get(dtype, max(TOLERANCE.values())), 2 * torch.finfo(dtype).eps * largest)

    def sees_later_tokens(self) -> str | None:
        """
        Compare the model's own log-probabilities at the common start of two rows that end differently.

        The rows have one length: dynamic RoPE depends on it, and that is allowed.

        Returns:
            `str` or `None`: how they differ; `None` if they are equal.
        """
        first, second = (_run(self._own, Layout([row]), 1, reduce=_first_logps) for row in self._pair)  # (T, 64) each
        first, second = first[: self._num_same], second[: self._num_same]
        # NaN of a later token reaches earlier ones through a weight of 0: that is no attention.
        is_number = ~(first.isnan() | second.isnan()).any(dim=1)
        return self._compare(first[is_number], second[is_number])

    def differs(self, way: Way, name: str) -> str | None:
        """
        Compare a way with the model's own log-probabilities.

        Args:
            way (`Way`): The way.
            name (`str`): `"packed"` or `"padded"`, for the reason.

        Returns:
            `str` or `None`: how they differ, or that the way fails; `None` if they are equal.
        """
        for probe, expected in zip(self._probes, self._expected, strict=True):
            for budget in _BUDGETS:
                try:
                    logps = _run_all(way, probe, budget)
                except Exception as error:  # remote code and kernels may raise any exception
                    if _compat.is_out_of_memory(error):
                        raise
                    return f"its forward fails on {name} rows: {describe_error(error)}"
                difference = self._compare(logps, expected)
                if difference is not None:
                    return f"{name} log-probabilities differ from its own by {difference}"
        return None

    def _compare(self, logps: Tensor, expected: Tensor) -> str | None:
        """The difference of two tensors of shape (N, ...), nats; `None` if they count as equal."""
        is_off = ~torch.isclose(logps, expected, rtol=0, atol=self._tolerance, equal_nan=True)
        num_off = int((is_off if is_off.ndim == 1 else is_off.any(dim=1)).sum())
        is_broken = bool((logps.isfinite() != expected.isfinite()).any())
        if num_off == 0 or (self._may_flip and not is_broken and num_off <= FLIPPED_SHARE * len(logps)):
            return None
        difference = f"up to {(logps - expected)[is_off].abs().max():.2g} nats"
        return f"{difference} (at {num_off} of {len(logps)} tokens)" if self._may_flip else difference


def missing_input(decoder: Decoder) -> str | None:
    """
    Run a backbone on a few tokens to find out if it takes what packing needs: keys and values, a mask and positions.

    Args:
        decoder (`Decoder`): The model.

    Returns:
        `str` or `None`: the first of these that it does not take, and why; `None` if it takes them all.
    """
    try:
        _ = decoder.cache_argument
    except TypeError as error:
        return f"its forward takes no keys and values of earlier tokens ({error})"
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    alone = ~torch.eye(3, dtype=torch.bool)
    # Each input has two values. Positions are given with a mask: without one transformers reads gaps between them as
    # the ends of sequences, and hides tokens.
    probes: dict[str, list[tuple[Tensor, list[int] | None]]] = {
        "attention_mask": [(causal, None), (alone, None)],
        "position_ids": [(causal, [0, 1, 2]), (causal, [0, 2, 4])],
    }
    for name, values in probes.items():
        try:
            outputs = [_run_hidden(decoder, hidden=hidden, positions=positions) for hidden, positions in values]
        except Exception as error:  # remote code may raise any exception
            if _compat.is_out_of_memory(error):
                raise
            return f"its forward fails with {name}: {describe_error(error)}"
        if torch.equal(*outputs):
            return f"its forward ignores {name}"
    return None


def _run_hidden(decoder: Decoder, *, hidden: Tensor, positions: list[int] | None) -> Tensor:
    """Hidden states (1, 3, H) of three tokens at these positions; `hidden` (3, 3) hides tokens as in a pack's mask."""
    mask = torch.zeros(1, 1, *hidden.shape, dtype=decoder.dtype).masked_fill_(hidden, torch.finfo(decoder.dtype).min)
    mask = mask.to(decoder.device)
    kinds = attention_windows(decoder.config)  # one mask, or one for each kind of layer
    inputs: dict[str, Any] = {"attention_mask": mask if len(kinds) == 1 else dict.fromkeys(kinds, mask)}
    if positions is not None:
        inputs["position_ids"] = torch.tensor([positions], device=decoder.device)
    return decoder.hidden(torch.tensor([[1, 1, 0]]), **inputs)


@contextmanager
def short_windows(config: PretrainedConfig) -> Iterator[None]:
    """Sliding windows that the probe's rows exceed; a real one has thousands of tokens. The config is put back."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        yield
        return
    config.sliding_window = min(window, _SHORT_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window


def _logps_and_largest(logits: Tensor, targets: Tensor) -> Tensor:
    """(n, 2): each target's log-probability, nats, and the largest logit beside it."""
    largest = logits.float().nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=-1)
    return torch.stack([token_logps(logits, targets), largest], dim=1)


def _first_logps(logits: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - the rows' targets differ
    """(n, 64): the log-probabilities of the first ids, nats."""
    return logits.float().log_softmax(dim=-1)[:, :_NUM_LOGITS]


def _run(way: Way, layout: Layout, token_budget: int, reduce: Reduce = token_logps) -> Tensor:
    """What `reduce` keeps of all rows' completion tokens, in the rows' order: (N, ...)."""
    results: dict[int, Tensor] = {}
    for job in way.plan(layout, token_budget):
        counts = [len(layout.rows[index].completion_ids) for index in job.rows]
        results |= dict(zip(job.rows, torch.split(way.run(layout, job, reduce).cpu(), counts), strict=True))
    return torch.cat([results[index] for index in range(len(layout.rows))])


def _run_all(way: Way, layouts: list[Layout], token_budget: int, reduce: Reduce = token_logps) -> Tensor:
    """As `_run`, for several layouts."""
    return torch.cat([_run(way, layout, token_budget, reduce) for layout in layouts])


def _probes(num_ids: int, num_positions: int | None, *, seed: int, num_single: int) -> list[list[Layout]]:
    """
    A long and a short prompt behind a common prefix, with two completions each, of random tokens; and packs of a
    single token behind that prefix, which libraries take other ways for.

    The ids are low ones: among the high ones are placeholders of images, which some forwards refuse.
    """
    room = 128 if num_positions is None else num_positions
    num_prefix = max(0, min(MIN_PREFIX + 5, room - 16))
    prompts, completions = ((max(3, min(MIN_PREFIX + 9, room - num_prefix - 8)), 5), (4, 7))
    if room < 16:
        prompts, completions = (1, 2), (1, 2)
    draw = _drawing(num_ids, seed)
    prefix = draw(num_prefix)
    rows = [Row(prompt, draw(m)) for prompt in [prefix + draw(n) for n in prompts] for m in completions]
    singles = []
    for _ in range(num_single):
        last = draw(1)
        singles.append(Layout([Row(prefix + last, draw(1)) for _ in range(2)], constant=prefix))
    return [[Layout(rows)], singles]


def _same_start(num_ids: int, num_positions: int | None, *, seed: int) -> tuple[list[Row], int]:
    """Two rows of one length with the same start of random tokens, and its length; all later tokens differ."""
    length = max(3, min(_ROW, num_positions or _ROW))
    ids = _drawing(num_ids, seed)(length)
    num_same = min(_SHARED, length - 2)  # the last token is predicted and not read
    other = ids[:num_same] + tuple((id + 1) % num_ids for id in ids[num_same:])
    return [Row(row[:1], row[1:]) for row in (ids, other)], num_same


def _drawing(num_ids: int, seed: int) -> Callable[[int], tuple[int, ...]]:
    """A function that draws so many random ids."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(num_ids, (count,), generator=generator, device="cpu").tolist())

    return draw
