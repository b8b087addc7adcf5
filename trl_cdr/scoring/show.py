"""One prompt and completion as each model of the pair reads them, with token counts and score, for people.

`read_row` asks a scorer and returns a record, `print_row` prints it. `encoding` renders and tokenizes.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..conditioning.criteria import Conditioning
from .completions import CompletionReader
from .encoding import Encoder, Parts, fit
from .pair import Member
from .score import Score
from .scorer import DensityRatioScorer
from .tokenization import OffsetTokenizer
from .types import Completion, Message, Prompt, Row, Unscorable

_STYLES = {
    "not read": "strike red",
    "conditioning": "cyan",
    "prompt": "",
    "inserted": "yellow",
    "completion": "green",
    "end": "magenta",
}
_INDENT = 15
_BAR = 20  # length of the longest bar, in characters


@dataclass
class ShowArguments:
    """The row that `trl-cdr show` prints."""

    prompt: str = field(metadata={"help": "The prompt: a string, or a JSON list of messages with role and content."})
    completion: str = field(metadata={"help": "The completion: a string."})
    domain: str | None = field(
        default=None, metadata={"help": "Domain of the prompt, for cdr_criteria. It replaces the router's."}
    )
    cut_off: bool = field(
        default=False, metadata={"help": "The policy did not end its turn: no end of turn is scored."}
    )
    generated: bool = field(
        default=False,
        metadata={
            "help": "A model wrote the completion right after the generation prompt: the chat template inserts no text "
            "before it. Default: the completion is an answer of a data set."
        },
    )


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """
    Tokens of a row, part by part. A token that lies in two parts belongs to the second.

    Attributes:
        prompt (`int`): The prompt, up to and including the generation prompt, with BOS and with the conditioning.
        conditioning (`int`): The criteria's text within the prompt. Approximate if that text spells control tokens.
        inserted (`int`): Text that the template puts between the generation prompt and the answer.
        completion (`int`): The completion, without its end.
        end (`int`): The end of the turn.
        lost (`int`): Tokens that the prompt lost on its left. They are in no other count.
    """

    prompt: int
    conditioning: int
    inserted: int
    completion: int
    end: int
    lost: int = 0

    @property
    def total(self) -> int:
        """Tokens that the model reads or predicts: the length of the row."""
        return self.prompt + self.inserted + self.completion + self.end


@dataclass(frozen=True, slots=True)
class ShownModel:
    """
    A row as one model reads it.

    Attributes:
        name (`str`): The model.
        parts (`tuple[tuple[str, str], ...]`): Pairs of a part's name (a key of `_STYLES`) and its text, in the order of
            the text. The model does not read `"not read"`: the row was too long.
        counts (`TokenCounts` or `None`): Token counts; `None` if the model can't read the row.
        ids (`tuple[int, ...]`): The row's token ids; empty if the model can't read the row.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    counts: TokenCounts | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ShownRow:
    """
    A row as both models read it, and its score.

    Attributes:
        strong, weak (`ShownModel`): The row as each model reads it.
        score (`Score`): The score, or the reason why there is none.
        tokens (`tuple[tuple[str, float], ...]`): Text and log-ratio (nats) of each completion token, in order; empty if
            log-ratios do not exist per token. A token that ends within a character has no text.
        gate (`str`): `cdr_gate`.
        reduction (`str`): `cdr_reduction`.
    """

    strong: ShownModel
    weak: ShownModel
    score: Score
    tokens: tuple[tuple[str, float], ...]
    gate: str
    reduction: str


def parse_prompt(text: Any) -> Prompt:
    """Return the messages if a text is a JSON list of messages, else the text itself."""
    if isinstance(text, str) and text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        if value and all(isinstance(message, dict) and "role" in message for message in value):
            return value  # type: ignore[no-any-return]
    return text  # type: ignore[no-any-return]


def read_row(
    scorer: DensityRatioScorer,
    prompt: Prompt,
    completion: str | Sequence[Message],
    *,
    domain: str | None = None,
    finished: bool | None = True,
    is_generated: bool = False,
) -> ShownRow:
    """Score one completion and return it as both models read it. Arguments are those of `DensityRatioScorer.show`."""
    options: dict[str, Any] = {"finished": [finished], "is_generated": [is_generated]}
    with scorer.use() as pair:
        [score] = scorer.score([prompt], [completion], domains=None if domain is None else [domain], **options)
        [given] = scorer.read_prompts([prompt], [completion])
        conditioned, conditioning = given, None
        if scorer.criteria is not None and score.domain is not None:  # otherwise nothing is put before the prompt
            [known], [conditioning] = scorer.condition([given], [score.domain])
            conditioned = given if isinstance(known, Unscorable) else known
        [read] = CompletionReader(pair).read([completion], None, **options)
        strong, weak = (_read_model(member, conditioned, read, conditioning) for member in (pair.strong, pair.weak))
        tokens: tuple[tuple[str, float], ...] = ()
        if score.per_token is not None:
            start = len(strong.ids) - len(score.per_token)
            texts = token_texts(pair.strong.encoder.tokenizer, strong.ids, start)
            tokens = tuple(zip(texts, score.per_token.tolist(), strict=True))
    return ShownRow(strong, weak, score, tokens, scorer.config.cdr_gate, scorer.config.cdr_reduction)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> list[str]:
    """
    Return the text of each token from a position on. Together they are the text that these tokens decode to.

    Args:
        tokenizer: Decodes.
        ids (`Sequence[int]`): All tokens: the first tokens of a text may decode differently.
        start (`int`): Position of the first token of interest.

    Returns:
        `list[str]`: A token that ends within a character has an empty text. The token that ends it has all of it.
    """

    def decode(first: int, last: int) -> str:
        part = list(ids[first:last])
        return str(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts = []
    before, first = max(0, start - 4), start
    for index in range(start, len(ids)):
        known, text = decode(before, first), decode(before, index + 1)
        is_whole = len(text) > len(known) and (not text.endswith("\ufffd") or index == len(ids) - 1)
        texts.append(text[len(known) :] if is_whole else "")
        if is_whole:
            before, first = first, index + 1
    return texts


def _read_model(
    member: Member, prompt: Prompt, completion: Completion | Unscorable, conditioning: Conditioning | None
) -> ShownModel:
    """Return the row as one model reads it, or as much of its text as can be rendered."""
    name, encoder = str(member.lm.name), member.encoder
    parts = _read_parts(encoder, prompt, completion)
    if parts is None:
        return ShownModel(name, ())
    spans = _find_conditioning(parts.prompt, conditioning)
    try:
        if isinstance(completion, Unscorable):
            raise completion
        whole = encoder.encode(prompt, completion)
        row = fit(whole, member.max_length)
        member.check(row)
    except Unscorable:
        return ShownModel(name, _name_parts(parts, spans))
    counter = _Counter(encoder.offsets, parts)
    counts = replace(counter.count(row, spans), lost=len(whole.ids) - len(row.ids))
    return ShownModel(name, _name_parts(parts, spans, counter.find_start(row)), counts, row.ids)


def _read_parts(encoder: Encoder, prompt: Prompt, completion: Completion | Unscorable) -> Parts | None:
    """Return the row's parts, or the prompt's alone, or `None` if the prompt can't be rendered."""
    unread = Completion("", None)
    for known in (unread,) if isinstance(completion, Unscorable) else (completion, unread):
        try:
            return encoder.parts(prompt, known)
        except Unscorable:
            continue
    return None


class _Counter:
    """Counts the tokens of a row's parts, by the rules of `OffsetTokenizer`."""

    def __init__(self, offsets: OffsetTokenizer, parts: Parts) -> None:
        self._offsets, self._parts = offsets, parts
        self._text = parts.prompt + parts.inserted + parts.completion + parts.end
        self._boundary = len(parts.prompt + parts.inserted)

    def count(self, row: Row, spans: Sequence[tuple[int, int]]) -> TokenCounts:
        """Return the token counts. Prompt and completion are what the other parts leave of the row."""
        kept, written = len(row.prompt_ids), len(row.completion_ids)
        inserted = min(self._between(len(self._parts.prompt)), kept) if self._parts.inserted else 0
        end_start = self._boundary + len(self._parts.completion)
        end = min(self._before(len(self._text)) - self._before(end_start), written) if self._parts.end else 0
        conditioning = sum(min(self._between(start), kept) - min(self._between(stop), kept) for start, stop in spans)
        return TokenCounts(kept - inserted, conditioning, inserted, written - end, end)

    def find_start(self, row: Row) -> int:
        """Return the position in the text of the first character that the model reads."""
        if not row.truncated:
            return 0
        lost = self._before(self._boundary) - len(row.prompt_ids)
        return bisect_left(range(self._boundary), lost, key=self._before)

    def _before(self, position: int) -> int:
        """Return the number of tokens that end before a position of the text."""
        return self._offsets.tokenize(self._text[:position], self._text[position:]).num_before

    def _between(self, position: int) -> int:
        """Return the number of tokens from a position of the text to the completion."""
        return self._before(self._boundary) - self._before(position)


def _find_conditioning(text: str, conditioning: Conditioning | None) -> list[tuple[int, int]]:
    """Return the spans (start, stop) of a prompt's text that the criteria wrote. A text that is not found has none."""
    if conditioning is None:
        return []
    written = [conditioning.text]
    if conditioning.style == "turns":
        written += [turn for exemplar in conditioning.exemplars for turn in (exemplar.prompt, exemplar.chosen)]
    spans = []
    position = 0
    for piece in filter(None, map(str.strip, written)):
        found = re.compile(rf"(?<!\w){re.escape(piece)}(?!\w)").search(text, position)
        if found is not None:
            spans.append(found.span())
            position = found.end()
    return spans


def _name_parts(parts: Parts, spans: Sequence[tuple[int, int]] = (), start: int = 0) -> tuple[tuple[str, str], ...]:
    """Return the parts that have text, each with its name. `start`: the first character that the model reads."""
    text = parts.prompt
    start = min(start, len(text))
    named = []
    for first, last in pairwise(sorted({0, start, len(text), *(edge for span in spans for edge in span)})):
        is_criteria = any(low <= first and last <= high for low, high in spans)
        name = "not read" if last <= start else "conditioning" if is_criteria else "prompt"
        named.append((name, text[first:last]))
    named += [("inserted", parts.inserted), ("completion", parts.completion), ("end", parts.end)]
    return tuple((name, text) for name, text in named if text)


def print_row(row: ShownRow, console: Console) -> None:
    """Print a record of `read_row`: parts in colours if the console has some, else each with its name before it."""
    is_colored = console.is_terminal and console.color_system is not None and not console.no_color
    if is_colored:
        legend = Text()
        for name, style in _STYLES.items():
            legend.append(name, style).append("  ")
        _print(console, legend, Text())
    for role, model in (("strong", row.strong), ("weak", row.weak)):
        _print(console, Text(f"{role}: {model.name}", "bold"))
        _print(console, *([_color_parts(model.parts)] if is_colored else _mark_parts(model.parts)))
        if not model.parts:
            _print(console, Text("The chat template can't write this row."))
        logps = row.score.strong_logps if role == "strong" else row.score.weak_logps
        _print(console, Text(_describe_counts(model.counts)))
        if logps is not None:
            _print(console, Text(f"log-probability of completion and end: {logps:.4f} nats"))
        _print(console, Text())
    _print_score(row, console)


def _print_score(row: ShownRow, console: Console) -> None:
    """Print the score, and the table of its tokens."""
    score = row.score
    if score.error is not None:
        _print(console, Text(f"This row can't be scored: {score.error}"))
        return
    unit = "nats a token" if row.reduction == "mean" else "nats"
    _print(console, Text(f"log-ratio (strong - weak): {score.value:+.4f} {unit}, over {score.n_tokens} tokens"))
    measures = ((name, getattr(score, name)) for name in ("surprise", "survival", "typicality"))
    found = ", ".join(f"{name} {value:.4f}" for name, value in measures if value is not None)
    gate = f"{row.gate} ({found})" if found else row.gate
    _print(console, Text(f"gate: {gate}, gated: {'yes' if score.gated else 'no'}"))
    if score.domain is not None:
        _print(console, Text(f"domain: {score.domain}"))
    if not row.tokens:
        _print(console, Text("The models read different tokens: log-ratios do not exist for each token."))
        return
    table = Table(box=None, pad_edge=False, title="log-ratio of each token, nats", title_justify="left")
    table.add_column("token", overflow="fold")
    table.add_column("log-ratio", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR)
    largest = max(abs(ratio) for _, ratio in row.tokens) or 1.0
    for text, ratio in row.tokens:
        token = _make_visible(text, one_line=True) if text else Text("(part of a character)", "dim")
        bar = ("+" if ratio > 0 else "-") * round(_BAR * abs(ratio) / largest)
        table.add_row(token, Text(f"{ratio:+.4f}"), Text(bar, "green" if ratio > 0 else "red"))
    console.print(Text())
    console.print(table)


def _describe_counts(counts: TokenCounts | None) -> str:
    """Return the line with a model's token counts."""
    if counts is None:
        return "tokens: not counted, because the row can't be scored"
    lost = f"yes, {counts.lost} tokens lost on its left" if counts.lost else "no"
    return (
        f"tokens: prompt {counts.prompt} (conditioning {counts.conditioning}), inserted {counts.inserted}, completion "
        f"{counts.completion}, end {counts.end}, total {counts.total}\nprompt truncated: {lost}"
    )


def _color_parts(parts: Sequence[tuple[str, str]]) -> Text:
    """Return all parts as one text, in colours."""
    return Text().join(_make_visible(text, _STYLES[name]) for name, text in parts)


def _mark_parts(parts: Sequence[tuple[str, str]]) -> list[Text]:
    """Return each part with its name in a column of its own, so that no text can look like a name."""
    lines = []
    for name, text in parts:
        label = f"[{name}]"
        for line in _make_visible(text).split("\n"):
            lines.append(Text(f"{label:{_INDENT}}") + line)
            label = ""
    return lines


def _make_visible(text: str, style: str = "", *, one_line: bool = False) -> Text:
    """Return a text with marks for line breaks and for spaces at the end of lines; other control characters escaped."""
    mark = f"dim {style}".strip()
    spaces = " +" if one_line else r" +(?=\n|\Z)"
    result = Text()
    for piece in re.split(rf"({spaces}|\n)", text):
        if piece == "\n":
            result.append("↵" if one_line else "↵\n", mark)
        elif re.fullmatch(spaces, piece):
            result.append("·" * len(piece), mark)
        else:
            for is_printable, run in groupby(piece, str.isprintable):
                text = "".join(run)
                shown = text if is_printable else text.encode("unicode_escape").decode("ascii")
                result.append(shown, style if is_printable else mark)
    return result


def _print(console: Console, *lines: Text) -> None:
    """Print lines as they are: never cut, wrapped or read as markup."""
    for line in lines:
        console.print(line, soft_wrap=True)
