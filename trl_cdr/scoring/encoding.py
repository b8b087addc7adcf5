"""Text and ids -> token ids. The one owner of the prompt/completion boundary and of the end of a turn.

Runs no model. `completions` reads what the policy wrote, `tokenization` tokenizes, `causal_lm` runs the rows that come
out. A row, and the shift by one:

    position    0     1     2        p-1     p     p+1         p+C-1
             [ <s>  2      +  ...  <asst> ][ It    is   ...    <end> ]
               '------- prompt_ids ------'  '---- completion_ids ---'
                                    |  predicts  ^
    predicting positions:          p-1 ... p+C-2          (`Row.predicting`, C of them)
    completion tokens:                       p ... p+C-1

`<end>` is there only where the policy ended its turn: a completion that was cut off has none.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, ModelError
from .tokenization import ControlInText, OffsetTokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

_PROBE = "trl-cdr probe"
# What a template raises on messages that it does not take: its own refusals, and Python's on fields that are not there.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)


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
        finished (`bool` or `None`): The policy ended its turn / was cut off / nobody knows.
        ids (`tuple[int, ...]` or `None`): Its token ids, where they are proven the pair's own; scored as they are.
    """

    text: str
    finished: bool | None
    ids: tuple[int, ...] | None = None


def read_text(content: Any, name: str) -> str:
    """The text of a message's content, which is a string or a list of text parts. `name` is for the reason."""
    is_parts = not isinstance(content, str) and isinstance(content, Sequence) and content
    if is_parts and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if isinstance(content, str):
        if content.isascii() or not any("\ud800" <= character <= "\udfff" for character in content):
            return content
        raise Unscorable(f"{name} holds half of a surrogate pair, which no tokenizer reads: mend its encoding")
    raise Unscorable(f"{name} is {shorten(content)}: only text can be scored. Pass a string or a list of text parts")


def fit(row: Row, max_length: int | None) -> Row:
    """Shorten the prompt from the left until prompt and completion fit; the completion is never touched."""
    if max_length is None or len(row.ids) <= max_length:
        return row
    room = max_length - len(row.completion_ids)
    if room < 1:
        raise Unscorable(
            f"the completion has {len(row.completion_ids)} tokens, and with one token of prompt at most {max_length} "
            "fit. Use a model with more positions or a shorter max_completion_length"
        )
    return replace(row, prompt_ids=row.prompt_ids[len(row.prompt_ids) - room :], truncated=True)


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what token ids mean: every token, special ones included, with its id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return sha256(repr(vocabulary).encode("utf-8", "surrogatepass")).hexdigest()


class Encoder:
    """
    Prompts and completions -> rows of one model's token ids.

    Text that users or the policy wrote can't forge turns: a special token or turn marker spelled out in a message or a
    completion is encoded as plain text. A string prompt is the exception: TRL's trainers parse it as raw input.

    Args:
        tokenizer: A fast tokenizer (character offsets are needed). It is never changed.
        role (`str`): `"strong"` or `"weak"`, for messages.
        chat_template (`str`, *optional*): Jinja text of the template; the tokenizer's own if `None`.
        chat_template_kwargs (`Mapping`, *optional*): Variables for the template.
        add_special_tokens (`str`, *optional*, defaults to `"auto"`): `"false"` keeps BOS off string prompts, `"true"`
            demands one, `"auto"` follows the tokenizer.

    Raises:
        ConfigError: the chat template is no valid Jinja.
        ModelError: the tokenizer has no character offsets, or is to add a BOS that it does not have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        role: str,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: str = "auto",
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{role}_tokenizer is a {type(tokenizer).__name__}, which reports no character offsets. "
                "Pass a fast tokenizer (one backed by the tokenizers library)."
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template or own_chat_template(tokenizer)
        self._role = role
        self._kwargs = dict(chat_template_kwargs or {})
        self._has_system_role = self._find_system_role()
        self._drops_users = self._find_dropped_users()
        self._offsets = OffsetTokenizer(tokenizer, self._turn_markers())
        self._bos = self._choose_bos(add_special_tokens)
        self._end_of_text_id: int | None = tokenizer.eos_token_id
        self._end_of_turn_id = self._find_end_of_turn()
        special = dict(tokenizer.special_tokens_map)  # templates read them
        self._identity = (self._offsets.identity, self.chat_template, self._kwargs, self._bos, self.end_ids, special)

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a completion: the template's end of turn and the end of text."""
        return frozenset(id for id in (self._end_of_turn_id, self._end_of_text_id) if id is not None)

    @property
    def end_of_turn(self) -> str | None:
        """What closes an assistant's turn, as text."""
        token = self._end_of_turn_id
        return None if token is None else str(self.tokenizer.convert_ids_to_tokens(token))

    def is_like(self, other: "Encoder") -> bool:
        """Whether both encode everything alike: the same tokenizer, template and ends."""
        return self._identity == other._identity

    def encode(self, prompt: Prompt, completion: Completion) -> Row:
        """
        One row.

        Raises:
            Unscorable: the row can't be encoded.
            ConfigError: the prompt is a conversation and there is no chat template.
            ModelError: the completion is finished and the tokenizer knows no end token.
        """
        text = completion.text if completion.ids is None else ""
        if isinstance(prompt, str):
            rendered, bos, end_id = read_text(prompt, "the prompt"), self._bos, self._end_of_text_id
            guarded = self._needs_guard([text], template_text=prompt)
        else:
            messages = read_messages(prompt)
            guarded = self._needs_guard([*(message["content"] for message in messages), text])
            if guarded:
                messages = [{**message, "content": self._offsets.guard(message["content"])} for message in messages]
            rendered, bos, end_id = self._render(messages), (), self._end_of_turn_id
        after = self._offsets.guard(text) if guarded else text
        try:
            tokens = self._offsets.tokenize(rendered, after, guarded=guarded)
        except ControlInText:
            raise Unscorable("the text spells out a control token that the tokenizer can't read as text") from None
        prompt_ids = bos + tokens.ids[: tokens.num_before]
        completion_ids = completion.ids or tokens.ids[tokens.num_before :] + self._end(completion, end_id)
        if not completion_ids:
            raise Unscorable("the completion is empty and was not finished: there is no token to score")
        if not prompt_ids:
            raise Unscorable("the prompt is empty: nothing predicts the first completion token")
        return Row(prompt_ids, completion_ids)

    def is_special(self, token: int) -> bool:
        """Whether decoding skips this id."""
        added = self.tokenizer.added_tokens_decoder.get(token)
        return added is not None and added.special

    def holds(self, completion_ids: tuple[int, ...], text: str, end_ids: Collection[int]) -> bool:
        """Whether these ids are this tokenizer's: they decode, as TRL decodes them, to the text that came with them."""
        size = len(self.tokenizer)  # some versions copy the vocabulary to count it
        if not completion_ids or not all(0 <= token < size for token in completion_ids):
            return False
        if not text:  # any special token decodes to nothing: only an end token is proof
            return len(completion_ids) == 1 and completion_ids[0] in end_ids
        return bool(self.tokenizer.decode(completion_ids, skip_special_tokens=True) == text)

    def _needs_guard(self, written: list[str], *, template_text: str = "") -> bool:
        """Whether a control token is spelled out in what users and the policy wrote."""
        if not self._offsets.spells_control(written):
            return False
        if self._offsets.has_mark([*written, template_text]):
            raise Unscorable("the text holds U+FDD0 beside the spelling of a control token: drop the character")
        return True

    def _end(self, completion: Completion, end_id: int | None) -> tuple[int, ...]:
        if not completion.finished:
            return ()
        if end_id is None:
            raise ModelError(
                f"{self._role}_tokenizer knows no end token: eos_token is None, and no chat template names one. "
                "Set tokenizer.eos_token, or pass finished=False."
            )
        return (end_id,)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt as text, up to and including the generation prompt; an assistant's last turn is continued."""
        if self.chat_template is None:
            raise ConfigError(
                f"{self._role}_tokenizer has no chat template, nor has its partner, and the prompt is a conversation. "
                "Pass cdr_chat_template, the path of a Jinja file, or use string prompts."
            )
        if self._drops_users:
            raise ConfigError(
                f"the chat template of {self._role} leaves out what the user says: every prompt would read alike. It "
                "may be one for images, or misspell content. Pass another by cdr_chat_template."
            )
        if messages[0]["role"] == "system" and not self._has_system_role:
            # Gemma 2 and early Mistral refuse it, other templates pass over it: its text goes into the first turn.
            if len(messages) < 2 or messages[1]["role"] != "user":
                raise Unscorable(f"{self._role}'s chat template has no system role, and no user's turn follows it")
            system, first, *rest = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        try:
            return self._apply_template(messages)
        except _TEMPLATE_ERRORS as error:
            raise Unscorable(f"the prompt was refused by {self._role}'s chat template: {error}") from None

    def _apply_template(self, messages: list[dict[str, Any]], *, whole: bool = False) -> str:
        """`whole`: the last turn is closed, as in training data; else it is left open for the completion."""
        continues = not whole and messages[-1].get("role") == "assistant"
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=self.chat_template,
            add_generation_prompt=not whole and not continues,
            continue_final_message=continues,
            **self._kwargs,
        )
        return str(rendered)

    def _choose_bos(self, add_special_tokens: str) -> tuple[int, ...]:
        """What goes before a string prompt."""
        if add_special_tokens == "false":
            return ()
        bos = self._offsets.leading_ids
        if add_special_tokens == "true" and not bos:
            if self.tokenizer.bos_token_id is None:
                raise ModelError(
                    f"cdr_add_special_tokens is 'true', and {self._role}_tokenizer has no bos_token. Use 'auto'."
                )
            return (self.tokenizer.bos_token_id,)
        return bos

    def _find_system_role(self) -> bool:
        """Whether a system turn reaches the rendered text. Also the first look at the template."""
        if self.chat_template is None:
            return False
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "a"}]
        try:
            return _PROBE in self._apply_template(turns)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template of {self._role} is no valid Jinja ({error}). Mend it, or pass another by "
                "cdr_chat_template."
            ) from None
        except _TEMPLATE_ERRORS:
            return False

    def _find_dropped_users(self) -> bool:
        """Whether a user's turn does not reach the rendered text."""
        if self.chat_template is None:
            return False
        try:
            return _PROBE not in self._apply_template([{"role": "user", "content": _PROBE}])
        except _TEMPLATE_ERRORS:
            return False

    def _turn_markers(self) -> set[str]:
        """
        Added tokens that the chat template opens and closes turns with.

        Some checkpoints don't flag theirs as special. What a template writes inside the assistant's turn (`<think>`)
        is no marker: the policy writes it too.
        """
        if self.chat_template is None:
            return set()
        system, user = {"role": "system", "content": _PROBE}, {"role": "user", "content": _PROBE}
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        markers: set[str] = set()
        for turns in ([user], [system, user]):
            try:
                rendered = self._apply_template(turns, whole=True)
                opening = self._apply_template(turns).rpartition(_PROBE)[2]
            except _TEMPLATE_ERRORS:
                continue
            markers |= {token for token in added if token in rendered}
            closing = rendered.rpartition(_PROBE)[2]
            first = [token for token in added if opening.removeprefix(closing).lstrip().startswith(token)]
            markers |= set(first)
        return markers

    def _find_end_of_turn(self) -> int | None:
        """The special token that the chat template writes after an assistant's content; else the end of text."""
        if self.chat_template is None:
            return self._end_of_text_id
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            rendered = self._apply_template(turns, whole=True)
        except _TEMPLATE_ERRORS:
            return self._end_of_text_id
        if _PROBE not in rendered:
            return self._end_of_text_id
        end = self._offsets.control_at_start(rendered.rpartition(_PROBE)[2])
        return self._end_of_text_id if end is None else int(self.tokenizer.convert_tokens_to_ids(end))


def own_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's default chat template, or None."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, Mapping) else template


def read_messages(prompt: Any) -> list[dict[str, Any]]:
    """The prompt's messages, copied, each with its content as one string."""
    if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
        raise Unscorable(f"the prompt is {shorten(prompt)}: pass a string or a list of messages")
    if not prompt:
        raise Unscorable("the prompt is an empty conversation: pass at least one message")
    messages = []
    for index, message in enumerate(prompt):
        if not isinstance(message.get("role"), str):
            raise Unscorable(f"message {index} of the prompt has the role {message.get('role')!r}: pass 'user', say")
        content = read_text(message.get("content"), f"the content of message {index} of the prompt")
        messages.append({**message, "content": content})
    return messages


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def shorten(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
