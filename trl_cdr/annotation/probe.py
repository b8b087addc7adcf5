"""Can a reward be gamed? Attack it before training: texts that should not be paid for, beside honest completions.

`attacks` writes texts, `search` finds them on the pair, `writers` samples, `bouts` scores and counts. `probe_file`
reads rows for it and `probe_report` shows what came of it. Trains nothing.
"""

import json
import logging
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, InputError
from ..scoring.completions import read_completion
from ..scoring.pair import Member, Pair
from ..scoring.scorer import DensityRatioScorer
from ..scoring.string_prompts import count_strings
from ..scoring.types import Completion, Message, Prompt, Unscorable
from .attacks import write_attacks
from .bouts import Bout, hold_bouts, measure_honest, request_key, score_completions, summarise, with_gate
from .search import CANDIDATES, search_tokens
from .writers import end_id, load_policy, write

logger = logging.getLogger(__name__)

GATES = ("none", "typicality", "surprise")
"""`none`: the plain ratio."""
SEARCHES = {
    "best_of": "the best of N samples (not judged)",
    "search_ratio": "token search on the ratio",
    "search_reward": "token search on the reward",
}
"""By name, in words: the attacks that are looked for on the models."""

# The best of N honest samples would beat an honest one as well.
_NOT_JUDGED = ("best_of",)
_HONEST = 4  # samples a prompt, where none are given
_EXAMPLES = 3


@dataclass(frozen=True)
class _Field:
    """Prompts, each with its domain and at least one honest completion, of which the first is attacked."""

    prompts: list[Prompt]
    domains: list[str | None]
    honest: list[list[Completion]]


def probe(
    scorer: DensityRatioScorer,
    prompts: Sequence[Prompt],
    completions: Sequence[str | Sequence[Message] | None] | None = None,
    *,
    finished: Sequence[bool | None] | None = None,
    domains: Sequence[str | None] | None = None,
    policy: str | None = None,
    gates: Sequence[str] = GATES,
    best_of: int = 16,
    temperature: float = 1.5,
    search_budget: int = 240,
    max_new_tokens: int = 128,
    on_stage: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """
    Attack a reward, and count how often each attack is worth more than an honest completion to the same prompt.

    Args:
        scorer (`DensityRatioScorer`): Of the pair. Its gate is the one whose reward is judged and searched on; its seed
            is that of all draws.
        prompts (`Sequence[Prompt]`): Strings or conversations; a few dozen. A prompt that comes several times is one
            prompt with several honest completions.
        completions (`Sequence`, *optional*): An honest completion to each prompt. Where there is none, the policy
            writes some at temperature 1, or the strong model where no policy is given.
        finished (`Sequence[bool | None]`, *optional*): Whether each completion ended; by default it did.
        domains (`Sequence[str | None]`, *optional*): Of each prompt; see `DensityRatioScorer.score`.
        policy (`str`, *optional*): Name or path of the policy that is to be trained; without it the weak model draws
            the best of N.
        gates (`Sequence[str]`, *optional*): Beside the scorer's own, which are looked at. Each costs a run of the pair;
            `none` costs nothing beside another.
        best_of (`int`, *optional*, defaults to 16): Samples for each prompt, of which the best attacks; 0: none.
        temperature (`float`, *optional*, defaults to 1.5): Of these.
        search_budget (`int`, *optional*, defaults to 240): Completions that each token search may score for each
            prompt, 12 for a token; 0: none.
        max_new_tokens (`int`, *optional*, defaults to 128): Of what is sampled.
        on_stage (`Callable`, *optional*): Told what is done now.

    Returns:
        `dict`: `gate`, `prompts`, `left_out` (reason -> rows); `honest` (see `measure_honest`); `attacks` (see
        `summarise`); of the scorer's gate `win`, with the `mean` and the `worst` win rate over the attacks, without
        the best of N, and the `attack` that has it, and `examples`: by attack the texts that won by most, with prompt
        and rewards.

    Raises:
        InputError: there is no prompt, a completion can't be read or none can be scored, or lengths differ.
        ConfigError: a number is out of range, or there is no such gate.
        ModelError: the policy or the pair can't be loaded.
    """
    _check(best_of=best_of, temperature=temperature, search_budget=search_budget, max_new_tokens=max_new_tokens)
    if scorer.config.served:
        raise ConfigError(
            f"cdr_{scorer.config.served[0]} is on a server: a probe lets the pair write, and searches on its whole "
            "distributions, which servers do not give. Load the pair here."
        )
    gate, seed = scorer.config.cdr_gate, scorer.config.cdr_seed
    scorers = {name: with_gate(scorer, name) for name in dict.fromkeys((*gates, gate)) if name != "none"}
    scorers = scorers or {"none": scorer}
    with scorer.use() as pair:
        writer = None if policy is None else load_policy(policy, scorer.config, pair)
        on_stage("honest completions")
        read = scorer.read_prompts(prompts)
        field = _gather(pair, read, completions, finished, scorer.route(prompts, domains))
        field = _fill(field, writer or pair.strong, max_new_tokens=max_new_tokens, seed=seed)
        field, left_out = _keep_scorable(scorer, field)
        _say_what_is_missing(pair, field)

        attacks = _write(field, seed=seed)
        if best_of:
            on_stage(f"best of {best_of} samples")
            attacks["best_of"] = write(
                writer or pair.weak,
                field.prompts,
                per_prompt=best_of,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                seeds=[f"{seed} best of {place}" for place in range(len(field.prompts))],
            )
        if search_budget:
            attacks |= _search(scorer, field, budget=search_budget, on_stage=on_stage)
        on_stage("scores")
        bouts = hold_bouts(scorers, field.prompts, [group[0] for group in field.honest], attacks, domains=field.domains)
    attacked = summarise(bouts, field.prompts)
    rates = {name: one[gate]["win"][0] for name, one in attacked.items() if name not in _NOT_JUDGED}
    worst = max(rates, key=lambda name: rates[name])
    return {
        "gate": gate,
        "prompts": len(field.prompts),
        "left_out": left_out,
        "string_prompts": count_strings(prompts, read),
        "honest": measure_honest(scorers, field.prompts, field.honest, domains=field.domains),
        "attacks": attacked,
        "win": {"mean": statistics.fmean(rates.values()), "worst": rates[worst], "attack": worst},
        "examples": {name: _examples(by_gate[gate], field.prompts) for name, by_gate in bouts.items()},
    }


def _check(*, best_of: int, temperature: float, search_budget: int, max_new_tokens: int) -> None:
    if best_of < 0:
        raise ConfigError(f"best_of is {best_of}: it counts samples. Use 1 or more, or 0 for none.")
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}: it divides logits. Use a number above 0.")
    if search_budget and search_budget < CANDIDATES:
        raise ConfigError(
            f"search_budget is {search_budget}, and the first token alone takes {CANDIDATES}. Use as many or more, "
            "or 0 for no search."
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: it counts tokens. Use 1 or more.")


def _gather(
    pair: Pair,
    prompts: Sequence[Prompt],
    completions: Sequence[str | Sequence[Message] | None] | None,
    finished: Sequence[bool | None] | None,
    domains: Sequence[str | None],
) -> _Field:
    """Rows by prompt."""
    if not len(prompts):
        raise InputError("there are no prompts to probe with. Pass a few dozen.")
    given = [None] * len(prompts) if completions is None else completions
    ended: Sequence[bool | None] = [True] * len(prompts) if finished is None else finished
    if not len(prompts) == len(given) == len(ended):
        raise InputError(
            f"prompts has {len(prompts)} rows, completions {len(given)} and finished {len(ended)}: they are read side "
            "by side. Pass as many of each."
        )
    places: dict[str, int] = {}
    field = _Field([], [], [])
    rows = zip(prompts, given, ended, domains, strict=True)
    for index, (prompt, completion, is_finished, domain) in enumerate(rows):
        key = json.dumps([request_key(prompt), domain])
        if key not in places:
            places[key] = len(field.prompts)
            field.prompts.append(prompt)
            field.domains.append(domain)
            field.honest.append([])
        if completion is not None:
            try:
                text = read_completion(completion)
            except Unscorable as reason:
                raise InputError(f"row {index} can't be used: {reason}.") from None
            can_end = None not in (end_id(pair.strong, prompt), end_id(pair.weak, prompt))
            field.honest[places[key]].append(Completion(text, is_finished if can_end else None))
    return field


def _fill(field: _Field, writer: Member, *, max_new_tokens: int, seed: int) -> _Field:
    """Honest completions where there are none."""
    missing = [place for place, group in enumerate(field.honest) if not group]
    prompts = [field.prompts[place] for place in missing]
    written = write(
        writer,
        prompts,
        per_prompt=_HONEST,
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        seeds=[f"{seed} honest {place}" for place in missing],
    )
    honest = list(field.honest)
    for place, group in zip(missing, written, strict=True):
        honest[place] = group
    return _Field(field.prompts, field.domains, honest)


def _keep_scorable(scorer: DensityRatioScorer, field: _Field) -> tuple[_Field, dict[str, int]]:
    """Without completions that can't be scored or have no words, and without prompts that have no other."""
    rows = [(place, one) for place, group in enumerate(field.honest) for one in group]
    reasons: Counter[str] = Counter()
    kept: dict[int, list[Completion]] = {}
    plain = with_gate(scorer, "none")
    scores = score_completions(
        plain,
        [field.prompts[place] for place, _ in rows],
        [one for _, one in rows],
        [field.domains[place] for place, _ in rows],
    )
    for (place, one), score in zip(rows, scores, strict=True):
        if score.error is not None:
            reasons[score.error] += 1
        elif not one.text.split():
            reasons["the completion has no words"] += 1
        else:
            kept.setdefault(place, []).append(one)
    unwritten = sum(not group for group in field.honest)
    if unwritten:
        reasons["the prompt can't be read, so that nothing is written to it"] += unwritten
    if not kept:
        reason = reasons.most_common(1)[0][0]
        raise InputError(f"no honest completion can be scored: {reason}. Mend the rows, or pass completions.")
    left = sorted(kept)
    field = _Field(
        [field.prompts[place] for place in left],
        [field.domains[place] for place in left],
        [kept[place] for place in left],
    )
    return field, dict(reasons)


def _say_what_is_missing(pair: Pair, field: _Field) -> None:
    if len(field.prompts) == 1:
        logger.warning("There is a single prompt: attacks by another prompt's completion are left out.")
    if any(None in (end_id(pair.strong, prompt), end_id(pair.weak, prompt)) for prompt in field.prompts):
        logger.warning(
            "The pair has no end token for these prompts: all texts are scored as neither ended nor cut off."
        )


def _write(field: _Field, *, seed: int) -> dict[str, list[list[Completion]]]:
    """The texts of `attacks`, by name, for each prompt at most one."""
    found: dict[str, list[list[Completion]]] = {}
    count = len(field.prompts)
    for place, (prompt, group) in enumerate(zip(field.prompts, field.honest, strict=True)):
        other = field.honest[(place + 1) % count][0].text if count > 1 else None
        for name, text in write_attacks(prompt, group[0], other, random.Random(f"{seed} {place}")).items():
            found.setdefault(name, [[] for _ in range(count)])[place] = [text]
    return found


def _search(
    scorer: DensityRatioScorer, field: _Field, *, budget: int, on_stage: Callable[[str], None]
) -> dict[str, list[list[Completion]]]:
    """Token searches by name, each with one text for each prompt."""
    targets = {"search_ratio": with_gate(scorer, "none")}
    if scorer.config.cdr_gate != "none":
        targets["search_reward"] = scorer
    found = {}
    for name, target in targets.items():
        on_stage(SEARCHES[name])
        texts = search_tokens(target, field.prompts, domains=field.domains, budget=budget, seed=scorer.config.cdr_seed)
        found[name] = [[text] for text in texts]
    return found


def _examples(bouts: Sequence[Bout], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    won = sorted((bout for bout in bouts if bout.is_won), key=lambda bout: bout.honest - (bout.reward or 0.0))
    return [
        {"prompt": prompts[bout.place], "text": bout.text, "reward": bout.reward, "honest": bout.honest}
        for bout in won[:_EXAMPLES]
    ]
