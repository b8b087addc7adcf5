"""`trl-cdr evaluate`: files or data sets of preferences -> a pair's accuracy, in a folder and on the terminal.

`cli` parses the arguments, `evaluate` counts, `evaluate_report` shows.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import CDRConfig, shareable_options
from ..errors import ConfigError
from .baseline import read_baseline
from .evaluate import Evaluation, evaluate
from .evaluate_report import draw_evaluation, print_evaluation, write_markdown
from .labels import read_labels
from .passes import Passes
from .preferences import Preference, draw, name_sets, read_preferences
from .reader import BadRow, OnBadRow, check_on_bad_row, open_source
from .rewardbench import BENCHMARKS, find_benchmark, selftest
from .score_folder import write_json


@dataclass
class PreferenceArguments:
    """
    Which preferences, and what becomes of bad ones.

    Raises:
        ConfigError: a value is out of range.
    """

    data: list[str] = field(
        metadata={
            "help": "Preference sets: .jsonl (.jsonl.gz, .parquet, .json, .csv) files, folders, or names on the Hub. "
            "Rows hold prompt, chosen and rejected, and may hold subset, domain and id. allenai/reward-bench and "
            "allenai/reward-bench-2 are counted by their own rules as well."
        }
    )
    benchmark: str | None = field(
        default=None,
        metadata={
            "help": "The published set that the files of data hold: allenai/reward-bench or allenai/reward-bench-2. "
            "Default: none. A set that is named as on the Hub is known."
        },
    )
    split: str = field(default="train", metadata={"help": "Which split of what has several; RewardBench's is known."})
    pairs: int | None = field(
        default=None,
        metadata={"help": "At most so many pairs, drawn as evenly over the subsets as these allow. Default: all."},
    )
    on_bad_row: OnBadRow = field(
        default="raise", metadata={"help": "What becomes of a row that can't be used: raise stops; skip: counts it."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the log-probabilities that models gave. Default: passes in trl-cdr's cache."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # YAML has one word where the command line has a list
            self.data = [self.data]
        if self.pairs is not None and self.pairs < 1:
            raise ConfigError(f"pairs is {self.pairs}: it counts pairs. Use 1 or more, or leave it out.")
        if self.benchmark is not None and find_benchmark(self.benchmark) is None:
            names = " or ".join(benchmark.name for benchmark in BENCHMARKS)
            raise ConfigError(f"benchmark is {self.benchmark!r}, which is not known. Use {names}.")
        check_on_bad_row(self.on_bad_row)

    def read(self, config: CDRConfig) -> tuple[list[Preference], list[BadRow]]:
        """
        The preferences of all sets, and the bad rows.

        Args:
            config (`CDRConfig`): Its router may read a column; its seed draws.

        Raises:
            InputError, ConfigError: see `open_source` and `read_preferences`; two sets have the same rows.
        """
        own = {benchmark.name: benchmark.split for benchmark in BENCHMARKS}
        router = str(config.cdr_router)
        column = router.removeprefix("column:").strip() if router.startswith("column:") else None
        found: list[Preference] = []
        bad: list[BadRow] = []
        seen: dict[str, str] = {}
        for name, short in zip(self.data, name_sets(self.data), strict=True):
            source = open_source(name, split=own.get(name, self.split), subset=None)
            if source.num_rows and source.fingerprint in seen:
                raise ConfigError(
                    f"data has {seen[source.fingerprint]} and {name} with the same rows, which would count twice. Pass "
                    "one of them."
                )
            seen[source.fingerprint] = name
            preferences, refused = read_preferences(
                source, on_bad_row=self.on_bad_row, column=column, benchmark=self.benchmark, name=short
            )
            found += preferences
            bad += refused
        return (found if self.pairs is None else draw(found, self.pairs, seed=config.cdr_seed)), bad

    def open_passes(self) -> Passes:
        """Where tables are kept."""
        return Passes(None if self.cache_dir is None else Path(self.cache_dir).expanduser())


@dataclass
class EvaluateArguments(PreferenceArguments):
    """
    What a pair is evaluated on, and where the result goes.

    Raises:
        ConfigError: a value is out of range.
    """

    output_dir: str = field(
        default="./trl-cdr-evaluate",
        metadata={"help": "Folder for evaluate.json, evaluate.md, evaluate.png and rows.jsonl, which are replaced."},
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Rows that another judge has scored, compared row by row: those that RewardBench publishes, or "
            "rows.jsonl of an earlier run."
        },
    )
    candidates: list[str] = field(
        default_factory=list,
        metadata={"help": "Other pairs, STRONG,WEAK each, beside cdr_strong and cdr_weak, to choose among by labels."},
    )
    suggest_labels: int = field(
        default=0,
        metadata={
            "help": "Write so many pairs to suggestions.jsonl whose label by a person would say most about the choice "
            "among candidates: pairs of models, criteria or none, sum, mean or the reward. Rows may hold completions "
            "(two) in place of chosen and rejected, and on_policy."
        },
    )
    labels: str | None = field(
        default=None,
        metadata={"help": "suggestions.jsonl with better filled in (0 or 1): chooses a candidate."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.candidates, str):
            self.candidates = [self.candidates]
        if self.suggest_labels < 0:
            raise ConfigError(f"suggest_labels is {self.suggest_labels}: it counts pairs. Use 0 or more.")
        for each in self.candidates:
            if len([name for name in each.split(",") if name.strip()]) != 2:
                raise ConfigError(f"candidates has {each!r}. Write STRONG,WEAK for each pair.")


def evaluate_files(arguments: EvaluateArguments, config: CDRConfig) -> Evaluation:
    """
    Evaluate a pair on files or data sets; print a table, and write the files that `output_dir` names.

    Args:
        arguments (`EvaluateArguments`): Input and output.
        config (`CDRConfig`): The pair and its options.

    Raises:
        InputError: the data, labels or baseline can't be read, or nothing can be counted.
        ConfigError, ModelError: see `evaluate`.
    """
    folder = Path(arguments.output_dir)
    if arguments.suggest_labels:
        _keep_labels(folder / "suggestions.jsonl")
    preferences, bad = arguments.read(config)
    labels = [] if arguments.labels is None else read_labels(arguments.labels)
    baseline = None if arguments.baseline is None else read_baseline(arguments.baseline)
    found = evaluate(
        config,
        preferences,
        passes=arguments.open_passes(),
        pairs=[(strong.strip(), weak.strip()) for strong, weak in (one.split(",") for one in arguments.candidates)],
        suggest_labels=arguments.suggest_labels,
        labels=labels,
        baseline=baseline,
    )
    found.summary["bad_rows"] = count_bad(bad)
    folder.mkdir(parents=True, exist_ok=True)
    options = shareable_options({**vars(arguments), **vars(config)})
    write_json(folder / "evaluate.json", {**found.summary, "options": options})
    (folder / "evaluate.md").write_text(write_markdown(found.summary), encoding="utf-8")
    for name in ("evaluate.png", "rows.jsonl", "baseline.jsonl"):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    if found.rows:
        draw_evaluation(found.summary).savefig(folder / "evaluate.png")
    for name, rows in (("rows", found.rows), ("suggestions", found.suggested), ("baseline", found.compared)):
        if rows:
            _write_rows(folder / f"{name}.jsonl", rows)
    print_evaluation(found.summary, folder)
    return found


def count_bad(rows: Sequence[BadRow]) -> dict[str, int]:
    """How many bad rows there are for each reason."""
    return dict(Counter(row.reason for row in rows))


def print_selftest() -> bool:
    """Print the published sets' rules on values made up for them, beside what they should be; whether all hold."""
    checks = selftest()
    width = max(len(check.rule) for check in checks)
    for check in checks:
        said = "ok" if check.holds else "WRONG"
        print(f"{check.rule:{width}}  by hand {check.expected:.12f}  found {check.found:.12f}  {said}")
    return all(check.holds for check in checks)


def _keep_labels(path: Path) -> None:
    """
    Raises:
        ConfigError: the file holds a person's labels.
    """
    if path.exists() and any('"better": null' not in line for line in path.read_text("utf-8").splitlines()):
        raise ConfigError(
            f"{str(path)!r} holds labels, and suggest_labels would write over it. Move it, or pass another output_dir."
        )


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
