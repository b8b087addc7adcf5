"""Types that the modules of scoring exchange: prompts, completions, rows of token ids, and reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and completion as token ids of one model. `truncated`: the prompt lost tokens on its left."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    truncated: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt_ids + self.completion_ids

    @property
    def completion_inputs(self) -> tuple[int, ...]:
        """The completion tokens that a model has to read: the last is predicted but predicts nothing."""
        return self.completion_ids[:-1]

    @property
    def inputs(self) -> tuple[int, ...]:
        """All that a model has to read."""
        return self.prompt_ids + self.completion_inputs

    @property
    def predicting(self) -> slice:
        """The positions whose output predicts the completion tokens, in their order."""
        first = len(self.prompt_ids) - 1
        return slice(first, first + len(self.completion_ids))


class Unscorable(Exception):
    """Why a row has no score. Raised where that is found; `scorer` keeps it in the row's place, as data."""


@dataclass(frozen=True, slots=True)
class Completion:
    """
    What the policy wrote, before it is tokenized.

    Attributes:
        text (`str`): The completion's text, without an end token.
        finished (`bool` or `None`): True if the policy ended its turn, False if it was cut off, `None` if that is not
            known.
        ids (`tuple[int, ...]` or `None`): Its token ids, if they are proven to be the pair's. They are scored as they
            are.
        is_generated (`bool`): A model wrote it right after the generation prompt. Otherwise it is an answer of a data
            set, and the chat template decides on the text before it.
    """

    text: str
    finished: bool | None
    ids: tuple[int, ...] | None = None
    is_generated: bool = False


def shorten(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
