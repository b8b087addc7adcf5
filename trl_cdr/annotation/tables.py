"""Preferences and models -> what each model gives for each completion, with criteria and without.

`preferences` reads the rows and `passes` runs the models; `evaluate` and `rank_pairs` read the columns that come out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import CDRConfig
from ..errors import ConfigError, InputError
from ..scoring.scorer import DensityRatioScorer
from ..scoring.string_prompts import count_strings, read_strings, string_meaning
from ..scoring.types import Prompt, Unscorable
from .accuracy import strata
from .bouts import request_key
from .passes import Entry, Model, Passes, Text
from .preferences import Preference

PLAIN, CRITERIA = "plain", "criteria"
"""Readings: prompts as they are, and behind the criteria of their domains."""


@dataclass(frozen=True)
class Tables:
    """
    What models gave for preferences.

    Attributes:
        preferences (`list[Preference]`): Those of which every model can score every completion, in every reading.
        columns (`Mapping`): By reading and model's key, an entry for each of their completions, one after the other.
        unscorable (`Counter[str]`): Why the others are left out.
        string_prompts (`dict`): How prompts that are strings were read, see `count_strings`.
    """

    preferences: list[Preference]
    columns: Mapping[tuple[str, str], list[Entry]]
    unscorable: Counter[str]
    string_prompts: dict[str, float]

    @property
    def readings(self) -> list[str]:
        """`"plain"`, and `"criteria"` where there are any."""
        return list(dict.fromkeys(reading for reading, _ in self.columns))

    @property
    def texts(self) -> list[str]:
        """The completions."""
        return [text for one in self.preferences for text in one.completions]

    def describe(self) -> dict[str, Any]:
        """
        What there is: `pairs` (that are labelled), `unlabelled`, `unscorable` (reason -> pairs), `truncated` (prompts
        that a model could not read to their start, counted by completion, model and reading) and `subsets` (by name
        `domain`, `pairs`, `prompts`).
        """
        labelled = [one for one in self.preferences if one.is_labelled]
        return {
            "pairs": len(labelled),
            "unlabelled": len(self.preferences) - len(labelled),
            "unscorable": dict(self.unscorable),
            "string_prompts": self.string_prompts,
            "truncated": sum(entry.truncated for column in self.columns.values() for entry in column),
            "subsets": {
                stratum.name: {
                    "domain": stratum.domain,
                    "pairs": len(stratum.places),
                    "prompts": len({request_key(labelled[place].prompt) for place in stratum.places}),
                }
                for stratum in strata(labelled)
            },
        }


def read_tables(
    config: CDRConfig, models: Sequence[Model], preferences: Sequence[Preference], passes: Passes
) -> Tables:
    """
    Run what has not been run.

    Args:
        config (`CDRConfig`): Its criteria are shown to all models.
        models (`Sequence[Model]`): Each is run once, however often it is named.
        preferences (`Sequence[Preference]`): Their completions are run.
        passes (`Passes`): Where tables are kept.

    Raises:
        InputError: nothing can be scored, or nothing says what the domains are.
        ConfigError, ModelError: see `Passes.read`.
    """
    has_template = any(model.template is not None for model in models)
    meaning = string_meaning(config.cdr_string_prompts, has_template=has_template)
    prompts = [one.prompt for one in preferences]
    shown = read_strings(prompts, meaning)
    read = _read_prompts(config, preferences, shown)
    texts = [text for column in read.values() for each in column if not isinstance(each, str) for text in each]
    keys = [text.key for text in texts]
    given: dict[str, dict[str, Entry]] = {}
    for model in models:
        if model.key not in given:
            given[model.key] = dict(zip(keys, passes.read(model, texts), strict=True))
    usable: list[int] = []
    unscorable: Counter[str] = Counter()
    for place in range(len(preferences)):
        reason = _why_not([column[place] for column in read.values()], list(given.values()))
        if reason is None:
            usable.append(place)
        else:
            unscorable[reason] += 1
    if not usable:
        raise InputError(
            f"no pair of completions can be scored: {'; '.join(unscorable) or 'there is none'}. Mend the data, or use "
            "other models."
        )
    return Tables(
        [preferences[place] for place in usable],
        {
            (reading, key): [entries[text.key] for place in usable for text in column[place] if isinstance(text, Text)]
            for reading, column in read.items()
            for key, entries in given.items()
        },
        unscorable,
        count_strings(prompts, shown),
    )


def _read_prompts(
    config: CDRConfig, preferences: Sequence[Preference], prompts: Sequence[Prompt]
) -> dict[str, list[list[Text] | str]]:
    """By reading the texts of each preference, or why there are none."""
    plain: list[list[Text] | str] = [
        [Text(prompt, text) for text in one.completions] for one, prompt in zip(preferences, prompts, strict=True)
    ]
    scorer = DensityRatioScorer.from_config(config)
    if scorer.criteria is None or scorer.router is None:
        return {PLAIN: plain}
    is_told = scorer.router.column is not None or scorer.router.is_undecided
    domains = [one.criteria_domain for one in preferences] if is_told else None
    conditioned, conditionings = scorer.condition(prompts, domains)
    scorer.unload()  # of a router that ran a model
    shown = [
        str(prompt) if isinstance(prompt, Unscorable) else [Text(prompt, text, by) for text in one.completions]
        for one, prompt, by in zip(preferences, conditioned, conditionings, strict=True)
    ]
    return {PLAIN: plain, CRITERIA: shown}


def _why_not(readings: Sequence[list[Text] | str], given: Sequence[Mapping[str, Entry]]) -> str | None:
    """Why a preference can't be scored, if it can't."""
    for texts in readings:
        if isinstance(texts, str):
            return texts
        for entries in given:
            for text in texts:
                if entries[text.key].error is not None:
                    return entries[text.key].error
    return None


def refuse_what_needs_a_trainer(config: CDRConfig) -> None:
    """
    Raises:
        ConfigError: an option asks for the policy.
    """
    if config.cdr_share_policy:
        raise ConfigError("cdr_share_policy is set, and no policy is trained here. Leave it out.")
