"""What a pair loses by the precision of its weights: its scores beside those of full precision, on a few rows.

Loads one pair after the other, so that both need not fit together. `doctor` prints what comes of it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..config import CDRConfig
from ..errors import ConfigError, InputError
from ..scoring.checkpoint import read_config
from ..scoring.loading import expected_dtype, find_device
from ..scoring.score import Score
from ..scoring.scorer import DensityRatioScorer
from ..scoring.sources import find_sources
from ..scoring.types import Prompt
from .precision_rows import ROWS
from .reader import needs, open_source, read_rows

_QUANTISES = ("quantization_config", "load_in_8bit", "load_in_4bit")  # of `from_pretrained`
_DTYPES = ("dtype", "torch_dtype")


def measure_precision(config: CDRConfig, input: str | None = None) -> dict[str, Any]:
    """
    Score rows with a pair and with the same pair in full precision, see `full_precision`. Plain ratios, without
    criteria: what is asked is what the weights have lost.

    Args:
        config (`CDRConfig`): The pair.
        input (`str`, *optional*): JSONL file of prompts and completions, as `trl-cdr score` reads it. Default: rows of
            our own.

    Returns:
        `dict`: as `compare`, and `reference`: what the pair was compared with.

    Raises:
        ConfigError: the pair is in full precision.
        InputError: the file can't be read, or no two completions in it have the same prompt.
        ModelError: as `DensityRatioScorer`.
    """
    reference = full_precision(config)
    given = None if input is None else _read(Path(input))
    scores = []
    prompts: list[Prompt] = []
    for each in (reference, config):
        plain = replace(each, cdr_criteria=None, cdr_domain=None, cdr_router=None, cdr_gate="none", cdr_typicality=None)
        scorer = DensityRatioScorer.from_config(plain)
        rows = _own_rows(scorer) if given is None else given
        prompts = [prompt for prompt, _ in rows]
        scores.append(scorer.score(prompts, [completion for _, completion in rows]))
        scorer.unload()
    what = "the pair, not quantised" if reference.cdr_dtype == config.cdr_dtype else "the pair in float32"
    return {"reference": what, **compare(prompts, scores[0], scores[1])}


def full_precision(config: CDRConfig) -> CDRConfig:
    """
    A pair without what makes its weights smaller: of a quantised pair the same, not quantised; of another one the same
    in float32.

    Raises:
        ConfigError: that is the same pair, its checkpoints hold quantised weights alone, or a model is on a server.
    """
    if config.served:
        raise ConfigError(
            f"--probe loads the pair twice, and cdr_{config.served[0]} is on a server. Leave it out, or load both here."
        )
    kwargs: Mapping[str, Any] = config.cdr_model_init_kwargs or {}  # type: ignore[assignment]
    device = find_device(config.cdr_device)
    types = set()
    for role, source in find_sources(config).items():
        found = read_config(source.name, role, revision=source.revision, init_kwargs=kwargs)
        if getattr(found, "quantization_config", None) is not None:
            raise ConfigError(
                f"--probe compares with full precision, and {role} ({source.name}) is stored quantised. Leave it out, "
                "or pass the checkpoint that it was made of, with quantization_config in cdr_model_init_kwargs."
            )
        asked = kwargs.get("torch_dtype") or kwargs.get("dtype") or config.cdr_dtype
        types.add(expected_dtype(found, str(asked).removeprefix("torch."), device))
    if kwargs.keys() & {*_QUANTISES}:
        return replace(config, cdr_model_init_kwargs=_without(kwargs, _QUANTISES))
    if types == {torch.float32}:
        raise ConfigError(
            "--probe compares with full precision, and the pair has it: float32, not quantised. Pass cdr_dtype, or "
            "quantization_config in cdr_model_init_kwargs, or leave --probe out."
        )
    return replace(config, cdr_dtype="float32", cdr_model_init_kwargs=_without(kwargs, _DTYPES))


def _without(kwargs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    return {name: value for name, value in kwargs.items() if name not in names} or None


def compare(prompts: Sequence[Prompt], full: Sequence[Score], found: Sequence[Score]) -> dict[str, Any]:
    """
    How far scores are from those of full precision. Pure.

    Args:
        prompts (`Sequence`): Of each row.
        full, found (`Sequence[Score]`): The rows' scores in full precision, and those that are judged.

    Returns:
        `dict`: `rows` and `unscorable`, `preferences` (pairs of completions of one prompt that full precision tells
        apart), `turned` (of these, whose order is another) and `turned_margin` (the largest margin that full precision
        gives one of them, nats); and `strong`, `weak` and `log_ratio`, each `mean` and `max` of the error in nats a
        token: of a row's sum over its tokens, of the log-ratio token by token where the two share a vocabulary.

    Raises:
        InputError: no two rows that were scored have one prompt.
    """
    both = [index for index, (x, y) in enumerate(zip(full, found, strict=True)) if x.error is None and y.error is None]
    groups: dict[str, list[int]] = defaultdict(list)
    for index in both:
        groups[repr(prompts[index])].append(index)
    margins = [
        (_value(full[i]) - _value(full[j]), _value(found[i]) - _value(found[j]))
        for group in groups.values()
        for i, j in combinations(group, 2)
    ]
    margins = [(before, after) for before, after in margins if before]
    if not margins:
        raise InputError("no two completions of the input have one prompt: there is no preference that could turn.")
    turned = [abs(before) for before, after in margins if before * after <= 0]
    errors: dict[str, list[float]] = {"strong": [], "weak": [], "log_ratio": []}
    for index in both:
        one, other = full[index], found[index]
        for role in ("strong", "weak"):
            difference = getattr(other, f"{role}_logps") - getattr(one, f"{role}_logps")
            errors[role].append(abs(difference) / max(1, one.n_tokens))
        if one.per_token is not None and other.per_token is not None:
            errors["log_ratio"] += (other.per_token - one.per_token).abs().tolist()
        else:
            errors["log_ratio"].append(abs(_value(other) - _value(one)) / max(1, one.n_tokens))
    return {
        "rows": len(full),
        "unscorable": len(full) - len(both),
        "preferences": len(margins),
        "turned": len(turned),
        "turned_margin": max(turned, default=0.0),
        **{name: {"mean": fmean(values), "max": max(values)} for name, values in errors.items()},
    }


def _value(score: Score) -> float:
    assert score.value is not None
    return score.value


def _read(path: Path) -> list[tuple[Prompt, str]]:
    rows = read_rows(open_source(path), check=needs("prompt", "completion"))
    return [(row.fields["prompt"], row.fields["completion"]) for row in rows]


def _own_rows(scorer: DensityRatioScorer) -> list[tuple[Prompt, str]]:
    """Our rows as conversations, or as plain text where the pair has no chat template."""
    is_chat = scorer.describe()["strong"]["chat_template"] != "none"
    return [
        ([{"role": "user", "content": text}] if is_chat else f"{text}\n", completion)
        for text, completions in ROWS.items()
        for completion in completions
    ]
