"""What a bug report should hold: versions, device, how each model of a pair will run, and what it takes of the memory.
Prints; `scoring` knows.

`trl-cdr doctor` is its only caller.
"""

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from . import _compat
from .annotation.precision import measure_precision
from .config import CDRConfig
from .errors import ConfigError
from .scoring.checkpoint import read_config
from .scoring.loading import expected_dtype, find_device
from .scoring.memory import GB, Footprint, Holding, advise, footprint, holdings
from .scoring.scorer import DensityRatioScorer
from .scoring.sources import find_sources, share_base
from .scoring.string_prompts import MEANINGS

_UNITS = {"GB": GB, "GiB": 2**30}


@dataclass
class DoctorArguments:
    """
    What of a pair is looked at.

    Raises:
        ConfigError: `memory` is no size, or arguments do not go together.
    """

    no_load: bool = field(
        default=False,
        metadata={"help": "Read the configs alone, and print what the pair will take: nothing large is downloaded."},
    )
    memory: str | None = field(
        default=None,
        metadata={"help": "What there is for the pair, such as 24GB or 80GiB. Default: all of the device's."},
    )
    probe: bool = field(
        default=False,
        metadata={
            "help": "Score a few rows twice, as asked for and in full precision: what quantisation, or a type, costs. "
            "Loads the pair twice, one after the other."
        },
    )
    require: Literal["packed"] | None = field(
        default=None,
        metadata={"help": "Exit with status 1 if a model does not run in this way: for a job that must not be slow."},
    )
    input: str | None = field(
        default=None,
        metadata={"help": "With probe: JSONL of prompts and completions, as score reads it, in place of our own rows."},
    )

    def __post_init__(self) -> None:
        self.memory_bytes  # noqa: B018 - raises
        if self.probe and self.no_load:
            raise ConfigError("probe scores with the pair, and no_load keeps it from being loaded. Leave out one.")
        if self.require is not None and self.no_load:
            raise ConfigError(
                f"require is {self.require!r}, and no_load is set. How a model runs is known after it is loaded. Leave "
                "out no_load."
            )
        if self.input is not None and not self.probe:
            raise ConfigError(f"input is {self.input!r}, which --probe alone reads. Pass --probe too.")

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number; `None` where it is left out."""
        if self.memory is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", self.memory.strip())
        if found is None or not float(found[1]):
            raise ConfigError(f"memory is {self.memory!r}. Give a size, such as 24GB (10**9 bytes) or 80GiB (2**30).")
        return int(float(found[1]) * _UNITS[found[2]])


def examine(config: CDRConfig | None, arguments: DoctorArguments | None = None) -> dict[str, Any]:
    """
    Look at the installation, and at a pair if one is given, which is loaded and checked where `no_load` does not say
    otherwise.

    Args:
        config (`CDRConfig` or `None`): The pair.
        arguments (`DoctorArguments`, *optional*): What to look at.

    Returns:
        `dict`: `platform`, `packages` (name -> version or `None`), `device`; `pair` as `DensityRatioScorer.describe`
        gives it, or `None`; `memory` as `examine_memory` gives it, or `None` (also where a model is on a server);
        `probe` as `measure_precision` gives it, or `None`.

    Raises:
        ConfigError: with `cdr_share_policy` the pair is to be loaded.
        ConfigError, ModelError: as `DensityRatioScorer` and `footprint`.
    """
    arguments = arguments or DoctorArguments()
    if config is not None and config.cdr_share_policy and not arguments.no_load:
        raise ConfigError(
            "cdr_share_policy is set, and doctor has no policy that the pair could stand on. Pass --no_load for its "
            "memory, or leave out cdr_share_policy to look at the pair beside the policy."
        )
    device = PartialState().device
    memory = None if config is None or config.served else examine_memory(config, arguments.memory_bytes)
    is_loaded = config is not None and not arguments.no_load
    probed = measure_precision(config, arguments.input) if config is not None and arguments.probe else None
    return {
        "platform": platform.platform(),
        "packages": _compat.versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}",
        "pair": DensityRatioScorer.from_config(config).describe() if config is not None and is_loaded else None,
        "memory": memory,
        "probe": probed,
    }


def missed_requirement(found: dict[str, Any], arguments: DoctorArguments) -> str | None:
    """
    Check the pair against `--require`.

    Args:
        found (`dict`): The result of `examine`.
        arguments (`DoctorArguments`): With `require`.

    Returns:
        `str` or `None`: the models that do not run as required, each with the reason; `None` if all do.
    """
    if arguments.require is None:
        return None
    models = {role: found["pair"][role] for role in ("strong", "weak")}
    missed = [
        f"{role} ({model['name']}) "
        + ("is on a server" if "servers" in model else f"runs {model['way']}: {model['reason']}")
        for role, model in models.items()
        if model.get("way") != arguments.require
    ]
    return f"--require is {arguments.require}, and {'; '.join(missed)}." if missed else None


def examine_memory(config: CDRConfig, memory: int | None) -> dict[str, Any]:
    """
    What a pair takes of the memory in each way to hold it, by arithmetic from its configs.

    Args:
        config (`CDRConfig`): The pair.
        memory (`int`, *optional*): Bytes that there are for it; all of its device's if `None`.

    Returns:
        `dict`: `strong` and `weak` (as `Footprint`), `device`, `memory_bytes`, `ways` (as `Holding`, with
        `device_bytes`), `current` (the name of that which `config` asks for) and `advice`.

    Raises:
        ModelError: a config can't be read, or has no known architecture.
    """
    init_kwargs: Mapping[str, Any] = config.cdr_model_init_kwargs or {}  # type: ignore[assignment]
    device = find_device(config.cdr_device)
    sources = find_sources(config)
    is_shared = share_base(config, sources)
    prints: dict[str, Footprint] = {}
    for role, source in sources.items():
        found = read_config(source.name, role, revision=source.revision, init_kwargs=init_kwargs)
        asked = init_kwargs.get("torch_dtype") or init_kwargs.get("dtype") or config.cdr_dtype
        prints[role] = footprint(
            found,
            role,
            dtype=asked if isinstance(asked, torch.dtype) else expected_dtype(found, asked, device),
            device=device,
            token_budget=config.cdr_token_budget,
            prefix_tokens=0 if config.cdr_criteria is None else config.cdr_prefix_cache_tokens,
        )
    ways = holdings(prints["strong"], prints["weak"], is_shared=is_shared)
    memory = _total_memory(device) if memory is None else memory
    current = _current(config, ways, is_shared=is_shared)
    return {
        **{role: asdict(each) for role, each in prints.items()},
        "device": str(device),
        "memory_bytes": memory,
        "ways": [{**asdict(way), "device_bytes": way.device_bytes} for way in ways],
        "current": current.name,
        "advice": advise(ways, current, memory),
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
            lines += [("", ""), (role, model["name"])]
            if "servers" in model:
                lines.append(("", f"on {', '.join(model['servers'])}, which have it from {model['root']}"))
            else:
                lines += [
                    ("", f"{model['architecture']}, {model['parameters']:,} parameters, {model['weights_mb']:,.0f} MB"),
                    ("", f"about {model['work_mb']:,.0f} MB more at work, kept prefixes {model['prefix_mb']:,.0f} MB"),
                    ("", f"{model['dtype']} on {model['device']}, {model['attention']} attention"),
                ]
            lines += [
                ("", f"runs {model['way']}{reason}"),
                ("", f"rows of up to {model['max_length'] or 'any number of'} tokens"),
                ("", f"a turn ends with {model['end_of_turn']!r}; chat template: {model['chat_template']}"),
                ("", f"thoughts: {model['thoughts']}; date in prompts: {model['date'] or 'none'}"),
            ]
        lines += [
            ("", ""),
            ("together", "one vocabulary" if pair["shares_vocabulary"] else "different vocabularies"),
            ("", "every row encoded once" if pair["reads_alike"] else "every row encoded for each"),
            ("", f"string prompts outside trainers: {MEANINGS[pair['string_prompts']]}"),
            ("", f"gate: {_describe_gate(pair['gate'], pair['strong']['end_tokens'])}"),
        ]
    for label, text in lines:
        print(f"{label:14}{text}".rstrip())
    if found["memory"] is not None:
        print_memory(found["memory"], pair)
    if found["probe"] is not None:
        print_precision(found["probe"])


def print_memory(memory: dict[str, Any], pair: dict[str, Any] | None = None) -> None:
    """
    The table of `examine_memory` on stdout.

    Args:
        memory (`dict`): What was found.
        pair (`dict`, *optional*): The pair as it was loaded, whose bytes stand beside the arithmetic.
    """
    table = Table(title=f"memory of the pair on {memory['device']}, GB (10**9 bytes)", title_justify="left")
    headings = ["weights", "measured", "at work", "together", "host", "fits"]
    headings = [heading for heading in headings if pair is not None or heading != "measured"]
    table.add_column("held as", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("option", overflow="fold")
    for way in memory["ways"]:
        is_current = way["name"] == memory["current"]
        if way["device_bytes"] is None:
            cells = dict.fromkeys(headings, "-")
            cells["fits"] = "differ in shape"
        else:
            cells = {
                "weights": _gb(way["weight_bytes"]),
                "measured": "" if pair is None or not is_current else _gb(_measured(pair, way["name"])),
                "at work": _gb(way["extra_bytes"]),
                "together": _gb(way["device_bytes"]),
                "host": _gb(way["host_bytes"]),
                "fits": "yes" if way["device_bytes"] <= memory["memory_bytes"] else "no",
            }
        name = f"{way['name']} *" if is_current else way["name"]
        table.add_row(
            name, *(cells[heading] for heading in headings), way["option"], style="bold" if is_current else ""
        )
    console = Console(width=max(132, Console().width))
    print()
    console.print(table)
    sizes = ", ".join(f"{role} {memory[role]['parameters']:,} parameters" for role in ("strong", "weak"))
    console.print(f"* as asked for. By arithmetic from the configs: {sizes}. {memory['advice']}", soft_wrap=True)


def print_precision(probed: dict[str, Any]) -> None:
    """What `measure_precision` found, on stdout."""
    turned, preferences = probed["turned"], probed["preferences"]
    table = Table(title="error, nats a token", title_justify="left")
    for heading in ("", "mean", "largest"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in ("strong", "weak", "log_ratio"):
        table.add_row(name.replace("_", "-"), *(f"{probed[name][which]:.4f}" for which in ("mean", "max")))
    console = Console(width=max(100, Console().width))
    print()
    console.print(table)
    widest = f", the clearest of them by {probed['turned_margin']:.2f} nats" if turned else ""
    console.print(
        f"Beside {probed['reference']}, on {probed['rows'] - probed['unscorable']} rows: of {preferences} preferences "
        f"{turned} turn ({100 * turned / preferences:.0f} of 100){widest}.",
        soft_wrap=True,
    )


def _current(config: CDRConfig, ways: list[Holding], *, is_shared: bool) -> Holding:
    """The way that the options ask for; `is_shared`: strong and weak stand on the same base."""
    kwargs: Mapping[str, Any] = config.cdr_model_init_kwargs or {}  # type: ignore[assignment]
    quantization = kwargs.get("quantization_config") or {}
    option = "cdr_strong_adapter" if is_shared else "the default"
    if is_shared and config.cdr_share_policy:
        option = "cdr_share_policy"
    if config.cdr_offload != "none":
        option = f"cdr_offload={config.cdr_offload}"
    for bits in ("8bit", "4bit"):
        name = f"load_in_{bits}"
        if quantization.get(name) if isinstance(quantization, Mapping) else getattr(quantization, name, False):
            option = bits
    return next(way for way in ways if option in way.option)


def _measured(pair: dict[str, Any], name: str) -> float:
    """Bytes of weights that are on the device at a time; what strong and weak share counts once, and wakes whole."""
    sizes = [pair[role]["weights_mb"] for role in ("strong", "weak")]
    is_shared = pair["weights_mb"] < sum(sizes)
    most = max(sizes) if name.startswith("asleep") and not is_shared else pair["weights_mb"]
    return float(most) * 2**20


def _total_memory(device: torch.device) -> int:
    """Of a GPU its own, else the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(size: float) -> str:
    """Three digits, whatever the size."""
    return f"{size / GB:,.1f}" if size >= 10 * GB else f"{size / GB:.3g}"


def _describe_gate(gate: str, end_tokens: list[str]) -> str:
    if gate != "surprise":
        return gate
    ends = ", ".join(map(repr, end_tokens))
    return f"surprise, and survival beyond {ends}" if ends else "surprise, without survival: strong has no end token"
