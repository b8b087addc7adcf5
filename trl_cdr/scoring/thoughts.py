"""Thoughts of reasoning models in a conversation's text: how a template writes them, and where an answer has its own.

Pure: texts in, texts out. `chat_template` renders.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """
    How a template writes the thoughts before an answer.

    Attributes:
        lead (`str`): White space after the generation prompt, before `opening`.
        opening (`str`): Text before the thoughts, such as `"<think>\\n"`.
        close (`str`): Text between thoughts and answer, without white space around it, such as `"</think>"`.
    """

    lead: str
    opening: str
    close: str

    @property
    def tag(self) -> str:
        """The opening without white space at its end."""
        return self.opening.rstrip()


@dataclass(frozen=True, slots=True)
class Frame:
    """
    The text of one conversation around the place of its answer.

    Attributes:
        prompt (`str`): Everything up to and including the generation prompt. It starts with `header`.
        header (`str`): Everything up to the start of the assistant's turn, without an opening of thoughts.
        inserted (`str`): Text that the template writes between `header` and an answer without thoughts.
    """

    prompt: str
    header: str
    inserted: str


@dataclass(frozen=True, slots=True)
class Placed:
    """
    The text that a model reads before a completion, and the completion after it.

    Attributes:
        generation_prompt (`str`): The text that the template shows to a model that is to answer.
        before (`str`): Everything before the completion.
        after (`str`): The completion; control tokens that the policy spelled out are guarded.
    """

    generation_prompt: str
    before: str
    after: str


def shared_start(first: str, second: str) -> str:
    """The longest text that both start with. It does not end within a tag: `<think>` and `</think>` share nothing."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    shared = first[:length]
    return shared if length == min(len(first), len(second)) else re.sub(r"[<\[][^<>\[\]\s]*$", "", shared)


def split_space(text: str) -> tuple[str, str]:
    """White space at the start of a text, and the rest."""
    rest = text.lstrip()
    return text[: len(text) - len(rest)], rest


def read_thoughts(text: str, prompt: str, *, thought: str, answer: str) -> Thoughts | None:
    """
    Return how thoughts are written; `None` if the text has no thoughts.

    Args:
        text (`str`): A whole conversation whose answer has thoughts.
        prompt (`str`): The same conversation up to its generation prompt.
        thought, answer (`str`): Known texts of the thoughts and of the answer.
    """
    before, is_there, after = text.partition(thought)
    between, is_answered, _ = after.partition(answer)
    close = between.strip()
    if not is_there or not is_answered or not close:
        return None
    start = len(shared_start(prompt, before))
    if before[start:].strip():
        lead, opening = split_space(before[start:])
        return Thoughts(lead, opening, close)
    word = re.search(rf"(?:{_TAG}|[^\s<>\[\]]+)\s*$", before)
    return None if word is None else Thoughts("", word[0], close)


def guess_thoughts(prompt: str, before: str) -> Thoughts | None:
    """
    How thoughts are written, from tags in the generation prompt, or in the text before an answer without thoughts.

    The close of `<think>` is `</think>`, and that of `[THINK]` is `[/THINK]`.
    """
    start = len(shared_start(prompt, before))
    for rest, is_prompt in ((prompt[start:], True), (before[start:], False)):
        found = re.match(r"(\s*)((?:<\w+>|\[\w+\])\s*)(</\w+>|\[/\w+\])?", rest)
        if found is not None and (is_prompt or found[3]):
            tag = found[2].rstrip()
            return Thoughts(found[1], found[2], f"{tag[0]}/{tag[1:]}")
    lone = re.search(r"(?:</\w+>|\[/\w+\])\s*$", prompt)
    if lone is None:
        return None
    close = lone[0].rstrip()
    return Thoughts("", close.replace("/", "", 1), close)


def place_own_thoughts(frame: Frame, thoughts: Thoughts, answer: str, guard: Callable[[str], str]) -> Placed:
    """An answer that starts with the opening of thoughts. The part that is in the generation prompt is the prompt's."""
    header = frame.header + thoughts.lead
    in_prompt = max(len(shared_start(frame.prompt, header + answer)) - len(header), 0)
    tag_end = max(len(thoughts.tag), in_prompt)
    after = answer[in_prompt:tag_end] + guard_thoughts(answer[tag_end:], thoughts, guard)
    return Placed(frame.prompt, header + answer[:in_prompt], after)


def guard_thoughts(text: str, thoughts: Thoughts, guard: Callable[[str], str]) -> str:
    """Guard thoughts and answer, not the text that the template writes between them."""
    inside, close, answer = text.partition(thoughts.close)
    return guard(inside) + close + guard(answer)
