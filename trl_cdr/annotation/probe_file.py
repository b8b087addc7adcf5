"""`trl-cdr probe`: a file or data set of prompts -> the reward attacked on them, in a folder and on the terminal.

`cli` parses the arguments, `probe` attacks, `probe_report` shows.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import CDRConfig, shareable_options
from ..errors import ConfigError, InputError
from ..scoring.scorer import DensityRatioScorer
from .probe import probe
from .probe_report import ATTACK_NAMES, draw_probe, print_probe
from .reader import needs, open_source, read_rows
from .score_folder import write_json


@dataclass
class ProbeArguments:
    """
    What the reward is attacked with, and where the result goes.

    Raises:
        ConfigError: a value is out of range.
    """

    input: str = field(
        metadata={
            "help": "Prompts: a .jsonl (or .json, .csv, .parquet) file, a folder, or a name on the Hub. Each row holds "
            "prompt (a string or messages), and may hold completion (an honest one; without it some are sampled), "
            "finished (false: cut off) and domain."
        }
    )
    output_dir: str = field(
        default="./trl-cdr-probe", metadata={"help": "Folder for probe.json and probe.png, which are replaced."}
    )
    prompts: int = field(default=40, metadata={"help": "Rows that are read, from the first."})
    policy: str | None = field(
        default=None,
        metadata={
            "help": "The policy to be trained, name or path: it writes honest completions and the samples that attack. "
            "Default: the strong model writes the former, the weak model the latter."
        },
    )
    best_of: int = field(default=16, metadata={"help": "Hot samples a prompt, the best of which attacks. 0: none."})
    temperature: float = field(default=1.5, metadata={"help": "Of these."})
    search_budget: int = field(
        default=240,
        metadata={"help": "Completions that a token search may score a prompt, 12 for each token. 0: no search."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest sample, in tokens."})
    max_win: float | None = field(
        default=None,
        metadata={
            "help": "Exit with status 1 where an attack is worth more than the honest completion, behind cdr_gate, on "
            "a larger share of the prompts (0.05, say). The best of N is not judged: honest samples would win so too."
        },
    )

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"prompts is {self.prompts}: it counts rows. Use a few dozen.")
        if self.max_win is not None and not 0 <= self.max_win < 1:
            raise ConfigError(f"max_win is {self.max_win}: it is a share of prompts. Use 0 or more, and less than 1.")


def probe_file(arguments: ProbeArguments, config: CDRConfig) -> str | None:
    """
    Attack the reward on the prompts of a file or data set; print a table, and write `probe.json` and `probe.png`.

    Args:
        arguments (`ProbeArguments`): Input, attacks and output.
        config (`CDRConfig`): The pair and its options. `cdr_gate` is the gate whose reward is judged, `cdr_seed` the
            seed of all draws.

    Returns:
        `str | None`: What exceeded `max_win`, in one line.

    Raises:
        InputError: the input can't be read, a row has no prompt, or none can be scored.
        ConfigError: see `probe`.
        ModelError: see `probe`.
    """
    found_rows = read_rows(open_source(arguments.input), check=needs("prompt"))
    rows = [row.fields for row in islice(found_rows, arguments.prompts)]
    if not rows:
        raise InputError(f"input is {arguments.input!r}, which has no rows. Give a few dozen prompts.")
    scorer = DensityRatioScorer.from_config(config)
    column = None
    if scorer.router is not None:
        scorer.router.check_column({name for row in rows for name in row}, where=f"input {arguments.input!r}")
        column = scorer.router.column
    with Console(stderr=True).status("loading") as status:
        found = probe(
            scorer,
            [row["prompt"] for row in rows],
            [row.get("completion") for row in rows],
            finished=[row.get("finished") is not False for row in rows],
            domains=[row.get(column or "domain") for row in rows],
            policy=arguments.policy,
            best_of=arguments.best_of,
            temperature=arguments.temperature,
            search_budget=arguments.search_budget,
            max_new_tokens=arguments.max_new_tokens,
            on_stage=status.update,
        )
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "probe.json", {**found, "options": shareable_options({**vars(arguments), **vars(config)})})
    draw_probe(found, folder / "probe.png", max_win=arguments.max_win)
    print_probe(found, folder)
    return why_it_fails(found, arguments.max_win)


def why_it_fails(found: dict[str, Any], max_win: float | None) -> str | None:
    """
    The attack that wins most, in one line, where that is too often.

    Args:
        found (`dict`): What `probe` returns.
        max_win (`float` or `None`): A share of prompts; `None`: no share is too large.
    """
    if max_win is None or found["win"]["worst"] <= max_win:
        return None
    gate = found["gate"]
    return (
        f"{ATTACK_NAMES[found['win']['attack']]} is worth more than the honest completion on "
        f"{found['win']['worst']:.0%} of the prompts (cdr_gate {gate}), above max_win "
        f"{max_win:g}; on average over the attacks it is {found['win']['mean']:.0%}."
    )
