"""Which two of M models make the best pair? Each is run once; all M (M - 1) ordered pairs are differences of columns.

`tables` has what the models gave, `accuracy` counts, `rank_report` shows. The paper (arXiv 2411.02481) finds a pair to
be the better, the further apart its models are in what they can do: the gap.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from ..conditioning.router import LIKELIHOOD
from ..config import CDRConfig, shareable_options
from ..errors import ConfigError, InputError
from .accuracy import Values, average, credits
from .evaluate import labelled
from .evaluate_files import PreferenceArguments, count_bad
from .intervals import spearman
from .passes import Entry, Model, Passes, find_models
from .preferences import Preference
from .rank_report import draw_ranking, print_ranking, write_markdown
from .score_folder import write_json
from .tables import read_tables

OWN = "own accuracy"
"""The performance of models of which none is given: how well each one's log-probability labels by itself."""


@dataclass
class RankOptions(CDRConfig):
    """
    [`CDRConfig`] without what belongs to one model: all models are read alike.

    Raises:
        ConfigError: as [`CDRConfig`].
    """

    cdr_strong: str = field(init=False, default="(each of the models)")
    cdr_weak: str = field(init=False, default="(each of the models)")
    cdr_strong_revision: str | None = field(init=False, default=None)
    cdr_weak_revision: str | None = field(init=False, default=None)
    cdr_strong_adapter: str | None = field(init=False, default=None)
    cdr_weak_adapter: str | None = field(init=False, default=None)
    cdr_strong_adapter_revision: str | None = field(init=False, default=None)
    cdr_weak_adapter_revision: str | None = field(init=False, default=None)
    cdr_share_policy: bool = field(init=False, default=False)

    def of(self, model: str) -> CDRConfig:
        """
        The config of a model, in both places.

        Args:
            model (`str`): A name or a path; `NAME@REVISION` where there is no such folder.
        """
        name, revision = model, None
        if "@" in model and not Path(model).expanduser().exists():
            name, _, revision = model.rpartition("@")
        options = {each.name: getattr(self, each.name) for each in fields(CDRConfig)}
        both = {
            f"cdr_{role}{part}": value
            for role in ("strong", "weak")
            for part, value in (("", name), ("_revision", revision))
        }
        return CDRConfig(**{**options, **both})


@dataclass
class RankArguments(PreferenceArguments):
    """
    Which models are ranked, on what, and where the result goes.

    Raises:
        ConfigError: a value is out of range.
    """

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Names or paths, two or more (required). NAME@REVISION names a revision on the Hub."},
    )
    performance: str | None = field(
        default=None,
        metadata={
            "help": "What each model can do, for the gap of a pair: a JSON object of numbers by model, or a .csv file "
            "with the columns model and performance. Default: how well its own log-probability labels the data."
        },
    )
    output_dir: str = field(
        default="./trl-cdr-rank-pairs",
        metadata={"help": "Folder for rank_pairs.json, rank_pairs.md and rank_pairs.png, which are replaced."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.models, str):
            self.models = [self.models]
        if len(self.models) < 2:
            raise ConfigError(f"models names {len(self.models)}. Name two or more.")


def rank_files(arguments: RankArguments, options: RankOptions) -> dict[str, Any]:
    """
    Rank the pairs of models on files or data sets; print a table, and write `rank_pairs.json`, `.md` and `.png`.

    Args:
        arguments (`RankArguments`): Models, input and output.
        options (`RankOptions`): What all models share.

    Returns:
        `dict`: see `rank_pairs`.

    Raises:
        InputError, ConfigError, ModelError: see `rank_pairs`.
    """
    preferences, bad = arguments.read(options)
    performance = None if arguments.performance is None else read_performance(arguments.performance, arguments.models)
    found = rank_pairs(arguments.models, preferences, options, performance=performance, passes=arguments.open_passes())
    found["bad_rows"] = count_bad(bad)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "rank_pairs.json", {**found, "options": shareable_options({**vars(arguments), **vars(options)})}
    )
    (folder / "rank_pairs.md").write_text(write_markdown(found), encoding="utf-8")
    draw_ranking(found).savefig(folder / "rank_pairs.png")
    print_ranking(found, folder)
    return found


def rank_pairs(
    models: Sequence[str],
    preferences: Sequence[Preference],
    options: RankOptions | None = None,
    *,
    performance: Mapping[str, float] | None = None,
    passes: Passes | None = None,
) -> dict[str, Any]:
    """
    Rank every ordered pair of models by its accuracy.

    Args:
        models (`Sequence[str]`): Two or more, see `RankOptions.of`.
        preferences (`Sequence[Preference]`): See `read_preferences`; labelled.
        options (`RankOptions`, *optional*): Criteria, reduction, device and so on, of all models.
        performance (`Mapping[str, float]`, *optional*): What each model can do; by default its own accuracy.
        passes (`Passes`, *optional*): Where tables are kept.

    Returns:
        `dict`: what `Tables.describe` says; `passes` (`run`, `found`); `performance` (what it is); `models` (by name
        `weights`, `performance`, and `own`, the accuracy of its log-probability alone); `ranking`, the pairs, the best
        first: `strong`, `weak`, `gap` (of performance), `accuracy` (mean of domains, `[mean, low, high]`), `domains`;
        `best` (by domain the place in the ranking); `spearman` of gap and accuracy over the pairs whose gap is positive
        (the others are these turned round, and would only repeat it), `None` where one of the two does not vary.

    Raises:
        ConfigError: fewer than two models, two with the same weights, or a router that is each pair's own.
        InputError: no pair of completions is labelled, or a model has no performance.
        ModelError: see `load_pair`.
    """
    options = options or RankOptions()
    if options.cdr_router == LIKELIHOOD:
        raise ConfigError(
            "cdr_router is 'likelihood', by which every strong model would find domains of its own. Use column:NAME."
        )
    passes = passes or Passes()
    found = find_models([(options.of(model), "strong") for model in models])
    _check_distinct(models, found)
    tables = read_tables(found[0].config, found, preferences, passes)
    choices, counted = labelled(tables)
    if not counted:
        raise InputError("no pair is labelled: rows hold completions. Give them chosen and rejected.")
    reading = tables.readings[-1]
    values = [_values(tables.columns[reading, model.key], options.cdr_reduction) for model in found]
    own = average(np.stack([credits(each, choices) for each in values]), counted, seed=options.cdr_seed)
    can = _performance(models, [each["mean"][0] for each in own], performance)
    places = list(permutations(range(len(models)), 2))
    columns = np.stack([credits(values[strong] - values[weak], choices) for strong, weak in places])
    ranking = [
        {
            "strong": models[strong],
            "weak": models[weak],
            "gap": can[strong] - can[weak],
            "accuracy": each["mean"],
            "domains": each["domains"],
        }
        for (strong, weak), each in zip(places, average(columns, counted, seed=options.cdr_seed), strict=True)
    ]
    ranking.sort(key=lambda pair: -pair["accuracy"][0])
    upward = [pair for pair in ranking if pair["gap"] > 0]
    return {
        **tables.describe(),
        "passes": {"run": passes.run, "found": passes.found},
        "performance": OWN if performance is None else "as given",
        "models": {
            name: {"weights": model.identity["weights"], "performance": score, "own": each["mean"]}
            for name, model, score, each in zip(models, found, can, own, strict=True)
        },
        "ranking": ranking,
        "best": {
            domain: max(range(len(ranking)), key=lambda place: ranking[place]["domains"][domain][0])
            for domain in ranking[0]["domains"]
        },
        "spearman": spearman([pair["gap"] for pair in upward], [pair["accuracy"][0] for pair in upward]),
    }


def read_performance(path: str, models: Sequence[str]) -> dict[str, float]:
    """
    What each model can do.

    Args:
        path (`str`): A JSON object of numbers by model, or CSV with the columns `model` and `performance`. A model is
            named as in `models`, or by the last part of that.
        models (`Sequence[str]`): Those that need one.

    Raises:
        InputError: the file can't be read, or lacks a model.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".csv":
            given = {row["model"]: float(row["performance"]) for row in csv.DictReader(text.splitlines())}
        else:
            given = {str(name): float(value) for name, value in json.loads(text).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"performance is {path!r}, which can't be read ({type(error).__name__}: {error}). Give a JSON object of "
            "numbers by model, or a .csv file with the columns model and performance."
        ) from None
    found = {}
    for model in models:
        name = model if model in given else model.rstrip("/").rpartition("/")[2]
        if name not in given:
            raise InputError(f"performance is {path!r}, which lacks {model!r}. Add it.")
        found[model] = given[name]
    return found


def _performance(models: Sequence[str], own: Sequence[float], given: Mapping[str, float] | None) -> list[float]:
    if given is None:
        return list(own)
    missing = [model for model in models if model not in given]
    if missing:
        raise InputError(f"performance lacks {missing[0]!r}. Add it.")
    return [given[model] for model in models]


def _values(entries: Sequence[Entry], reduction: str) -> Values:
    """Of a model's entries the log-probabilities, nats (nats per token for `"mean"`)."""
    sums = np.array([entry.logps for entry in entries], dtype=float)
    return sums if reduction == "sum" else sums / np.array([entry.n_tokens for entry in entries])


def _check_distinct(names: Sequence[str], models: Sequence[Model]) -> None:
    if len(models) < 2:
        raise ConfigError(f"models names {len(models)}. Name two or more.")
    first: dict[str, str] = {}
    for name, model in zip(names, models, strict=True):
        if model.key in first:
            raise ConfigError(
                f"models has {first[model.key]!r} and {name!r}, which are the same weights. Leave one of them out."
            )
        first[model.key] = name
