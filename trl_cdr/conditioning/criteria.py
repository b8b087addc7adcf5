"""Criteria and preference exemplars of each domain: load, check, draw, and render into a prompt.

Knows no model and no token: what comes out is a prompt as any other, which `scoring.encoding` turns into ids. `router`
says which domain a prompt belongs to. The policy never sees any of this.
"""

import random
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Never

from ..errors import ConfigError, InputError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

DEFAULT = "default"
"""A domain of this name serves prompts whose own domain the criteria do not know."""

_PRESETS = resources.files(__package__) / "presets"
_REQUIRED = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One demonstration: a prompt, a better and a worse completion, and why."""

    prompt: str
    chosen: str
    rejected: str
    explanation: str = ""


@dataclass(frozen=True, slots=True)
class DomainCriteria:
    """What a good completion is in one domain, in words and by exemplars. Empty: the plain ratio."""

    instruction: str = ""
    exemplars: tuple[Exemplar, ...] = ()


@dataclass(frozen=True, slots=True)
class Conditioning:
    """
    What goes before each prompt of a domain, the same for both models and for every prompt.

    Args:
        instruction (`str`): Goes into the system turn, after a system prompt that is there.
        exemplars (`tuple[Exemplar, ...]`): The demonstrations in use.
        style (`str`): `"inline"` writes them below the instruction, good and bad completion and why; `"turns"` puts
            prompt and good completion as turns of their own before the conversation.
    """

    instruction: str
    exemplars: tuple[Exemplar, ...]
    style: str

    @property
    def is_empty(self) -> bool:
        """Nothing goes before the prompts: the plain ratio."""
        return not self.instruction and not self.exemplars

    def apply(self, prompt: Prompt) -> Prompt:
        """
        The conditioned prompt; the very same one where the conditioning is empty.

        A string prompt gets the text in front. A prompt that no template could read is left for encoding to refuse.

        Raises:
            InputError: the prompt is a string and exemplars are to be turns.
        """
        if self.is_empty:
            return prompt
        text = self.text
        if isinstance(prompt, str):
            if self.style == "turns" and self.exemplars:
                raise InputError(
                    "a prompt is a string, and cdr_exemplar_style='turns' needs conversations. Use 'inline', or pass "
                    "prompts as lists of messages."
                )
            return f"{text}\n\n{prompt}" if text else prompt
        if not isinstance(prompt, Sequence) or not prompt or not isinstance(prompt[0], Mapping):
            return prompt
        turns: list[Message] = []
        if self.style == "turns":
            for exemplar in self.exemplars:
                turns.append({"role": "user", "content": exemplar.prompt})
                turns.append({"role": "assistant", "content": exemplar.chosen})
        system: list[Message] = [prompt[0]] if prompt[0].get("role") == "system" else []
        rest = prompt[len(system) :]
        if text:
            system = [_extend(system[0], text) if system else {"role": "system", "content": text}]
        return [*system, *turns, *rest]

    @property
    def text(self) -> str:
        """What goes into the system turn."""
        parts = [self.instruction]
        if self.style == "inline":
            for exemplar in self.exemplars:
                lines = [
                    "Example",
                    f"Prompt: {exemplar.prompt}",
                    f"Good: {exemplar.chosen}",
                    f"Bad: {exemplar.rejected}",
                ]
                if exemplar.explanation:
                    lines.append(f"Why: {exemplar.explanation}")
                parts.append("\n".join(lines))
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Criteria:
    """
    Each domain's criteria.

    Args:
        domains (`Mapping[str, DomainCriteria]`): By name. `default`, where there is one, serves unknown domains.

    Raises:
        ConfigError: there is no domain, or an entry is of the wrong kind.

    Example:

    ```python
    criteria = Criteria.load("safety+reasoning") | Criteria({"chat": DomainCriteria()})
    reward = CDRReward(strong=strong, weak=weak, criteria=criteria, router="column:domain")
    ```
    """

    domains: Mapping[str, DomainCriteria]
    _source: str = field(default="criteria", repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.domains:
            raise ConfigError(f"{self._source} has no domain. Define at least one; it may be empty.")
        for name, domain in self.domains.items():
            if not (isinstance(name, str) and name.strip()) or not isinstance(domain, DomainCriteria):
                raise ConfigError(f"criteria[{name!r}] is {domain!r}: map a domain's name to its DomainCriteria.")
        object.__setattr__(self, "domains", MappingProxyType(dict(self.domains)))

    def __reduce__(self) -> tuple[Any, ...]:  # a read-only view can't be pickled
        return type(self), (dict(self.domains), self._source)

    def __or__(self, other: "Criteria") -> "Criteria":
        """The domains of both."""
        twice = sorted(self.domains.keys() & other.domains.keys())
        if twice:
            raise ConfigError(
                f"the domain {twice[0]!r} is defined twice, by {self._source} and by {other._source}. Rename one."
            )
        return Criteria({**self.domains, **other.domains}, f"{self._source}+{other._source}")

    @property
    def digest(self) -> str:
        """A hash of all that is said, the same in every process."""
        return sha256(repr(dict(self.domains)).encode()).hexdigest()

    @classmethod
    def load(cls, source: str) -> "Criteria":
        """
        Read criteria.

        Args:
            source (`str`): The path of a TOML file, a preset's name, or several of these joined by `+`.

        Raises:
            ConfigError: there is no such file or preset, a domain is defined twice, or a file breaks the rules; the
                message names the line.
        """
        parts = [source] if Path(source).is_file() else [part.strip() for part in source.split("+")]
        first, *rest = (cls._load_one(part) for part in parts)
        for other in rest:
            first = first | other
        return first

    @classmethod
    def _load_one(cls, source: str) -> "Criteria":
        presets = sorted(path.name.removesuffix(".toml") for path in _PRESETS.iterdir())
        if source in presets:
            return cls.from_toml((_PRESETS / f"{source}.toml").read_text(encoding="utf-8"), name=source)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cdr_criteria is {source!r}, which is no preset and can't be read as a file ({error}). Give the path "
                f"of a UTF-8 TOML file or one of the presets: {', '.join(presets)}."
            ) from None
        return cls.from_toml(text, name=source)

    @classmethod
    def from_toml(cls, text: str, *, name: str = "criteria") -> "Criteria":
        """
        Read the text of a TOML file: one table for each domain, with `instruction` and `exemplars`, both optional.

        Args:
            text (`str`): The file's content.
            name (`str`): What errors call it.

        Raises:
            ConfigError: it is no TOML, or a key, a type or a value is not allowed; the message names the line.
        """
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{name} is no valid TOML: {error}. Mend that line.") from None

        def fail(path: Sequence[str | int], message: str) -> Never:
            raise ConfigError(f"{name}, line {_find_line(text, path)}: {message}")

        return cls({domain: _read_domain(domain, table, fail) for domain, table in tables.items()}, name)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        domain: str = DEFAULT,
        domain_column: str | None = None,
        num_exemplars: int = 2,
        seed: int = 0,
        max_characters: int = 1500,
    ) -> "Criteria":
        """
        Draw exemplars from a preference data set, the same for the same seed in every process.

        Args:
            dataset (`datasets.Dataset` or a sequence of mappings): TRL's preference format, strings or conversations,
                with or without a prompt column. Conversations of more than one turn are passed over.
            domain (`str`, *optional*, defaults to `"default"`): The domain that the exemplars are for.
            domain_column (`str`, *optional*): The column that names each row's domain, in place of `domain`.
            num_exemplars (`int`, *optional*, defaults to 2): Exemplars of each domain.
            seed (`int`, *optional*, defaults to 0): Which ones.
            max_characters (`int`, *optional*, defaults to 1500): Rows whose three texts are longer together are passed
                over: every exemplar is read by both models.

        Raises:
            ConfigError: a domain has too few rows that can serve.
            InputError: a row lacks a column, or its domain is no name.

        Example:

        ```python
        criteria = Criteria.from_dataset(load_dataset("trl-lib/ultrafeedback_binarized", split="train"))
        ```
        """
        members: dict[str, list[int]] = {}
        if domain_column is None:
            members[domain] = list(range(len(dataset)))
        else:
            for index in range(len(dataset)):
                name = _field(dataset[index], domain_column)
                if not isinstance(name, str):
                    raise InputError(
                        f"row {index} has {domain_column}={name!r} ({type(name).__name__}), and a domain is a name. "
                        "Mend the column, or pass another as domain_column."
                    )
                members.setdefault(name, []).append(index)
        domains = {}
        for name, indices in members.items():
            random.Random(f"{name} {seed}").shuffle(indices)
            found: list[Exemplar] = []
            for index in indices:
                if len(found) == num_exemplars:
                    break
                exemplar = _read_pair(dataset[index])
                if exemplar is not None and _length(exemplar) <= max_characters and exemplar not in found:
                    found.append(exemplar)
            if len(found) < num_exemplars:
                raise ConfigError(
                    f"num_exemplars is {num_exemplars}, and {len(found)} of the {len(indices)} rows of the domain "
                    f"{name!r} can serve: single-turn pairs whose texts have at most {max_characters} characters. "
                    "Ask for fewer, or raise max_characters."
                )
            domains[name] = DomainCriteria(exemplars=tuple(found))
        return cls(domains, "the data set")

    def resolve(self, domain: str) -> str:
        """
        The domain whose criteria serve a prompt of this domain: itself, or `default`.

        Raises:
            InputError: the criteria know neither.
        """
        if domain in self.domains:
            return domain
        if DEFAULT in self.domains:
            return DEFAULT
        raise InputError(
            f"the domain {domain!r} is not among the criteria's: {', '.join(self.domains)}. Name one of these, or "
            f"define the domain {DEFAULT!r}, which serves all others."
        )

    def conditioning(self, domain: str, *, num_exemplars: int, style: str, seed: int) -> Conditioning:
        """
        What goes before the prompts of a domain.

        Args:
            domain (`str`): One of `domains`.
            num_exemplars (`int`): Exemplars in use; where the domain has more, its name and the seed alone say which.
            style (`str`): `"inline"` or `"turns"`.
            seed (`int`): See `num_exemplars`.
        """
        criteria = self.domains[domain]
        count = min(num_exemplars, len(criteria.exemplars))
        chosen = sorted(random.Random(f"{domain} {seed}").sample(range(len(criteria.exemplars)), count))
        return Conditioning(criteria.instruction, tuple(criteria.exemplars[index] for index in chosen), style)


def _extend(message: Message, text: str) -> Message:
    """A system message with more text behind its own, be that a string or a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": f"{content}\n\n{text}" if content else text}
    if isinstance(content, Sequence):
        return {**message, "content": [*content, {"type": "text", "text": f"\n\n{text}"}]}
    return message  # encoding says what is wrong with it


def _read_domain(domain: str, table: Any, fail: Callable[[Sequence[str | int], str], Never]) -> DomainCriteria:
    if not isinstance(table, dict):
        fail([domain], f"{domain} is {table!r}. Only domains stand at the top level, as tables: [{domain}].")
    _check_keys(table, {item.name for item in fields(DomainCriteria)}, [domain], fail)
    instruction = table.get("instruction", "")
    if not isinstance(instruction, str):
        fail([domain, "instruction"], f"instruction is {instruction!r}. It takes a string.")
    listed = table.get("exemplars", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        fail([domain, "exemplars"], f"exemplars is {listed!r}. Write each one below a [[{domain}.exemplars]].")
    exemplars = []
    for index, entry in enumerate(listed):
        place: list[str | int] = [domain, "exemplars", index]
        _check_keys(entry, {item.name for item in fields(Exemplar)}, place, fail)
        for key in _REQUIRED:
            if key not in entry:
                fail(place, f"the exemplar has no {key!r}. It needs prompt, chosen and rejected.")
        for key, value in entry.items():
            if not isinstance(value, str) or (key in _REQUIRED and not value.strip()):
                fail([*place, key], f"{key} is {value!r}. It takes a string with some text.")
        exemplars.append(Exemplar(**{key: value.strip() for key, value in entry.items()}))
    return DomainCriteria(instruction.strip(), tuple(exemplars))


def _check_keys(
    table: Mapping[str, Any], known: Iterable[str], path: Sequence[str | int], fail: Callable[..., Never]
) -> None:
    for key in table:
        if key not in known:
            fail([*path, key], f"unknown key {key!r}. Known keys: {', '.join(sorted(known))}.")


def _find_line(text: str, path: Sequence[str | int]) -> int:
    """
    The line on which a value of a valid TOML text starts.

    It is in the first prefix of lines that parses and holds the value, after the longest shorter one that parses.
    """
    lines = text.splitlines()
    parsed = 0
    for count in range(1, len(lines) + 1):
        try:
            value: Any = tomllib.loads("\n".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue  # within a text or a list of several lines
        try:
            for step in path:
                value = value[step]
        except (KeyError, IndexError):
            parsed = count
            continue
        return parsed + 1
    raise AssertionError(path)


def _read_pair(row: Mapping[str, Any]) -> Exemplar | None:
    """A row of a preference data set as an exemplar; None where it is no single turn, or its two texts are equal."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    prompt = row.get("prompt")
    if prompt is None and not isinstance(chosen, str):
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    texts = [_only_text(part) for part in (prompt, chosen, rejected)]
    if not all(texts) or texts[1] == texts[2]:
        return None
    return Exemplar(*(str(text) for text in texts))


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise InputError(f"the data set has no column {name!r}, only: {', '.join(row)}. Add it, or name another.")
    return row[name]


def _only_text(part: Any) -> str | None:
    """The text of a string or of a conversation with a single message of text."""
    if not isinstance(part, str):
        if not part or len(part) != 1:
            return None
        part = part[0].get("content")
    return part.strip() if isinstance(part, str) else None


def _length(exemplar: Exemplar) -> int:
    return len(exemplar.prompt) + len(exemplar.chosen) + len(exemplar.rejected)
