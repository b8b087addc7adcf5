"""A prompt with its completions, scored -> rows of a preference data set. Pure: runs no model and writes nothing."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from ..scoring.columns import is_finished_or_not
from ..scoring.completions import read_completion
from ..scoring.encoding import read_text
from ..scoring.score import Score
from ..scoring.selection import Pair, select_all_pairs, select_pair
from ..scoring.string_prompts import as_turn
from ..scoring.types import Completion, Message, Prompt, Unscorable, shorten
from .shards import Labelled, add_counts

Strategy = Literal["best_worst", "best_random", "all_pairs"]

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_FIELDS = [
    *((name, pa.float64()) for name in ("score_chosen", "score_rejected", "margin")),  # nats
    *((name, pa.int32()) for name in ("chosen_index", "rejected_index")),  # into the lists that follow
    *((name, pa.list_(pa.float64())) for name in ("scores", "rewards")),  # of all completions, nats; null: no score
    *((name, pa.list_(pa.bool_())) for name in ("gated", "finished")),
    ("n_tokens", pa.list_(pa.int32())),
    ("domain", pa.string()),
    ("row", pa.int64()),  # of the input
]
SCHEMA = pa.schema([*((name, _MESSAGES) for name in ("prompt", "chosen", "rejected")), *_FIELDS])
"""What is written: TRL's conversational preference format, and what stands behind the choice."""
TEXT_SCHEMA = pa.schema([*((name, pa.string()) for name in ("prompt", "chosen", "rejected")), *_FIELDS])
"""The same in TRL's standard format, for prompts that are raw text."""

_NO_DRAW = random.Random(0)  # `best_worst` draws nothing


def check_group(fields: Mapping[str, Any], *, can_write: bool, is_text: bool = False) -> str | None:
    """
    What is wrong with a row of the input, or None; see `read_group`.

    Args:
        fields (`Mapping`): What the row holds.
        can_write (`bool`): There is a policy for rows without completions.
        is_text (`bool`, *optional*, defaults to `False`): Prompts are raw text.
    """
    try:
        _, completions = read_group(fields, is_text=is_text)
    except Unscorable as reason:
        return f"{reason}."
    if completions is None:
        return None if can_write else "has no completions, and nothing writes them. Add completions, or pass policy."
    if len(completions) < 2:
        return f"has {len(completions)} of the two completions that a pair needs. Add one, or leave completions out."
    if len({one.text for one in completions}) == 1:
        return f"has {len(completions)} completions that are all equal: there is nothing to choose. Leave it out."
    return None


def read_group(fields: Mapping[str, Any], *, is_text: bool = False) -> tuple[Prompt, list[Completion] | None]:
    """
    Return a row's prompt and its completions; None if it has no completions. A string is one user turn, or with
    `is_text` stays raw text.

    Raises:
        Unscorable: what is wrong with them.
    """
    prompt, completions = fields.get("prompt"), fields.get("completions")
    if not prompt:
        raise Unscorable("has no prompt. Add one: messages, or a string")
    if is_text and not isinstance(prompt, str):
        raise Unscorable("has messages as its prompt, and prompts are read as raw text (cdr_string_prompts)")
    turns = as_turn(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not all(isinstance(message, dict) for message in turns):
        raise Unscorable(f"has the prompt {shorten(prompt)}. Use messages, or a string")
    try:
        messages: Prompt = prompt if is_text else [_read_message(message) for message in turns]
        if completions is None:
            return messages, None
        if not isinstance(completions, list):
            raise Unscorable(f"completions are {shorten(completions)}, which is no list")
        texts = [read_completion(one) for one in completions]
    except Unscorable as reason:
        raise Unscorable(f"can't be used: {reason}") from None
    finished = fields.get("finished")
    if finished is None:
        finished = [True] * len(texts)
    elif not isinstance(finished, list) or len(finished) != len(texts) or not all(map(is_finished_or_not, finished)):
        raise Unscorable(f"has finished: {shorten(finished)}. Give true, false or null for each of its completions")
    return messages, [Completion(text, said) for text, said in zip(texts, finished, strict=True)]


def label_group(
    labelled: Labelled,
    *,
    index: int,
    prompt: Prompt,
    completions: Sequence[Completion],
    scores: Sequence[Score],
    rewards: Sequence[float | None],
    strategy: Strategy,
    min_margin: float,
    seed: int,
) -> None:
    """
    Choose a group's pairs, and put them and what is counted of the group into `labelled`.

    Args:
        labelled (`Labelled`): Gets the rows.
        index (`int`): The row of the input.
        prompt (`Prompt`): The conversation, or raw text.
        completions (`Sequence[Completion]`): At least two. One that was cut off is in no pair: whoever trains on it
            would learn to end there.
        scores, rewards (`Sequence`): Of each completion; the rewards are the scores behind the gate.
        strategy (`Strategy`): Which pairs.
        min_margin (`float`): Pairs of a smaller margin are left out, nats.
        seed (`int`): What `best_random` draws from, with the index.
    """
    pairs = _select(completions, rewards, strategy, min_margin, seed=f"{seed} {index}")
    domain = scores[0].domain
    tokens = [score.n_tokens for score in scores]
    gated = [score.gated for score in scores]
    shared = {
        "prompt": prompt,
        "scores": [score.value for score in scores],
        "rewards": rewards,
        "gated": gated,
        "finished": [one.finished for one in completions],
        "n_tokens": tokens,
        "domain": domain,
        "row": index,
    }
    counts: dict[str, float] = {
        "rows": 1,
        "completions": len(completions),
        "gated": sum(gated),
        "unscorable": sum(reward is None for reward in rewards),
        "reward": sum(reward for reward in rewards if reward is not None),
        "cut_off": sum(one.finished is False for one in completions),
    }
    for pair in pairs:
        if pair.skipped is not None:
            counts[pair.skipped] = counts.get(pair.skipped, 0) + 1
            continue
        labelled.rows.append(
            {
                **shared,
                "chosen": _answer(completions[pair.chosen], prompt),
                "rejected": _answer(completions[pair.rejected], prompt),
                "score_chosen": scores[pair.chosen].value,
                "score_rejected": scores[pair.rejected].value,
                "margin": pair.margin,
                "chosen_index": pair.chosen,
                "rejected_index": pair.rejected,
            }
        )
        chosen, rejected = tokens[pair.chosen], tokens[pair.rejected]
        longer = (chosen > rejected) + 0.5 * (chosen == rejected)
        more = {"pairs": 1, "margin": pair.margin, "chosen_tokens": chosen, "rejected_tokens": rejected}
        for name, value in {**more, "longer_chosen": longer}.items():
            counts[name] = counts.get(name, 0) + value
    add_counts(labelled.counts, {domain or "": counts})


def _select(
    completions: Sequence[Completion],
    rewards: Sequence[float | None],
    strategy: Strategy,
    min_margin: float,
    *,
    seed: str,
) -> list[Pair]:
    """The pairs of a group, of whose equal completions the first stands for all."""
    firsts: dict[tuple[str, bool], int] = {}
    for place, one in enumerate(completions):
        firsts.setdefault((one.text, one.finished is not False), place)
    places = list(firsts.values())
    if len(places) < 2:
        return [Pair(0, 1, 0.0, "tie")]
    values = [math.nan if (reward := rewards[place]) is None else reward for place in places]
    cut_off = {number for number, place in enumerate(places) if completions[place].finished is False}
    if strategy == "all_pairs":
        found = select_all_pairs(values, min_margin=min_margin, truncated=cut_off)
    else:
        rng = random.Random(seed) if strategy == "best_random" else _NO_DRAW
        found = [select_pair(values, strategy=strategy, rng=rng, min_margin=min_margin, truncated=cut_off)]
    return [Pair(places[pair.chosen], places[pair.rejected], pair.margin, pair.skipped) for pair in found]


def _read_message(message: Message) -> dict[str, str]:
    for name in message:
        if name not in ("role", "content") and message[name] is not None:
            raise Unscorable(f"a message has {name}, and only role and content are kept. Leave the row out")
    if not isinstance(message.get("role"), str):
        raise Unscorable(f"a message has the role {message.get('role')!r}")
    return {"role": message["role"], "content": read_text(message.get("content"), "a message's content")}


def _answer(completion: Completion, prompt: Prompt) -> str | list[dict[str, str]]:
    """The completion in the format of its prompt."""
    return completion.text if isinstance(prompt, str) else [{"role": "assistant", "content": completion.text}]
