"""Conversation -> text, by a chat template, and what the template writes around an answer.

Knows no token id and no boundary in tokens: `encoding` tokenizes. Everything here is learnt from the template's own
output for short conversations, so that it holds for templates that nobody has seen:

    [user]                          ...<|im_start|>assistant\\n                              the generation prompt
    [user, answer]                  ...<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n4<|im_end|>\\n
                                                               '---- inserted ----'  '-- closing --'
    [user, answer with thoughts]    ...<|im_start|>assistant\\n<think>\\nhm\\n</think>\\n\\n4<|im_end|>\\n
                                                               opening '      ' close
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .types import Unscorable

_PROBE = "trl-cdr probe"
_ANSWERS = ("trl-cdr answer", "an other answer of trl-cdr")
# What `strftime` writes of a date; the time of day is midnight.
_DIRECTIVES = ("-d", "-m", "-j", "-H", "-I", "-M", "-S", *"aAwdbBmyYHIpMSjUWcxXGuVeDF")
# Fields in which templates look for the thoughts of an assistant's turn.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
# What a template raises on messages that it does not take: its own refusals, and Python's on fields that are missing.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)

Messages = Sequence[Mapping[str, Any]]


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
class Placed:
    """
    The text that a model reads before a completion, and the completion after it.

    Attributes:
        generation_prompt (`str`): The part of `before` that the template shows to a model that is to answer.
        before (`str`): Everything before the completion.
        after (`str`): The completion; control tokens that the policy spelled out are guarded.
    """

    generation_prompt: str
    before: str
    after: str


class ChatTemplate:
    """
    A chat template with its variables.

    Args:
        tokenizer: Renders; never changed.
        role (`str`): `"strong"`, `"weak"` or `"policy"`, for messages.
        text (`str`): Jinja text of the template.
        variables (`Mapping`, *optional*): Variables of the template, such as `enable_thinking`.
        tools (`Sequence`, *optional*): Functions or JSON schemas, as `apply_chat_template` takes them.
        today (`datetime.date`, *optional*): The date that the template reads. Default: the clock's.

    Raises:
        ConfigError: the template is not valid Jinja.

    Attributes:
        has_system_role (`bool`): A system turn reaches the text.
        drops_users (`bool`): A user's turn does not reach the text.
        writes_date (`bool`): The text depends on today's date.
        thoughts (`Thoughts` or `None`): How it writes thoughts, if it can.
        opens_thought (`bool`): The generation prompt ends inside a thought.
        closing (`str` or `None`): Text after an answer that ends the conversation; `None` if answers do not reach the
            text.
        next_turn (`str`): Text between an answer and the content of the user's turn after it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        role: str,
        text: str,
        *,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        today: date | None = None,
    ) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._role = role
        self.variables = dict(variables or {})
        self.tools = list(tools) if tools else None
        self.today = today
        self._turns: dict[tuple[str, ...], str | None] = {}
        self._last: tuple[list[dict[str, Any]], str, str] | None = None
        user, system = _turn("user", _PROBE), _turn("system", _PROBE)
        self.has_system_role = _PROBE in (self._find([system, _turn("user", "a")]) or "")
        self.drops_users = _PROBE not in (self._find([user]) or _PROBE)
        days = (date(2001, 1, 1), date(2022, 12, 25))
        self.writes_date = len({self._find([user], today=day) for day in days}) > 1
        self.closing, self.next_turn = self._find_closing()
        self.thoughts = self._find_thoughts()
        prompt = self._find([_turn("user", "a")]) or ""
        self.opens_thought = self.thoughts is not None and prompt.rstrip().endswith(self.thoughts.tag)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Everything on which the text depends, beside the tokenizer's special tokens."""
        return self.text, self.variables, self.tools, self.today if self.writes_date else None

    @property
    def has_switch(self) -> bool:
        """Return True if the variable `enable_thinking` decides whether the generation prompt opens a thought."""
        user = [_turn("user", "a")]
        return self._find(user, enable_thinking=True) != self._find(user, enable_thinking=False)

    def check(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return the conversation as the template can write it: without a system role, the system's text is put into the
        first user turn.

        Raises:
            ConfigError: the template leaves out what users write.
            Unscorable: the template leaves out a turn, or there is no user turn for the system's text.
        """
        if self.drops_users:
            raise ConfigError(
                f"the chat template of {self._role} leaves out what the user says: every prompt would read alike. It "
                "may be one for images, or misspell content. Pass another by cdr_chat_template."
            )
        if messages[0]["role"] == "system" and not self.has_system_role:
            # Gemma 2 and early Mistral refuse it, other templates pass over it: its text goes into the first turn.
            if len(messages) < 2 or messages[1]["role"] != "user":
                raise Unscorable(f"{self._role}'s chat template has no system role, and no user's turn follows it")
            system, first, *rest = messages
            messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        dropped = self._find_dropped(messages)
        if dropped is not None:
            raise Unscorable(
                f"{self._role}'s chat template leaves out {dropped}. Use a role that the template writes, such as "
                "'system' for a first turn, or pass another template by cdr_chat_template"
            )
        return messages

    def render(self, messages: list[dict[str, Any]]) -> str:
        """
        Return the prompt up to and including the generation prompt. An assistant's last turn is continued.

        Raises:
            Unscorable: the template refuses the conversation.
        """
        try:
            return self._apply(messages)
        except _TEMPLATE_ERRORS as error:
            raise Unscorable(f"the prompt was refused by {self._role}'s chat template: {error}") from None

    def place(
        self,
        messages: list[dict[str, Any]],
        answer: str,
        *,
        is_generated: bool,
        finished: bool | None,
        guard: Callable[[str], str],
    ) -> Placed:
        """
        Put an answer where the template puts it.

        Args:
            messages (`list[dict]`): The prompt, as `check` returns it.
            answer (`str`): The completion's text.
            is_generated (`bool`): A model wrote it right after the generation prompt.
            finished (`bool` or `None`): See `Completion`.
            guard (`Callable`): What is done to text that the policy wrote.

        Raises:
            Unscorable: the template refuses the conversation.
        """
        prompt, before = self._render_both(messages)
        if is_generated or messages[-1]["role"] == "assistant":
            return Placed(prompt, prompt, guard(answer))
        start = _shared(prompt, before)
        thoughts = self.thoughts
        if thoughts is None:
            return self._place_plain(prompt, before, start, answer, guard)
        # The assistant's turn without any thought in it.
        block = rf"{re.escape(thoughts.tag)}\s*({re.escape(thoughts.close)}\s*)?$"
        header = re.sub(block, "", start).removesuffix(thoughts.lead)
        is_open = prompt.rstrip().endswith(thoughts.tag)
        if answer.lstrip().startswith(thoughts.tag):
            lead = "" if thoughts.lead and answer.startswith(thoughts.lead) else thoughts.lead
            space, written = _split_space(answer)
            text = header + lead + answer
            boundary = max(len(_shared(prompt, text)), len(header + lead))
            ready = len(header + lead + space + thoughts.tag)
            if boundary > ready:
                after = written.removeprefix(thoughts.tag)[boundary - ready :]
                return Placed(prompt, text[:boundary], _guard_thoughts(after, thoughts, guard))
            after = _guard_thoughts(written.removeprefix(thoughts.tag), thoughts, guard)
            return Placed(prompt, text[:boundary], text[boundary:ready] + after)
        if thoughts.close in answer or (is_open and finished is False):
            opened = prompt if is_open else header + thoughts.lead + thoughts.opening
            return Placed(prompt, opened, _guard_thoughts(answer, thoughts, guard))
        return self._place_plain(prompt, before, header, answer, guard)

    def turn_markers(self) -> set[str]:
        """
        Added tokens that the template opens and closes turns with.

        Some checkpoints do not flag theirs as special. A token inside the assistant's turn (`<think>`) is not a marker:
        the policy writes it too.
        """
        system, user = _turn("system", _PROBE), _turn("user", _PROBE)
        decoder = self._tokenizer.added_tokens_decoder
        added = {token.content for token in decoder.values() if token.content.strip()}
        markers: set[str] = set()
        for turns in ([user], [system, user]):
            whole, prompt = self._find(turns, is_whole=True), self._find(turns)
            if whole is None or prompt is None:
                continue
            markers |= {token for token in added if token in whole}
            opening = prompt.rpartition(_PROBE)[2].removeprefix(whole.rpartition(_PROBE)[2]).lstrip()
            markers |= {token for token in added if opening.startswith(token)}
        if self.thoughts is not None:
            markers -= {self.thoughts.tag, self.thoughts.close}
        return markers

    def _place_plain(self, prompt: str, before: str, header: str, answer: str, guard: Callable[[str], str]) -> Placed:
        """An answer without thoughts. If it repeats the text that the template inserts, it is used as written."""
        space, inserted = _split_space(before[len(header) :])
        if inserted.strip() and answer.lstrip().startswith(inserted.strip()):
            own_space, written = _split_space(answer)
            after = inserted.strip() + guard(written.removeprefix(inserted.strip()))
            return Placed(prompt, header + (own_space or space), after)
        return Placed(prompt, before, guard(answer))

    def _render_both(self, messages: list[dict[str, Any]]) -> tuple[str, str]:
        """The prompt with its generation prompt, and the text that the template writes before an answer to it."""
        if self._last is not None and self._last[0] == messages:  # completions of one prompt follow one another
            return self._last[1:]
        prompt = before = self.render(messages)
        if self.closing is not None and messages[-1]["role"] != "assistant":
            whole = self._find([*messages, _turn("assistant", _ANSWERS[0])], is_whole=True) or ""
            if _ANSWERS[0] in whole:
                before = whole.rpartition(_ANSWERS[0])[0]
        self._last = messages, prompt, before
        return prompt, before

    def _find_dropped(self, messages: list[dict[str, Any]]) -> str | None:
        """Name the first turn whose content does not reach the text, if there is one."""
        roles = tuple(message["role"] for message in messages)
        is_plain = all(message.keys() <= {"role", "content"} for message in messages)
        if is_plain and roles in self._turns:
            return self._turns[roles]
        contents = [f"{_PROBE} {index}." for index in range(len(messages))]
        probes = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        text = self._find(probes)
        dropped = None
        for index, (role, content) in enumerate(zip(roles, contents, strict=True)):
            if text is not None and content not in text:
                dropped = f"message {index} of the prompt, which has the role {role!r}"
                break
        if is_plain:
            self._turns[roles] = dropped
        return dropped

    def _find_closing(self) -> tuple[str | None, str]:
        """The text after an answer, alone and before a user's turn."""
        user = _turn("user", "a")
        ends: set[str] = set()
        for answer in _ANSWERS:
            whole = self._find([user, _turn("assistant", answer)], is_whole=True) or ""
            if answer not in whole:
                return None, ""
            ends.add(whole.rpartition(answer)[2])
        if len(ends) > 1:
            return None, ""
        turns = [user, _turn("assistant", _ANSWERS[0]), _turn("user", _PROBE)]
        text = self._find(turns, is_whole=True) or ""
        following = text.rpartition(_ANSWERS[0])[2].partition(_PROBE)[0] if _ANSWERS[0] in text else ""
        return ends.pop(), following

    def _find_thoughts(self) -> Thoughts | None:
        """How thoughts are written, from a turn that has some; else from the generation prompt."""
        user = _turn("user", "a")
        prompt = self._find([user])
        plain = self._find([user, _turn("assistant", _ANSWERS[0])], is_whole=True)
        if prompt is None or plain is None or _ANSWERS[0] not in plain:
            return None
        for field in THOUGHT_FIELDS:
            turn = {**_turn("assistant", _ANSWERS[0]), field: _PROBE}
            text = self._find([user, turn], is_whole=True) or ""
            found = _read_thoughts(text, prompt)
            if found is not None:
                return found
        # The template leaves out thoughts of earlier turns. Its generation prompt, or an answer without, may hold tags.
        before = plain.rpartition(_ANSWERS[0])[0]
        start = _shared(prompt, before)
        for rest in (prompt[len(start) :], before[len(start) :]):
            words = rest.split()
            if words and re.fullmatch(r"<\w+>|\[\w+\]", words[0]) and len(words) <= 2:
                tag = words[0]
                lead, opening = rest[: rest.index(tag)], rest[rest.index(tag) :].partition(f"{tag[0]}/")[0]
                return Thoughts(lead, opening, f"{tag[0]}/{tag[1:]}")
        return None

    def _find(self, messages: Messages, *, is_whole: bool = False, **changed: Any) -> str | None:
        """The text of a probe, or None if the template refuses it."""
        try:
            return self._apply(messages, is_whole=is_whole, **changed)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template of {self._role} is not valid Jinja ({error}). Fix it, or pass another by "
                "cdr_chat_template."
            ) from None
        except _TEMPLATE_ERRORS:
            return None

    def _apply(self, messages: Messages, *, is_whole: bool = False, today: date | None = None, **changed: Any) -> str:
        """`is_whole`: the last turn is closed, as in training data; else it is left open for the completion."""
        continues = not is_whole and messages[-1].get("role") == "assistant"
        today = today or self.today
        rendered = self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=self.text if today is None else _with_date(self.text, today),
            add_generation_prompt=not is_whole and not continues,
            continue_final_message=continues,
            tools=self.tools,
            **{**self.variables, **changed},
        )
        return str(rendered)


@lru_cache(maxsize=8)
def _with_date(template: str, today: date) -> str:
    """
    A template that reads a given date in place of the clock's.

    transformers gives templates a function `strftime_now`. A macro of that name takes its place.
    """
    if "strftime_now" not in template:
        return template
    filters = [f"|replace({json.dumps('%' + name)}, {json.dumps(today.strftime('%' + name))})" for name in _DIRECTIVES]
    body = "|replace('%%', '\ufdd0')" + "".join(filters) + "|replace('\ufdd0', '%')"
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{body} }}}}{{%- endmacro %}}\n{template}"


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _shared(first: str, second: str) -> str:
    """The longest text that both start with."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]


def _split_space(text: str) -> tuple[str, str]:
    """White space at the start of a text, and the rest."""
    rest = text.lstrip()
    return text[: len(text) - len(rest)], rest


def _read_thoughts(text: str, prompt: str) -> Thoughts | None:
    """How thoughts are written, from a whole conversation with the probe as thoughts before the first answer."""
    before, is_there, after = text.partition(_PROBE)
    between, is_answered, _ = after.partition(_ANSWERS[0])
    close = between.strip()
    if not is_there or not is_answered or not close:
        return None
    start = len(_shared(prompt, before))
    if before[start:].strip():
        lead, _ = _split_space(before[start:])
        return Thoughts(lead, before[start + len(lead) :], close)
    word = re.search(r"\S+\s*$", before)
    return None if word is None else Thoughts("", word[0], close)


def _guard_thoughts(text: str, thoughts: Thoughts, guard: Callable[[str], str]) -> str:
    """Guard thoughts and answer, not the text that the template writes between them."""
    inside, close, answer = text.partition(thoughts.close)
    return guard(inside) + close + guard(answer)
