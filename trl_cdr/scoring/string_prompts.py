"""Prompts that are strings: a user's turn or raw text. One rule for all commands and trainers. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .types import Message, Prompt

MEANINGS = {"user": "a user's turn", "text": "raw text, without a chat template"}


def string_meaning(option: str, *, has_template: bool, in_trainer: bool = False) -> Literal["user", "text"]:
    """
    Return how a prompt that is a string is read.

    Args:
        option (`str`): `cdr_string_prompts`.
        has_template (`bool`): The models have a chat template.
        in_trainer (`bool`, *optional*, defaults to `False`): A trainer asks, whose policy reads strings as they are.
    """
    if option == "user" or option == "text":
        return option  # type: ignore[return-value]
    return "user" if has_template and not in_trainer else "text"


def read_strings(
    prompts: Sequence[Prompt], meaning: str, completions: Sequence[str | Sequence[Message]] | None = None
) -> list[Prompt]:
    """
    Return prompts with strings read as a user's turn or as raw text.

    Args:
        prompts (`Sequence`): Strings or conversations, which stay as they are.
        meaning (`str`): Of the strings, see `string_meaning`.
        completions (`Sequence`, *optional*): Their completions. A string whose completion is a message is a turn.
    """
    answers = [""] * len(prompts) if completions is None else completions
    return [
        as_turn(prompt) if isinstance(prompt, str) and (meaning == "user" or not isinstance(answer, str)) else prompt
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def as_turn(text: str) -> Prompt:
    """A string as a conversation."""
    return [{"role": "user", "content": text}]


def count_strings(given: Sequence[Any], read: Sequence[Any]) -> dict[str, float]:
    """Count the prompts that are strings, by how they were read: `"user"` or `"text"`."""
    counts: dict[str, float] = {}
    for before, after in zip(given, read, strict=True):
        if isinstance(before, str):
            meaning = "text" if isinstance(after, str) else "user"
            counts[meaning] = counts.get(meaning, 0) + 1
    return counts


def describe_strings(counts: Mapping[str, float]) -> list[str]:
    """Describe the result of `count_strings` in lines for people."""
    return [f"{int(count)} string prompts were read as {MEANINGS[meaning]}" for meaning, count in counts.items()]
