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
        self._unknown_id = _find_unknown(self._plain, spec["model"])
        longest_first = sorted(control, key=lambda text: (-len(text), text))
        self._mark_of = {text: f"{_MARK}{index}{_MARK}" for index, text in enumerate(longest_first)}
        self._spelled = _any_of(longest_first)
        # Of these, a text is matched after it has been normalized: in lower case, or with other forms of letters.
        self._normalizer = self._plain.normalizer
        normalized = [text for text in longest_first if added[text]["normalized"]]
        self._normalized = _any_of([self._normalize(text) for text in normalized]) if normalized else None
        self._other_spelling = self._mark_of | {mark: text for text, mark in self._mark_of.items()}
        self._marks = _any_of(list(self._mark_of.values()))
        self._either = _any_of(list(self._other_spelling))

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by default: BOS, mostly."""
        encoding = self._plain.encode("a", add_special_tokens=True)
        mask = encoding.special_tokens_mask
        return tuple(encoding.ids[: mask.index(0) if 0 in mask else 0])

    def spells_control(self, texts: Iterable[str]) -> bool:
        """Whether a control token is spelled out in one of these texts."""
        for text in texts:
            if self._spelled.search(text) or (self._normalized and self._normalized.search(self._normalize(text))):
                return True
        return False

    def has_mark(self, texts: Iterable[str]) -> bool:
        """Whether one of these texts holds the character that the guard uses itself (U+FDD0)."""
        return any(_MARK in text for text in texts)

    def guard(self, text: str) -> str:
        """Spell control tokens as marks."""
        return self._spelled.sub(lambda match: self._mark_of[match[0]], text)

    def unguard(self, text: str) -> str:
        """Spell marks as control tokens again."""
        return self._marks.sub(lambda match: self._other_spelling[match[0]], text)

    def first_controls(self, text: str) -> tuple[str, list[str]]:
        """The text before the first control token, and the control tokens from there on that follow without a gap."""
        first = self._spelled.search(text)
        if first is None:
            return text, []
        controls = []
        position = first.start()
        while match := self._spelled.match(text, position):
            controls.append(match[0])
            position = match.end()
        return text[: first.start()], controls

    def tokenize(self, before: str, after: str, *, guarded: bool = False) -> Tokens:
        """
        Tokenize `before + after` as one text. A token that straddles the two does not count as `before`.

        Args:
            before, after (`str`): The text's two parts.
            guarded (`bool`, *optional*, defaults to `False`): The parts hold marks from `guard`.

        Raises:
            ControlInText: a guarded text became a control token, because the vocabulary's merges make it. The message
                is the token.
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
        if guarded:
            for id in ids:
                if id in self._control_ids and id not in original_ids and id != self._unknown_id:
                    raise ControlInText(self._plain.id_to_token(id))
        return Tokens(tuple(original_ids.get(id, id) for id in ids), first)

    def _marked_tokenizer(self) -> tuple[Tokenizer, dict[int, int]]:
        """The second copy, and its ids of control tokens -> the original's."""
        if self._marked is None:
            spec = json.loads(self._plain.to_str())
            for token in spec["added_tokens"]:
                if token["content"] in self._mark_of:
                    token["content"], token["normalized"] = self._mark_of[token["content"]], False
            self._rename_pieces(spec["model"])
            marked = Tokenizer.from_str(json.dumps(spec))
            # A control token that the model's own vocabulary lacks gets another id, so ids are mapped back by content.
            ids = {marked.token_to_id(mark): self._plain.token_to_id(text) for text, mark in self._mark_of.items()}
            for token in spec["added_tokens"]:
                ids.setdefault(marked.token_to_id(token["content"]), token["id"])
            self._marked = marked, ids  # type: ignore[assignment]
        return self._marked  # type: ignore[return-value]

    def _rename_pieces(self, model: dict[str, Any]) -> None:
        """Spell control tokens as marks in the model's vocabulary: Unigram and WordPiece find their text there."""
        merges = model.get("merges", [])
        merged = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges}
        unknown = self._plain.id_to_token(self._unknown_id) if self._unknown_id is not None else None
        names = {text: mark for text, mark in self._mark_of.items() if text not in merged and text != unknown}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): id for text, id in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def _swap(self, text: str) -> str:
        return self._either.sub(lambda match: self._other_spelling[match[0]], text)


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _find_unknown(tokenizer: Tokenizer, model: dict[str, Any]) -> int | None:
    """The id of text that the vocabulary can't spell."""
    if model.get("unk_token") is not None:
        return tokenizer.token_to_id(model["unk_token"])
    return model.get("unk_id")


def _keep_whole_offsets(post_processor: Any) -> None:
    """Byte-level post-processors trim white space off offsets, which would move a boundary that lies in it."""
    for part in (post_processor or {}).get("processors", [post_processor]):
        if part and "trim_offsets" in part:
            part["trim_offsets"] = False
