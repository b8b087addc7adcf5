"""Prompts that are strings: a user's turn or raw text. One rule for all commands and trainers. Pure."""

from typing import Literal

from .types import Prompt

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


def as_turn(text: str) -> Prompt:
    """A string as a conversation."""
    return [{"role": "user", "content": text}]
