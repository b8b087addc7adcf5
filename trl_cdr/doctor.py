"""What a bug report should hold: versions, device, and how each model of a pair will run. Prints; `scoring` knows.

`trl-cdr doctor` is its only caller.
"""

import platform
from typing import Any

import torch
from accelerate import PartialState

from . import _compat
from .config import CDRConfig
from .scoring.scorer import DensityRatioScorer


def examine(config: CDRConfig | None) -> dict[str, Any]:
    """
    Look at the installation, and at a pair if one is given, which is loaded and checked.

    Args:
        config (`CDRConfig` or `None`): The pair.

    Returns:
        `dict`: `platform`, `packages` (name -> version or `None`), `device`, and `pair` as
        `DensityRatioScorer.describe` gives it, or `None`.

    Raises:
        ConfigError, ModelError: as `DensityRatioScorer`.
    """
    device = PartialState().device
    return {
        "platform": platform.platform(),
        "packages": _compat.versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}",
        "pair": None if config is None else DensityRatioScorer.from_config(config).describe(),
    }


def print_examination(found: dict[str, Any]) -> None:
    """The findings on stdout, line by line: in a bug report nothing is cut off."""
    lines = [("platform", found["platform"])]
    lines += [(name, installed or "-") for name, installed in found["packages"].items()]
    lines.append(("device", found["device"]))
    pair = found["pair"]
    if pair is not None:
        for role in ("strong", "weak"):
            model = pair[role]
            reason = f" ({model['reason']})" if model["reason"] else ""
            lines += [
                ("", ""),
                (role, model["name"]),
                ("", f"{model['architecture']}, {model['parameters']:,} parameters, {model['weights_mb']:,.0f} MB"),
                ("", f"about {model['work_mb']:,.0f} MB more at work, kept prefixes {model['prefix_mb']:,.0f} MB"),
                ("", f"{model['dtype']} on {model['device']}, {model['attention']} attention"),
                ("", f"runs {model['way']}{reason}"),
                ("", f"rows of up to {model['max_length'] or 'any number of'} tokens"),
                ("", f"a turn ends with {model['end_of_turn']!r}; chat template: {model['chat_template']}"),
            ]
        lines += [
            ("", ""),
            ("together", "one vocabulary" if pair["shares_vocabulary"] else "different vocabularies"),
            ("", "every row encoded once" if pair["reads_alike"] else "every row encoded for each"),
            ("", f"gate: {_describe_gate(pair['gate'], pair['strong']['end_tokens'])}"),
        ]
    for label, text in lines:
        print(f"{label:14}{text}".rstrip())


def _describe_gate(gate: str, end_tokens: list[str]) -> str:
    if gate != "surprise":
        return gate
    ends = ", ".join(map(repr, end_tokens))
    return f"surprise, and survival beyond {ends}" if ends else "surprise, without survival: strong has no end token"
