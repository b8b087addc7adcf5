"""Render a conversation with a chat template, and place an answer in the text that the template writes around answers.

Knows no token id and no boundary in tokens: `encoding` tokenizes. Everything here is learnt from the template's own
output for short conversations, so that it holds for new templates too:

    [user]                          ...<|im_start|>assistant\\n                              the generation prompt
    [user, answer]                  ...<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n4<|im_end|>\\n
                                                               '---- inserted ----'  '-- closing --'
    [user, answer with thoughts]    ...<|im_start|>assistant\\n<think>\\nhm\\n</think>\\n\\n4<|im_end|>\\n
                                                               opening '      ' close
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .thoughts import (
    Frame,
    Placed,
    Thoughts,
    guard_thoughts,
    guess_thoughts,
    place_own_thoughts,
    read_thoughts,
    shared_start,
    split_space,
)
from .types import Unscorable

_PROBE = "trl-cdr probe"
_ANSWERS = ("trl-cdr answer", "an other answer of trl-cdr")
# Directives of `strftime`. The time of day is midnight.
_DIRECTIVES = ("-d", "-m", "-j", "-H", "-I", "-M", "-S", *"aAwdbBmyYHIpMSjUWcxXGuVeDFTRPkfzZnthCgl")
_DAYS = (date(2001, 1, 1), date(2022, 12, 25))
_STRIPS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.lstrip("\n"),
    lambda text: text.strip("\n"),
    lambda text: text.rstrip("\n"),
)
# Fields in which templates look for the thoughts of an assistant's turn.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
# Errors of a template on messages that it does not take: its own refusals, and Python's on missing fields.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)

Messages = Sequence[Mapping[str, Any]]


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
        self._dropped: dict[tuple[str, ...], str | None] = {}
        self._last: tuple[list[dict[str, Any]], Frame] | None = None
        user, system = _turn("user", _PROBE), _turn("system", _PROBE)
        self.has_system_role = _PROBE in (self._find([system, _turn("user", "a")]) or "")
        shown = self._find([user])
        self.drops_users = shown is not None and _PROBE not in shown
        self.writes_date = any(
            len({self._find(turns, today=day) for day in _DAYS}) > 1
            for turns in ([user], [system, user], [user, _turn("assistant", "a"), user])
        )
        self.closing, self.next_turn = self._find_closing()
        self.thoughts = self._find_thoughts()
        self._strip = self._find_strip()
        # The frame of a short conversation. It is used for conversations in which the parts can't be found.
        self._usual = Frame("", "", "")
        if shown is not None and not self.drops_users:
            self._usual = self._frame([user])
        self._last = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """Everything on which the text depends, beside the tokenizer's special tokens."""
        return self.text, self.variables, self.tools, self.today if self.writes_date else None

    @property
    def opens_thought(self) -> bool:
        """The generation prompt ends inside a thought."""
        return self._is_open(self._usual.prompt)

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
                "may be a template for images, or misspell content. Pass another template by cdr_chat_template."
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
            guard (`Callable`): Applied to text that the policy wrote.

        Raises:
            Unscorable: the template refuses the conversation.
        """
        frame = self._frame(messages)
        if is_generated or messages[-1]["role"] == "assistant":
            return Placed(frame.prompt, frame.prompt, guard(answer))
        thoughts = self.thoughts
        if thoughts is None:
            return self._place_plain(frame, answer, finished, guard)
        has_close = thoughts.close in answer
        is_cut = finished is False
        if answer.lstrip().startswith(thoughts.tag) and (has_close or is_cut):
            return place_own_thoughts(frame, thoughts, answer.lstrip(), guard)
        is_open = self._is_open(frame.prompt)
        if (is_open and (has_close or is_cut)) or (has_close and not self._writes(messages, frame, answer)):
            opened = frame.prompt if is_open else frame.header + thoughts.lead + thoughts.opening
            return Placed(frame.prompt, opened, guard_thoughts(answer, thoughts, guard))
        return self._place_plain(frame, answer, finished, guard)

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

    def _place_plain(self, frame: Frame, answer: str, finished: bool | None, guard: Callable[[str], str]) -> Placed:
        """An answer without thoughts. If it repeats the text that the template inserts, it is used as written."""
        space, inserted = split_space(frame.inserted)
        if inserted.strip() and answer.lstrip().startswith(inserted.strip()):
            written = answer.lstrip().removeprefix(inserted.strip())
            return Placed(frame.prompt, frame.header + space, inserted.strip() + guard(written))
        if finished is not False:  # a cut answer goes on: the white space at its end is part of it
            answer = self._strip(answer)
        return Placed(frame.prompt, frame.header + frame.inserted, guard(answer))

    def _is_open(self, prompt: str) -> bool:
        """Return True if a text ends with the opening of thoughts."""
        return self.thoughts is not None and prompt.rstrip().endswith(self.thoughts.tag)

    def _writes(self, messages: Messages, frame: Frame, answer: str) -> bool:
        """Return True if the template writes an answer as it is, after the text that it inserts before any answer."""
        whole = self._find([*messages, _turn("assistant", answer)], is_whole=True) or ""
        return answer in whole and whole.rpartition(answer)[0].endswith(frame.inserted)

    def _frame(self, messages: list[dict[str, Any]]) -> Frame:
        if self._last is not None and self._last[0] == messages:  # completions of one prompt follow one another
            return self._last[1]
        prompt = self.render(messages)
        frame = Frame(prompt, prompt, "")
        if self.closing is not None and messages[-1]["role"] != "assistant":
            whole = self._find([*messages, _turn("assistant", _ANSWERS[0])], is_whole=True) or ""
            before = whole.rpartition(_ANSWERS[0])[0]
            shared = shared_start(prompt, before)
            if self._holds_conversation(shared, prompt, str(messages[-1]["content"]).strip()):
                header = self._without_thoughts(shared)
                frame = Frame(prompt, header, before[len(header) :])
            else:  # with an answer the template writes the conversation in another way: the model reads `prompt`
                opened = self._usual.prompt[len(self._usual.header) :]
                frame = Frame(prompt, prompt.removesuffix(opened), self._usual.inserted)
        self._last = messages, frame
        return frame

    def _holds_conversation(self, shared: str, prompt: str, last: str) -> bool:
        """Return True if the start of a prompt goes beyond the last message's content."""
        position = prompt.rfind(last) if last else -1
        if position < 0:
            return len(shared) >= len(prompt) - len(self._usual.prompt.rpartition(_PROBE)[2])
        return len(shared) >= position + len(last)

    def _without_thoughts(self, text: str) -> str:
        """A text without an opening of thoughts, or empty thoughts, at its end."""
        if self.thoughts is None:
            return text
        block = rf"({re.escape(self.thoughts.tag)}\s*)?({re.escape(self.thoughts.close)}\s*)?$"
        bare = re.sub(block, "", text)
        return text if bare == text else bare.removesuffix(self.thoughts.lead)

    def _find_dropped(self, messages: list[dict[str, Any]]) -> str | None:
        """Name the first turn whose content does not reach the text, if there is one."""
        roles = tuple(message["role"] for message in messages)
        is_plain = all(message.keys() <= {"role", "content"} for message in messages)
        if is_plain and roles in self._dropped:
            return self._dropped[roles]
        marks = [f"{_PROBE} {index}." for index in range(len(messages))]
        rows = list(zip(messages, marks, strict=True))
        probes = [
            [{**message, "content": mark} for message, mark in rows],
            # Some templates take contents of a certain form only.
            [{**message, "content": f"{message['content']} {mark}"} for message, mark in rows],
        ]
        texts = [text for text in map(self._find, probes[:1]) if text is not None]
        if not all(mark in text for text in texts for mark in marks) or not texts:
            texts += [text for text in map(self._find, probes[1:]) if text is not None]
        dropped = None
        for index, (role, mark) in enumerate(zip(roles, marks, strict=True)):
            if texts and not any(mark in text for text in texts):
                dropped = f"message {index} of the prompt, which has the role {role!r}"
                break
        if is_plain:
            self._dropped[roles] = dropped
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

    def _find_strip(self) -> Callable[[str], str]:
        """Return the function that the template applies to the white space around an answer."""
        answer = f" \n{_ANSWERS[0]}\n "
        whole = self._find([_turn("user", "a"), _turn("assistant", answer)], is_whole=True) or ""
        plain = self._find([_turn("user", "a"), _turn("assistant", _ANSWERS[0])], is_whole=True) or ""
        before, _, after = plain.partition(_ANSWERS[0])
        for strip in _STRIPS:
            if whole == before + strip(answer) + after:
                return strip
        return str

    def _find_thoughts(self) -> Thoughts | None:
        """How thoughts are written: from a turn that has some, else from the text around a turn that has none."""
        user = _turn("user", "a")
        prompt = self._find([user])
        plain = self._find([user, _turn("assistant", _ANSWERS[0])], is_whole=True)
        if prompt is None or plain is None or _ANSWERS[0] not in plain:
            return None
        turns: list[dict[str, Any]] = [{**_turn("assistant", _ANSWERS[0]), field: _PROBE} for field in THOUGHT_FIELDS]
        parts = [{"type": "thinking", "thinking": _PROBE}, {"type": "text", "text": _ANSWERS[0]}]
        turns.append({"role": "assistant", "content": parts})
        for turn in turns:
            text = self._find([user, turn], is_whole=True) or ""
            is_listed = isinstance(turn["content"], list) and "type" in text.removeprefix(prompt)  # as Python writes it
            found = None if is_listed else read_thoughts(text, prompt, thought=_PROBE, answer=_ANSWERS[0])
            if found is not None:
                return found
        return guess_thoughts(prompt, plain.rpartition(_ANSWERS[0])[0])

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
