"""Whether a way to run rows gives the model's own log-probabilities, found out on a few short rows when it is loaded.

Chooses nothing: `causal_lm` asks and decides. The tests compare whole architectures; this catches what they can't know,
a checkpoint with code or kernels of its own.
"""

from collections.abc import Iterator
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

_BUDGETS = (512, MIN_PREFIX)  # whole trees in a pack; and trees that are cut at their fork
_SHORT_WINDOW = 16  # shorter than the probe's rows


class LoadCheck:
    """
    The probe, and what the model's own logits say of it.

    Args:
        own (`Way`): Row by row through the model's own logits.
        dtype (`torch.dtype`): The type that the model computes in.
        num_ids (`int`): Token ids that it can read.
        num_positions (`int`, *optional*): Tokens that it can read at once.
        seed (`int`): Draws the tokens.
    """

    def __init__(self, own: Way, *, dtype: torch.dtype, num_ids: int, num_positions: int | None, seed: int) -> None:
        self._layouts = _probes(min(num_ids, 256), num_positions, seed=seed)
        found = [_run(own, layout, 1, reduce=_logps_and_largest) for layout in self._layouts]  # (N, 2) each
        self._expected = [each[:, 0] for each in found]
        largest = max(float(each[:, 1].max()) for each in found)
        # A logit is rounded where the head writes it: two steps of its type may lie between two right ways.
        self._tolerance = max(TOLERANCE.get(dtype, max(TOLERANCE.values())), 2 * torch.finfo(dtype).eps * largest)

    def differs(self, way: Way, name: str) -> str | None:
        """
        Compare a way with the model's own log-probabilities.

        Args:
            way (`Way`): The way.
            name (`str`): `"packed"` or `"padded"`, for the reason.

        Returns:
            `str` or `None`: how they differ, or that the way fails; `None` if they are equal.
        """
        for layout, expected in zip(self._layouts, self._expected, strict=True):
            for budget in _BUDGETS:
                try:
                    logps = _run(way, layout, budget)
                except Exception as error:  # remote code and kernels may raise any exception
                    if _compat.is_out_of_memory(error):
                        raise
                    return f"its forward fails on {name} rows: {describe_error(error)}"
                if not torch.allclose(logps, expected, rtol=0, atol=self._tolerance, equal_nan=True):
                    difference = (logps - expected).abs().max()
                    return f"{name} log-probabilities differ from its own by up to {difference:.2g} nats"
        return None


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


def _run(way: Way, layout: Layout, token_budget: int, reduce: Reduce = token_logps) -> Tensor:
    """What `reduce` keeps of all rows' completion tokens, in the rows' order: (N, ...)."""
    results: dict[int, Tensor] = {}
    for job in way.plan(layout, token_budget):
        counts = [len(layout.rows[index].completion_ids) for index in job.rows]
        results |= dict(zip(job.rows, torch.split(way.run(layout, job, reduce).cpu(), counts), strict=True))
    return torch.cat([results[index] for index in range(len(layout.rows))])


def _probes(num_ids: int, num_positions: int | None, *, seed: int) -> list[Layout]:
    """
    A long and a short prompt behind a common prefix, with two completions each, of random tokens; and a pack of a
    single token behind that prefix, which libraries take other ways for.

    The ids are low ones: among the high ones are placeholders of images, which some forwards refuse.
    """
    room = 128 if num_positions is None else num_positions
    num_prefix = max(0, min(MIN_PREFIX + 5, room - 16))
    prompts, completions = ((max(3, min(MIN_PREFIX + 9, room - num_prefix - 8)), 5), (4, 7))
    if room < 16:
        prompts, completions = (1, 2), (1, 2)
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(num_ids, (count,), generator=generator, device="cpu").tolist())

    prefix = draw(num_prefix)
    rows = [Row(prompt, draw(m)) for prompt in [prefix + draw(n) for n in prompts] for m in completions]
    last = draw(1)
    return [Layout(rows), Layout([Row(prefix + last, draw(1)) for _ in range(2)], constant=prefix)]
