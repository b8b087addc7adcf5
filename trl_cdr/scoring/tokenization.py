"""Text -> token ids with character offsets, control tokens matched only where the caller wrote them.

Knows no conversation and no boundary: `encoding` renders and splits, this tokenizes what it is given.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_MARK = "\ufdd0"  # a Unicode noncharacter: reserved for use inside a program, never in text that is exchanged


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of `before + after`, and how many of them lie wholly in `before`."""

    ids: tuple[int, ...]
    num_before: int


class OffsetTokenizer:
    """
    A private copy of a fast tokenizer: nobody else's padding or truncation reaches it, and the original is untouched.

    Control tokens (the special ones and a chat template's turn markers) that are spelled out in somebody's text must
    stay text. `guard` spells them as marks before the chat template sees the text; `tokenize(..., guarded=True)` then
    swaps the two spellings and runs a second copy, whose control tokens *are* the marks: what the template wrote
    matches, what was spelled out in the text is plain. Merges, pre-tokenization and offsets stay the original's.

    Args:
        tokenizer: A fast tokenizer.
        turn_markers (`Iterable[str]`, *optional*): Control tokens that the tokenizer does not flag as special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn_markers: Iterable[str] = ()) -> None:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["padding"] = spec["truncation"] = None
        _keep_whole_offsets(spec["post_processor"])
        self._spec = spec
        self._plain = Tokenizer.from_str(json.dumps(spec))
        self._marked: Tokenizer | None = None
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        control = special | set(tokenizer.all_special_tokens) | set(turn_markers)
        longest_first = sorted(control, key=lambda text: (-len(text), text))
        self._mark_of = {text: f"{_MARK}{index}{_MARK}" for index, text in enumerate(longest_first)}
        self._spelled = _any_of(longest_first)
        self._other_spelling = self._mark_of | {mark: text for text, mark in self._mark_of.items()}
        self._either = _any_of(list(self._other_spelling))

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by default: BOS, mostly."""
        encoding = self._plain.encode("a", add_special_tokens=True)
        mask = encoding.special_tokens_mask
        return tuple(encoding.ids[: mask.index(0) if 0 in mask else 0])

    def spells_control(self, texts: Iterable[str]) -> bool:
        """Whether a control token is spelled out in one of these texts."""
        return any(self._spelled.search(text) for text in texts)

    def has_mark(self, texts: Iterable[str]) -> bool:
        """Whether one of these texts holds the character that the guard uses itself (U+FDD0)."""
        return any(_MARK in text for text in texts)

    def guard(self, text: str) -> str:
        """Spell control tokens as marks."""
        return self._spelled.sub(lambda match: self._mark_of[match[0]], text)

    def control_at_start(self, text: str) -> str | None:
        """The control token that a text starts with, white space aside."""
        match = self._spelled.match(text.lstrip())
        return match[0] if match else None

    def tokenize(self, before: str, after: str, *, guarded: bool = False) -> Tokens:
        """
        Tokenize `before + after` as one text. A token that straddles the two does not count as `before`.

        Args:
            before, after (`str`): The text's two parts.
            guarded (`bool`, *optional*, defaults to `False`): The parts hold marks from `guard`.
        """
        if not guarded:
            encoding = self._plain.encode(before + after, add_special_tokens=False)
            ids, boundary = tuple(encoding.ids), len(before)
        else:
            if self._marked is None:
                self._marked, self._original_ids = self._mark_control()
            swapped = self._swap(before)
            encoding = self._marked.encode(swapped + self._swap(after), add_special_tokens=False)
            ids, boundary = tuple(self._original_ids.get(id, id) for id in encoding.ids), len(swapped)
        first_after = (index for index, (_, end) in enumerate(encoding.offsets) if end > boundary)
        return Tokens(ids, next(first_after, len(ids)))

    def _mark_control(self) -> tuple[Tokenizer, dict[int, int]]:
        """The second copy, and its ids of added tokens -> the original's."""
        ids = {}
        added = []
        for token in self._spec["added_tokens"]:
            content = self._mark_of.get(token["content"], token["content"])
            ids[content] = token["id"]
            added.append({**token, "content": content})
        marked = Tokenizer.from_str(json.dumps({**self._spec, "added_tokens": added}))
        # An added token that the model's own vocabulary lacks is numbered anew, so ids are mapped back by content.
        return marked, {int(marked.token_to_id(content) or 0): id for content, id in ids.items()}

    def _swap(self, text: str) -> str:
        return self._either.sub(lambda match: self._other_spelling[match[0]], text)


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _keep_whole_offsets(post_processor: Any) -> None:
    """Byte-level post-processors trim white space off offsets, which would move a boundary that lies in it."""
    for part in (post_processor or {}).get("processors", [post_processor]):
        if part and "trim_offsets" in part:
            part["trim_offsets"] = False
