"""Text and ids -> token ids. The one owner of the prompt/completion boundary and of the end of a turn.

Runs no model. `completions` reads what the policy wrote, `chat_template` renders conversations, `tokenization`
tokenizes, `causal_lm` runs the rows that come out. A row, and the shift by one:

    position    0     1     2        p-1     p     p+1         p+C-1
             [ <s>  2      +  ...  <asst> ][ It    is   ...    <end> ]
               '------- prompt_ids ------'  '---- completion_ids ---'
                                    |  predicts  ^
    predicting positions:          p-1 ... p+C-2          (`Row.predicting`, C of them)
    completion tokens:                       p ... p+C-1

`<end>` is only there if the policy ended its turn. Some templates end a turn with two tokens. Text that the template
puts between its generation prompt and an answer (an empty thought, a channel) belongs to the prompt.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config import CDRConfig
from ..errors import ConfigError, ModelError
from .chat_template import ChatTemplate
from .tokenization import ControlInText, OffsetTokenizer, Tokens
from .types import Completion, Prompt, Row, Unscorable, shorten


@dataclass(frozen=True, slots=True)
class Parts:
    """
    A row as text, for people; see `Encoder.parts`.

    Attributes:
        prompt (`str`): The prompt, up to and including the generation prompt.
        inserted (`str`): Text that the template puts between the generation prompt and the answer.
        completion (`str`): The completion.
        end (`str`): The end of the turn; empty if the completion is not finished.
    """

    prompt: str
    inserted: str
    completion: str
    end: str


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


@dataclass(frozen=True)
class PromptForm:
    """
    How a trainer writes prompts for the policy.

    Attributes:
        template_kwargs (`dict` or `None`): Variables for the chat template.
        tools (`list` or `None`): JSON schemas of tools that the chat template writes.
        today (`datetime.date`): The date that the chat template writes, if it writes one.
        add_special_tokens (`str`): `cdr_add_special_tokens`: BOS before string prompts.
    """

    template_kwargs: dict[str, Any] | None
    tools: list[Any] | None
    today: date
    add_special_tokens: str

    @classmethod
    def of(cls, config: CDRConfig) -> "PromptForm":
        """Return the form that the options ask for; without `cdr_date` the date is today's."""
        return cls(
            config.cdr_chat_template_kwargs,  # type: ignore[arg-type]
            tools=None,
            today=date.today() if config.cdr_date is None else date.fromisoformat(config.cdr_date),
            add_special_tokens=config.cdr_add_special_tokens,
        )


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
        tools (`Sequence`, *optional*): Functions or JSON schemas that the template writes into every prompt.
        today (`datetime.date`, *optional*): The date for templates that write today's. Default: the clock's.
        add_special_tokens (`str`, *optional*, defaults to `"auto"`): `"false"` keeps BOS off string prompts, `"true"`
            demands one, `"auto"` follows the tokenizer.
        generation_ends (`Collection[int]`, *optional*): Ids at which the model's generation config ends a completion.

    Raises:
        ConfigError: the chat template is not valid Jinja.
        ModelError: the tokenizer has no character offsets, or is to add a BOS that it does not have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        role: str,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        today: date | None = None,
        add_special_tokens: str = "auto",
        generation_ends: Collection[int] = (),
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{role}_tokenizer is a {type(tokenizer).__name__}, which reports no character offsets. "
                "Pass a fast tokenizer (one backed by the tokenizers library)."
            )
        self.tokenizer = tokenizer
        self._role = role
        self._generation_ends = frozenset(generation_ends)
        text = chat_template or own_chat_template(tokenizer)
        self._given_template = text
        named = tokenizer.chat_template
        if tools and isinstance(named, Mapping) and text == named.get("default"):
            text = named.get("tool_use", text)  # as `apply_chat_template` does
        self.template = (
            None
            if text is None
            else ChatTemplate(tokenizer, role, text, variables=chat_template_kwargs, tools=tools, today=today)
        )
        markers = set() if self.template is None else self.template.turn_markers()
        self.offsets = OffsetTokenizer(tokenizer, markers)
        self._bos = self._choose_bos(add_special_tokens)
        self._end_of_text_id: int | None = tokenizer.eos_token_id
        # The text that ends a turn, and the id of its last token.
        self._end_of_turn, self._end_of_turn_id = self._find_end_of_turn(generation_ends)
        special = dict(tokenizer.special_tokens_map)  # templates read them
        template = None if self.template is None else self.template.identity
        self._identity = (self.offsets.identity, template, self._bos, self._end_of_turn, self.end_ids, special)

    @property
    def chat_template(self) -> str | None:
        """Jinja text of the template."""
        return None if self.template is None else self.template.text

    @property
    def end_ids(self) -> frozenset[int]:
        """The ids that end a completion: the template's end of turn and the end of text."""
        return frozenset(id for id in (self._end_of_turn_id, self._end_of_text_id) if id is not None)

    @property
    def end_of_turn(self) -> str | None:
        """The last token of an assistant's turn, as text."""
        token = self._end_of_turn_id
        return None if token is None else str(self.tokenizer.convert_ids_to_tokens(token))

    @property
    def written_date(self) -> str | None:
        """The date that the template writes into prompts, as `YYYY-MM-DD`; `None` if it writes no date."""
        if self.template is None or not self.template.writes_date:
            return None
        return (self.template.today or date.today()).isoformat()

    def describe_thoughts(self) -> str:
        """How the template treats the thoughts of a reasoning model, for people."""
        if self.template is None or self.template.thoughts is None:
            return "none"
        thoughts = self.template.thoughts
        if self.template.opens_thought:
            return (
                f"the prompt opens {thoughts.tag}; an answer without {thoughts.close} is read as one without thoughts"
            )
        return f"{thoughts.tag} ... {thoughts.close}"

    def adapt(self, form: PromptForm) -> "Encoder":
        """Return an encoder like this one that writes prompts in another form."""
        return Encoder(
            self.tokenizer,
            self._role,
            chat_template=self._given_template,
            chat_template_kwargs=form.template_kwargs,
            tools=form.tools,
            today=form.today,
            add_special_tokens=form.add_special_tokens,
            generation_ends=self._generation_ends,
        )

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
        _, before, after, guarded = self._place(prompt, completion)
        end, end_id = self._end(prompt, completion)
        tokens = self._tokenize(before, after + end, guarded=guarded, prompt=prompt, completion=completion)
        prompt_ids = (self._bos if isinstance(prompt, str) else ()) + tokens.ids[: tokens.num_before]
        written = tokens.ids[tokens.num_before :] + (() if end_id is None else (end_id,))
        completion_ids = completion.ids or written
        if not completion_ids:
            raise Unscorable("the completion is empty and was not finished: there is no token to score")
        if not prompt_ids:
            raise Unscorable("the prompt is empty: nothing predicts the first completion token")
        return Row(prompt_ids, completion_ids)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """
        Return the prompt's tokens, up to and including the generation prompt.

        Raises:
            Unscorable, ConfigError: as `encode`.
        """
        return self.encode(prompt, Completion("", None, ids=(0,))).prompt_ids

    def parts(self, prompt: Prompt, completion: Completion) -> Parts:
        """
        Return the text that `encode` tokenizes, part by part.

        Raises:
            Unscorable, ConfigError, ModelError: as `encode`.
        """
        start, before, after, guarded = self._place(prompt, completion)
        end, end_id = self._end(prompt, completion)
        if guarded:
            start, before, after = (self.offsets.unguard(text) for text in (start, before, after))
        prompt_length = len(start) if before.startswith(start) else len(before)
        last = end or ("" if end_id is None else str(self.tokenizer.convert_ids_to_tokens(end_id)))
        if completion.ids is not None:
            length = len(completion.ids)
            while length and completion.ids[length - 1] in self.end_ids:
                length -= 1
            after = str(self.tokenizer.decode(completion.ids[:length]))
            last = str(self.tokenizer.decode(completion.ids[length:]))
        return Parts(before[:prompt_length], before[prompt_length:], after, last)

    def is_special(self, token: int) -> bool:
        """Whether decoding skips this id."""
        added = self.tokenizer.added_tokens_decoder.get(token)
        return added is not None and added.special

    def holds(self, completion_ids: tuple[int, ...], text: str, end_ids: Collection[int]) -> bool:
        """Whether these ids are this tokenizer's: they decode, as TRL decodes them, to the text that came with them."""
        if not self._are_ids(completion_ids):
            return False
        if not text:  # any special token decodes to nothing: only an end token is proof
            return len(completion_ids) == 1 and completion_ids[0] in end_ids
        return bool(self.tokenizer.decode(completion_ids, skip_special_tokens=True) == text)

    def holds_part(self, completion_ids: tuple[int, ...], text: str) -> bool:
        """Return True if these ids can be this tokenizer's, and their text holds a text, white space aside."""
        if not self._are_ids(completion_ids):
            return False
        # Parsers keep special tokens or leave them out.
        texts = (self.tokenizer.decode(completion_ids, skip_special_tokens=skip) for skip in (False, True))
        return any(text.strip() in decoded for decoded in texts)

    def _are_ids(self, ids: tuple[int, ...]) -> bool:
        """Return True if there are ids, and the tokenizer has all of them."""
        size = len(self.tokenizer)  # some versions copy the vocabulary to count it
        return bool(ids) and all(0 <= token < size for token in ids)

    def _place(self, prompt: Prompt, completion: Completion) -> tuple[str, str, str, bool]:
        """The generation prompt's text, all text before the completion, the completion, and if these are guarded."""
        text = completion.text if completion.ids is None else ""
        if isinstance(prompt, str):
            before = read_text(prompt, "the prompt")
            guarded = self._needs_guard([text], template_text=prompt)
            return before, before, self.offsets.guard(text) if guarded else text, guarded
        messages = read_messages(prompt)
        if self.template is None:
            raise ConfigError(
                f"{self._role}_tokenizer has no chat template, nor has its partner, and the prompt is a conversation. "
                "Pass cdr_chat_template, the path of a Jinja file, or use string prompts."
            )
        guarded = self._needs_guard([*_strings(messages), text])
        guard: Callable[[str], str] = self.offsets.guard if guarded else str
        if guarded:
            messages = _change_strings(messages, guard)
        placed = self.template.place(
            self.template.check(messages),
            text,
            is_generated=completion.is_generated or completion.ids is not None,
            finished=completion.finished,
            guard=guard,
        )
        return placed.generation_prompt, placed.before, placed.after, guarded

    def _tokenize(self, before: str, after: str, *, guarded: bool, prompt: Prompt, completion: Completion) -> Tokens:
        try:
            return self.offsets.tokenize(before, after, guarded=guarded)
        except ControlInText as error:
            where = self._find_spelled(str(error), prompt, completion)
            raise Unscorable(
                f"{where} spells out the control token {error}, which {self._role}_tokenizer can't read as text. "
                "Remove the token from the text"
            ) from None

    def _find_spelled(self, token: str, prompt: Prompt, completion: Completion) -> str:
        """Name the text that spells out a control token."""
        texts = {"the completion": completion.text}
        if not isinstance(prompt, str):
            for index, message in enumerate(read_messages(prompt)):
                texts[f"message {index} of the prompt"] = message["content"]
        return next((name for name, text in texts.items() if token in text), "the text")

    def _needs_guard(self, written: list[str], *, template_text: str = "") -> bool:
        """Whether a control token is spelled out in what users and the policy wrote."""
        if not self.offsets.spells_control(written):
            return False
        if self.offsets.has_mark([*written, template_text]):
            raise Unscorable("the text holds U+FDD0 beside the spelling of a control token: drop the character")
        return True

    def _end(self, prompt: Prompt, completion: Completion) -> tuple[str, int | None]:
        """The text after a completion that ends its turn, or the id of the token if it is not written as text."""
        if not completion.finished or completion.ids is not None:
            return "", None
        if not isinstance(prompt, str) and self._end_of_turn:
            return self._end_of_turn, None
        end_id = self._end_of_text_id if isinstance(prompt, str) else self._end_of_turn_id
        if end_id is None:
            raise ModelError(
                f"{self._role}_tokenizer knows no end token: eos_token is None, and no chat template names one. "
                "Set tokenizer.eos_token, or pass finished=False."
            )
        return "", end_id

    def _choose_bos(self, add_special_tokens: str) -> tuple[int, ...]:
        """What goes before a string prompt."""
        if add_special_tokens == "false":
            return ()
        bos = self.offsets.leading_ids
        if add_special_tokens == "true" and not bos:
            if self.tokenizer.bos_token_id is None:
                raise ModelError(
                    f"cdr_add_special_tokens is 'true', and {self._role}_tokenizer has no bos_token. Use 'auto'."
                )
            return (self.tokenizer.bos_token_id,)
        return bos

    def _find_end_of_turn(self, generation_ends: Collection[int]) -> tuple[str, int | None]:
        """
        The text that ends an assistant's turn, and the id of its last token; else the end of text.

        Some templates (GLM's) write no end: the marker of the next turn ends the turn if the generation config names
        it. Without a generation config the template is the only source.
        """
        nothing = "", self._end_of_text_id
        if self.template is None or self.template.closing is None:
            return nothing
        ends = {*generation_ends, self._end_of_text_id}
        before, controls = self.offsets.first_controls(self.template.closing)
        if not controls:
            before, controls = self.offsets.first_controls(self.template.next_turn)
            if not controls or before.strip():
                return nothing
            first = int(self.tokenizer.convert_tokens_to_ids(controls[0]))
            is_end = first in generation_ends if generation_ends else first != self.tokenizer.bos_token_id
            return (before + controls[0], first) if is_end else nothing
        ids = [int(self.tokenizer.convert_tokens_to_ids(token)) for token in controls]
        length = next((place for place, id in enumerate(ids, start=1) if id in ends), len(ids))
        return before + "".join(controls[:length]), ids[length - 1]


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


def _strings(value: Any) -> Iterator[str]:
    """All strings of a message and of its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _strings(entry)


def _change_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a message, or of a field, with all strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _change_strings(entry, change) for name, entry in value.items()}
    if isinstance(value, Sequence):
        return [_change_strings(entry, change) for entry in value]
    return value


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
