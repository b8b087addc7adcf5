"""Text -> token ids with character offsets, control tokens matched only where the caller wrote them.

Knows no conversation and no boundary: `encoding` renders and splits, this tokenizes what it is given.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_MARK = "\ufdd0"  # a Unicode noncharacter: reserved for use inside a program, never in text that is exchanged


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of `before + after`, and how many of them lie wholly in `before`."""

    ids: tuple[int, ...]
    num_before: int


class ControlInText(Exception):
    """A control token that is spelled out in somebody's text can't be kept from becoming one."""


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
        text = json.dumps(spec, sort_keys=True)
        self.identity = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # of all that tokenizing depends on
        self._plain = Tokenizer.from_str(text)
        self._marked: tuple[Tokenizer, dict[int, int]] | None = None
        added = {token["content"]: token for token in spec["added_tokens"]}
        named = {*tokenizer.all_special_tokens, *turn_markers}
        # Only added tokens are matched in text; a named token that is none of them (pad_token = "!") is a word.
        control = {text for text, token in added.items() if token["special"] or text in named}
        self._added_ids = {token["id"] for token in spec["added_tokens"]}
        self._control_ids = {added[text]["id"] for text in control}
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

        Raises:
            ControlInText: the tokenizer's own vocabulary spells a guarded text as a control token (Unigram models do).
        """
        tokenizer = self._plain
        original_ids: dict[int, int] = {}
        if guarded:
            before, after = self._swap(before), self._swap(after)
            tokenizer, original_ids = self._marked_tokenizer()
        encoding = tokenizer.encode(before + after, add_special_tokens=False)
        ids, offsets = list(encoding.ids), encoding.offsets
        first = next((index for index, (_, end) in enumerate(offsets) if end > len(before)), len(ids))
        if (
            first < len(ids)
            and offsets[first][0] < len(before)
            and original_ids.get(ids[first], ids[first]) in self._added_ids
        ):
            # A control token before the seam that swallows white space behind it (Phi-3) is not the completion's.
            left, right = (tokenizer.encode(part, add_special_tokens=False).ids for part in (before, after))
            ids, first = left + right, len(left)
        if guarded and any(id in self._control_ids and id not in original_ids for id in ids):
            raise ControlInText
        return Tokens(tuple(original_ids.get(id, id) for id in ids), first)

    def _marked_tokenizer(self) -> tuple[Tokenizer, dict[int, int]]:
        """The second copy, and its ids of added tokens -> the original's."""
        if self._marked is None:
            spec = json.loads(self._plain.to_str())
            added = [
                {**token, "content": self._mark_of.get(token["content"], token["content"])}
                for token in spec["added_tokens"]
            ]
            marked = Tokenizer.from_str(json.dumps({**spec, "added_tokens": added}))
            # An added token that the model's own vocabulary lacks is numbered anew, so ids are mapped back by content.
            renamed: dict[int, int] = {}
            for token in added:
                id = marked.token_to_id(token["content"])
                assert id is not None
                renamed[id] = token["id"]
            self._marked = marked, renamed
        return self._marked

    def _swap(self, text: str) -> str:
        return self._either.sub(lambda match: self._other_spelling[match[0]], text)


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _keep_whole_offsets(post_processor: Any) -> None:
    """Byte-level post-processors trim white space off offsets, which would move a boundary that lies in it."""
    for part in (post_processor or {}).get("processors", [post_processor]):
        if part and "trim_offsets" in part:
            part["trim_offsets"] = False
