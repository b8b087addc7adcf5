"""How well does a pair label? Its accuracy on preference sets, beside what it should be better than.

`tables` has what the models gave, `judges` makes values of it, `accuracy` counts, `labels` chooses among candidates.
`evaluate_files` reads and writes files for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..config import CDRConfig, with_date
from ..errors import InputError
from .accuracy import Choices, Values, average, credits, without_length
from .baseline import compare_rows
from .judges import NO_LENGTH, judge
from .labels import choose, suggest
from .passes import Passes, find_models, name_model
from .preferences import Preference
from .rewardbench import BENCHMARKS, TIES, ties_score
from .tables import CRITERIA, PLAIN, Tables, read_tables, refuse_what_needs_a_trainer

_CANDIDATES = ("sum", "mean", "reward")
"""Judges among which labels choose."""


@dataclass(frozen=True)
class Evaluation:
    """
    What came of an evaluation.

    Attributes:
        summary (`dict`): See `evaluate`.
        rows (`list[dict]`): Of each pair that is labelled `id`, `subset`, `domain`, `scores_chosen`, `scores_rejected`
            (lists where there are several) and `results`, what it earned. Scores are the log-ratio by `cdr_reduction`,
            with criteria where there are any.
        suggested (`list[dict]`): See `suggest`.
        compared (`list[dict]`): See `compare_rows`.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    suggested: list[dict[str, Any]]
    compared: list[dict[str, Any]]


def evaluate(
    config: CDRConfig,
    preferences: Sequence[Preference],
    *,
    passes: Passes | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    suggest_labels: int = 0,
    labels: Sequence[Mapping[str, Any]] = (),
    baseline: Mapping[str, Any] | None = None,
) -> Evaluation:
    """
    Evaluate a pair.

    Args:
        config (`CDRConfig`): The pair and its options. With criteria everything is counted with and without them.
        preferences (`Sequence[Preference]`): See `read_preferences`.
        passes (`Passes`, *optional*): Where tables are kept.
        pairs (`Sequence[tuple[str, str]]`, *optional*): Strong and weak of other pairs, candidates beside this one.
        suggest_labels (`int`, *optional*, defaults to 0): How many pairs to suggest to a person, see `suggest`.
        labels (`Sequence[Mapping]`, *optional*): What a person said, see `read_labels`, to choose a candidate by.
        baseline (`Mapping`, *optional*): What another judge earned, see `read_baseline`.

    Returns:
        `Evaluation`: its summary has what `Tables.describe` says, `models` (by name which weights), `passes` (`run` and
        `found`), `candidates` (by name `[mean, low, high]` of the labelled pairs), and where pairs are labelled
        `judges`, `main`, `lead` and `criteria_lead`, see `measure`; `labels` and `baseline` where they are given.

    Raises:
        InputError: nothing can be scored, no pair is labelled and nothing else is asked for, or no label or row of the
            baseline names a pair.
        ConfigError, ModelError: see `DensityRatioScorer`.
    """
    refuse_what_needs_a_trainer(config)
    config = with_date(config)  # one date for all pairs
    passes = passes or Passes()
    configs = [config, *(_other_pair(config, *pair) for pair in pairs)]
    # Pair by pair: a model without a template reads its own partner's.
    models = [model for each in configs for model in find_models([(each, "strong"), (each, "weak")])]
    tables = read_tables(config, models, preferences, passes)
    judged = {
        (reading, index): judge(
            tables.columns[reading, models[2 * index].key],
            tables.columns[reading, models[2 * index + 1].key],
            tables.texts,
            config,
        )
        for reading in tables.readings
        for index in range(len(configs))
    }
    margins = _margins(judged, tables.preferences, configs)
    summary: dict[str, Any] = {
        **tables.describe(),
        "models": {model.name: model.identity["weights"] for model in models},
        "passes": {"run": passes.run, "found": passes.found},
    }
    rows: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    if summary["pairs"]:
        values = {reading: judged[reading, 0] for reading in tables.readings}
        summary |= measure(values, tables, config)
        summary["candidates"] = _accuracies(judged, tables, configs)
        rows = _rows(values[tables.readings[-1]][config.cdr_reduction], tables)
        if baseline is not None:
            summary["baseline"], compared = compare_rows(rows, tables.preferences, baseline, seed=config.cdr_seed)
    elif not (suggest_labels or labels):
        raise InputError(
            "no pair is labelled: rows hold completions. Give them chosen and rejected, or suggest_labels."
        )
    two = [one for one in tables.preferences if len(one.completions) == 2]
    if labels:
        summary["labels"] = choose(margins, two, labels, seed=config.cdr_seed)
    suggested = suggest(margins, two, most=suggest_labels) if suggest_labels else []
    return Evaluation(summary, rows, suggested, compared)


def measure(values: Mapping[str, Mapping[str, Values]], tables: Tables, config: CDRConfig) -> dict[str, Any]:
    """
    Accuracies of judges.

    Args:
        values (`Mapping`): By reading and judge the values of the tables' completions.
        tables (`Tables`): Of the preferences.
        config (`CDRConfig`): Its reduction says which judge is the main one.

    Returns:
        `dict`: `judges`, by reading and judge what `average` returns, `calibrated` (the same mean of values from which
        length is taken out, see `without_length`; not of judges that it means nothing to) and `benchmarks` (by
        published set its score and sections); `main`, the reading and judge that the pair labels by; `lead`, by how
        much its mean is above that of each other judge of that reading; `criteria_lead`, above its own without
        criteria. Leads are `[mean, low, high]`.
    """
    choices, counted = labelled(tables)
    lengths = np.array([len(text) for text in tables.texts], dtype=float)
    columns: dict[tuple[str, str, str], Values] = {}
    for reading, by_judge in values.items():
        for name, each in by_judge.items():
            columns[reading, name, "mean"] = credits(each, choices)
            if name not in NO_LENGTH:
                columns[reading, name, "calibrated"] = credits(without_length(each, lengths), choices)
    main = list(values)[-1]
    ours = columns[main, config.cdr_reduction, "mean"]
    others = [name for name in values[main] if name != config.cdr_reduction]
    leads = {("lead", name, ""): ours - columns[main, name, "mean"] for name in others}
    if main == CRITERIA:
        leads["criteria", "", ""] = ours - columns[PLAIN, config.cdr_reduction, "mean"]
    every = columns | leads
    found = dict(zip(every, average(np.stack(list(every.values())), counted, seed=config.cdr_seed), strict=True))
    judges: dict[str, dict[str, Any]] = {}
    for reading, by_judge in values.items():
        judges[reading] = {}
        for name, each in by_judge.items():
            said = found[reading, name, "mean"]
            if (reading, name, "calibrated") in found:
                said["calibrated"] = found[reading, name, "calibrated"]["mean"]
            said["benchmarks"] = _benchmarks(each, columns[reading, name, "mean"], choices, counted)
            judges[reading][name] = said
    criteria_lead = found["criteria", "", ""]["mean"] if main == CRITERIA else None
    return {
        "judges": judges,
        "main": [main, config.cdr_reduction],
        "lead": {name: found["lead", name, ""]["mean"] for name in others},
        "criteria_lead": criteria_lead,
    }


def labelled(tables: Tables) -> tuple[Choices, list[Preference]]:
    """The preferences that say which is better."""
    choices = Choices.of(tables.preferences)
    places = [place for place, one in enumerate(tables.preferences) if one.is_labelled]
    return Choices(choices.index[places], choices.is_chosen[places]), [tables.preferences[place] for place in places]


def _benchmarks(
    values: Values, earned: Values, choices: Choices, preferences: Sequence[Preference]
) -> dict[str, dict[str, float]]:
    """By published set its score and sections."""
    found = {}
    for benchmark in BENCHMARKS:
        by_subset: dict[str, list[int]] = {}
        for place, one in enumerate(preferences):
            if one.benchmark == benchmark.name:
                by_subset.setdefault(one.subset, []).append(place)
        if by_subset:
            accuracies = {name: float(earned[places].mean()) for name, places in by_subset.items()}
            if TIES in by_subset and TIES in benchmark.subsets:
                accuracies[TIES] = _ties(values, choices, preferences, by_subset[TIES])
            found[benchmark.name] = benchmark.score(accuracies)
    return found


def _ties(values: Values, choices: Choices, preferences: Sequence[Preference], places: Sequence[int]) -> float:
    rows = []
    for place in places:
        one = preferences[place]
        each = values[choices.index[place, : len(one.completions)]].tolist()
        rows.append((one.id, each[: len(one.chosen)], each[len(one.chosen) :]))
    return ties_score(rows)


def _margins(
    judged: Mapping[tuple[str, int], Mapping[str, Values]],
    preferences: Sequence[Preference],
    configs: Sequence[CDRConfig],
) -> dict[str, Values]:
    """By candidate the value of the first completion less the second's, of the preferences that have two."""
    starts = np.cumsum([0, *(len(one.completions) for one in preferences)])[:-1]
    first = starts[[len(one.completions) == 2 for one in preferences]]
    return {name: values[first] - values[first + 1] for name, values in _candidates(judged, configs).items()}


def _accuracies(
    judged: Mapping[tuple[str, int], Mapping[str, Values]], tables: Tables, configs: Sequence[CDRConfig]
) -> dict[str, list[float]]:
    """By candidate its mean of domains, `[mean, low, high]`."""
    choices, counted = labelled(tables)
    candidates = _candidates(judged, configs)
    columns = np.stack([credits(values, choices) for values in candidates.values()])
    found = average(columns, counted, seed=configs[0].cdr_seed)
    return {name: each["mean"] for name, each in zip(candidates, found, strict=True)}


def _candidates(
    judged: Mapping[tuple[str, int], Mapping[str, Values]], configs: Sequence[CDRConfig]
) -> dict[str, Values]:
    """The values of each way to score: of each pair, with criteria or without, by sum, by mean, or behind the gate."""
    return {
        _name_candidate(name, reading, configs[index] if len(configs) > 1 else None): by_judge[name]
        for (reading, index), by_judge in judged.items()
        for name in _CANDIDATES
        if name in by_judge
    }


def _name_candidate(judge: str, reading: str, pair: CDRConfig | None) -> str:
    name = judge if reading == PLAIN else f"{judge} with criteria"
    return name if pair is None else f"{name_model(pair, 'strong')} over {name_model(pair, 'weak')}, {name}"


def _rows(values: Values, tables: Tables) -> list[dict[str, Any]]:
    choices, counted = labelled(tables)
    rows = []
    for one, earned, index in zip(counted, credits(values, choices), choices.index, strict=True):
        scores = values[index[: len(one.completions)]].tolist()
        sides = [scores[: len(one.chosen)], scores[len(one.chosen) :]]
        chosen, rejected = (side[0] if len(side) == 1 else side for side in sides)
        rows.append(
            {
                "id": one.id,
                "subset": one.subset,
                "domain": one.domain,
                "scores_chosen": chosen,
                "scores_rejected": rejected,
                "results": float(earned),
            }
        )
    return rows


def _other_pair(config: CDRConfig, strong: str, weak: str) -> CDRConfig:
    """The same options of another pair."""
    own = {
        f"cdr_{role}{part}" for role in ("strong", "weak") for part in ("_revision", "_adapter", "_adapter_revision")
    }
    others = {each.name: getattr(config, each.name) for each in fields(CDRConfig) if each.name not in own}
    return CDRConfig(**{**others, "cdr_strong": strong, "cdr_weak": weak})
