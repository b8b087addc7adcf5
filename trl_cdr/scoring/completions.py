"""What the policy wrote: each completion's text, its token ids where they are proven the pair's, and whether it ended.

Reads what trainers hand over; `encoding` turns the result into rows. Runs no model.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .._compat import inner_tokenizer
from .encoding import Encoder, read_text, vocabulary_hash
from .pair import Pair
from .types import Completion, Message, Unscorable, shorten

logger = logging.getLogger(__name__)

# The bytes of a character are at most four: three of them, each decoded alone, are the most that can be broken.
_BROKEN = re.compile("\ufffd{1,3}\\Z")

# What a parsed response keeps beside its content: the policy wrote it, and scoring the rest alone would mislead.
_APART = ("tool_calls", "reasoning_content", "reasoning", "thinking")


class CompletionReader:
    """
    Reads completions for one pair.

    A trainer tells a reward function neither the policy's tokenizer nor where a completion ended. Two things say it:
    ids that decode, under the pair's shared tokenizer, to the very text that came with them are the pair's own (the
    ids path), and end where they end; or the policy's tokenizer is known and names its end tokens. Where neither
    holds, nobody knows whether the policy ended its turn, and no end token is credited.

    Args:
        pair (`Pair`): The pair that will score.
        policy_tokenizer (*optional*): The policy's tokenizer, or a processor that holds it.
        policy_ends (`Collection[int]`, *optional*): Where the policy's generation stops beside that tokenizer's ends.
    """

    def __init__(self, pair: Pair, policy_tokenizer: Any = None, policy_ends: Collection[int] = ()) -> None:
        self._encoder = pair.strong.encoder
        self._ids_may_match = pair.shares_vocabulary
        self._end_ids = pair.end_ids
        self._pad_ids = {self._encoder.tokenizer.pad_token_id}
        self._policy_end_ids: frozenset[int] | None = None
        self._has_warned = False
        if policy_tokenizer is not None:
            policy: PreTrainedTokenizerBase = inner_tokenizer(policy_tokenizer)
            is_fast = getattr(policy, "is_fast", False)
            encoder = Encoder(policy, "policy", generation_ends=policy_ends) if is_fast else None
            ends = frozenset([policy.eos_token_id]) if encoder is None else encoder.end_ids
            self._policy_end_ids = ends | frozenset(policy_ends)
            self._pad_ids.add(policy.pad_token_id)
            if vocabulary_hash(policy) == vocabulary_hash(self._encoder.tokenizer):
                self._end_ids |= self._policy_end_ids
            else:
                self._ids_may_match = False

    def read(
        self,
        completions: Sequence[str | Sequence[Message]],
        completion_ids: Sequence[Sequence[int]] | None,
        finished: Sequence[bool | None] | None,
        *,
        is_generated: Sequence[bool] | None = None,
    ) -> list[Completion | Unscorable]:
        """Arguments as in `DensityRatioScorer.score`; one result for each completion, in order."""
        read: list[Completion | Unscorable] = []
        for index, completion in enumerate(completions):
            ids = None if completion_ids is None else list(completion_ids[index])
            follows = ids is not None if is_generated is None else bool(is_generated[index])
            parsed = self._parsed(completion, ids) if ids is not None else None
            if parsed is not None:
                read.append(parsed)
                continue
            try:
                text = read_completion(completion)
            except Unscorable as reason:
                read.append(reason)
                continue
            own = self._own(ids, text) if ids is not None and self._ids_may_match else None
            if own is not None:
                read.append(own)
            elif finished is not None:
                said = finished[index]
                read.append(_read_text(text, None if said is None else bool(said), follows))
            else:
                read.append(_read_text(text, True if ids is None else self._ended(ids), follows))
        return read

    def _parsed(self, completion: Any, ids: list[int]) -> Completion | None:
        """
        A message that a trainer parsed from ids of the pair's own tokenizer: thoughts and tool calls stand apart, and
        white space is gone. The ids hold all that the policy wrote.
        """
        if isinstance(completion, str) or self._policy_end_ids is None or not self._ids_may_match:
            return None
        if not isinstance(completion, Sequence) or len(completion) != 1 or not isinstance(completion[0], Mapping):
            return None
        message = completion[0]
        content = message.get("content") or ""
        if message.get("role") != "assistant" or not isinstance(content, str):
            return None
        own = cut_at_end(ids, end_ids=self._end_ids, pad_ids=self._pad_ids)
        if not own or not self._encoder.holds_part(own, content):
            return None
        return self._with_ids(own, content)

    def _own(self, ids: list[int], text: str) -> Completion | None:
        """The completion with its ids, if they are the pair's own."""
        own = cut_at_end(ids, end_ids=self._end_ids, pad_ids=self._pad_ids)
        if not self._encoder.holds(own, text, self._end_ids):
            return None
        return self._with_ids(own, text)

    def _with_ids(self, own: tuple[int, ...], text: str) -> Completion:
        length = len(own)
        while length and self._encoder.is_special(own[length - 1]):
            length -= 1
        tail = own[length:]  # decoding skips it, so the text proves nothing of it
        if tail and self._policy_end_ids is None and tail[0] not in self._end_ids:
            self._warn()  # padding, or an end that only the policy knows
            return Completion(text, None, own[:length])
        return Completion(text, own[-1] in self._end_ids, own)

    def _ended(self, ids: list[int]) -> bool | None:
        """Whether ids that are not the pair's hold one of the policy's end tokens."""
        if self._policy_end_ids is not None:
            return not self._policy_end_ids.isdisjoint(drop_left_padding(ids, self._pad_ids))
        self._warn()
        return None

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The policy's tokenizer is not known, and its completion_ids do not tell by themselves: finished "
                "completions can't be told from cut-off ones, so no end token is scored. Pass cdr_policy_tokenizer."
            )


def read_completion(completion: Any) -> str:
    """The text of a completion: a string, or a conversation that holds one assistant message."""
    if isinstance(completion, str):
        return read_text(completion, "the completion")
    if not isinstance(completion, Sequence) or not all(isinstance(message, Mapping) for message in completion):
        raise Unscorable(f"the completion is {shorten(completion)}: pass a string or a list with one assistant message")
    if len(completion) != 1:
        raise Unscorable(
            f"the completion has {len(completion)} messages: only a single assistant message can be scored"
        )
    if completion[0].get("role") != "assistant":
        raise Unscorable(f"the completion has the role {completion[0].get('role')!r}: a completion is the assistant's")
    apart = [name for name in _APART if completion[0].get(name)]
    if apart:
        raise Unscorable(
            f"the completion holds {apart[0]} apart from its content: pass the text as the policy wrote it"
        )
    return read_text(completion[0].get("content"), "the completion's content")


def cut_at_end(ids: Sequence[int], *, end_ids: Collection[int], pad_ids: Collection[int | None]) -> tuple[int, ...]:
    """
    Drop padding on the left, and what follows the first end token, or the padding where there is none.

    Online DPO pads on the right, often with the end token itself: `[x, end, end, end]` was `[x, end]`. A completion
    that was cut off holds no end token, and none is added.
    """
    ids = drop_left_padding(ids, pad_ids)
    for index, token in enumerate(ids):
        if token in end_ids:
            return tuple(ids[: index + 1])
    length = len(ids)
    while length and ids[length - 1] in pad_ids:
        length -= 1
    return tuple(ids[:length])


def drop_left_padding(ids: Sequence[int], pad_ids: Collection[int | None]) -> Sequence[int]:
    """Drop padding before the first token. A completion of padding alone stays: its first token may be its end."""
    start = next((index for index, token in enumerate(ids) if token not in pad_ids), 0)
    return ids[start:]


def _read_text(text: str, finished: bool | None, is_generated: bool) -> Completion:
    """A completion without ids. If it was cut inside a character, the rest of that character is left out."""
    if finished is not True:
        text = _BROKEN.sub("", text)
    return Completion(text, finished, is_generated=is_generated)
