"""Prompt -> domain: a constant, a data set's column, a callable, or the strong model's likelihood of the labels.

Knows no model: for `likelihood` it is handed a function that scores labels. `criteria` says what a domain means.
"""

import importlib
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, InputError
from .criteria import Criteria, Prompt

COLUMN = "column:"
LIKELIHOOD = "likelihood"


# What a request is shown by is its start; more would cost more than it tells.
_SHOWN_CHARACTERS = 2000
_REMEMBERED = 100_000


@dataclass(frozen=True, slots=True)
class NoDomain:
    """A row that criteria can't be chosen for, and why: no row stops a call."""

    reason: str


# (texts, labels) -> for each text the mean log-probability of each label's tokens, nats, or why there is none
LabelScorer = Callable[[Sequence[str], Sequence[str]], Sequence[Sequence[float] | NoDomain]]

_UNREADABLE = NoDomain("its domain can't be told: no user's turn of the prompt can be read")


class Router:
    """
    Finds each prompt's domain.

    Args:
        criteria (`Criteria`): Its domains are those that there are.
        domain (`str`, *optional*): The domain of every prompt. Without it and without `router`, criteria with a single
            domain have no other choice.
        router (`str` or `Callable`, *optional*): `"column:NAME"`, `"likelihood"`, or a function from a prompt to the
            name of its domain, itself or as a dotted path.

    Raises:
        ConfigError: both are given, the domain is unknown, or the dotted path leads nowhere.
    """

    def __init__(self, criteria: Criteria, *, domain: str | None = None, router: Any = None) -> None:
        if domain is not None and router is not None:
            raise ConfigError(f"domain is {domain!r} and router is {router!r}: one of them decides. Leave one out.")
        self.domains = tuple(criteria.domains)
        self._criteria = criteria
        self._column: str | None = None
        self._constant: str | None = None
        self._callable: Callable[[Prompt], str] | None = None
        self._name = str(router)
        self._known: dict[str, str] = {}  # requests and their domains, as the model below found them
        self._model: weakref.ref[Any] | None = None
        if domain is not None:
            try:
                self._constant = criteria.resolve(domain)
            except InputError as error:
                raise ConfigError(f"cdr_domain: {error}") from None
        elif router is None:
            if len(criteria.domains) == 1:
                [self._constant] = criteria.domains
        elif isinstance(router, str) and router.startswith(COLUMN):
            self._column = router.removeprefix(COLUMN).strip()
            if not self._column:
                raise ConfigError(f"router is {router!r}, which names no column. Write column:NAME.")
        elif router != LIKELIHOOD:
            self._callable = import_callable(router) if isinstance(router, str) else router
            if not callable(self._callable):
                raise ConfigError(
                    f"router is {router!r}. Pass 'column:NAME', 'likelihood', a function or its dotted path."
                )
            self._name = getattr(self._callable, "__name__", self._name)
        self._by_likelihood = router == LIKELIHOOD

    @property
    def column(self) -> str | None:
        """The data set's column that names the domains, where the router reads one."""
        return self._column

    def read_column(self, columns: Mapping[str, Any]) -> Sequence[Any] | None:
        """
        What a data set's columns say of the domains, where the router reads a column; a value may be wrong.

        Raises:
            InputError: the column is not there.
        """
        if self._column is None:
            return None
        self.check_column(columns, where="the call")
        values: Sequence[Any] = columns[self._column]
        return values

    def check_column(self, columns: Iterable[str], values: Iterable[Any] = (), *, where: str) -> None:
        """
        Whether the router's column is among a data set's, and names domains.

        Args:
            columns (`Iterable[str]`): The data set's.
            values (`Iterable`): What is known to stand in the column. `None` is a row's matter.
            where (`str`): What an error calls the data set.

        Raises:
            InputError: the column is not there, or a value is no domain of the criteria. Never without a column.
        """
        if self._column is None:
            return
        names = list(columns)
        if self._column not in names:
            raise InputError(
                f"router is {COLUMN + self._column!r}, and {where} has only: {', '.join(names) or 'no columns'}. "
                "Add the column to the data set."
            )
        for value in values:
            found = None if value is None else self._resolve(value)
            if isinstance(found, NoDomain):
                raise InputError(f"router is {COLUMN + self._column!r}, and in {where} {found.reason}")

    @property
    def is_undecided(self) -> bool:
        """There are several domains and no rule: every call has to say which."""
        return (self._constant, self._column, self._callable) == (None, None, None) and not self._by_likelihood

    def route(
        self,
        prompts: Sequence[Prompt],
        domains: Sequence[Any] | None,
        score_labels: LabelScorer,
        find_model: Callable[[], Any] | None = None,
    ) -> list[str | NoDomain]:
        """
        The domain of each prompt.

        Args:
            prompts (`Sequence`): Strings or conversations.
            domains (`Sequence[str | None]`, *optional*): What the caller knows; it wins.
            score_labels (`LabelScorer`): Called for `likelihood` alone.
            find_model (`Callable`, *optional*): Returns the object that scores labels now. Answers are remembered until
                it returns another object. If it returns `None`, its weights may change, and no answer is remembered.
                Called for `likelihood` alone. Without it nothing is remembered.

        Returns:
            `list[str | NoDomain]`: One of the criteria's domains for each, or why there is none: a domain that the
            criteria do not know, a value that is no name, a prompt that can't be read or classified, or labels without
            a log-probability (NaN, or a classification prompt that is too long).

        Raises:
            InputError: nothing at all says what the domains are, or the router's function raised.
        """
        asked: list[Any] = [None] * len(prompts) if domains is None else list(domains)
        unknown = [index for index, domain in enumerate(asked) if domain is None]
        if unknown:
            model = find_model() if find_model is not None and self._by_likelihood else None
            if model is None or self._model is None or self._model() is not model:
                self.forget()
            self._model = None if model is None else weakref.ref(model)
            found = self._find([prompts[index] for index in unknown], score_labels, is_told=domains is not None)
            for index, name in zip(unknown, found, strict=True):
                asked[index] = name
        return [domain if isinstance(domain, NoDomain) else self._resolve(domain) for domain in asked]

    def forget(self) -> None:
        """Forget the domains that the strong model has found."""
        self._known.clear()
        self._model = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the answers of a loaded model."""
        return {**self.__dict__, "_known": {}, "_model": None}

    def _find(self, prompts: Sequence[Prompt], score_labels: LabelScorer, *, is_told: bool) -> Sequence[str | NoDomain]:
        """The domains that a call leaves open. `is_told`: the call names some."""
        if self._constant is not None:
            return [self._constant] * len(prompts)
        if self._callable is not None:
            return [self._call(self._callable, prompt) for prompt in prompts]
        if self._by_likelihood:
            return self._classify(prompts, score_labels)
        if is_told:
            source = "the call" if self._column is None else f"the column {self._column!r}"
            return [NoDomain(f"{source} names no domain for it")] * len(prompts)
        if self._column is not None:
            raise InputError(
                f"router is {COLUMN + self._column!r}, and the call names no domains. Pass domains=, the values of "
                "that column."
            )
        raise InputError(
            f"the criteria have several domains ({', '.join(self.domains)}), and neither the call nor a "
            "router says which. Pass domains=, domain= or router=."
        )

    def _call(self, function: Callable[[Prompt], str], prompt: Prompt) -> str | NoDomain:
        try:
            domain = function(prompt)
        except Exception as error:
            raise InputError(f"the router {self._name} raised {type(error).__name__}: {error}. Mend it.") from error
        found = self._resolve(domain)
        return NoDomain(f"of the router {self._name}, {found.reason}") if isinstance(found, NoDomain) else found

    def _resolve(self, domain: Any) -> str | NoDomain:
        """The domain whose criteria serve one that is named, whatever stands for its name."""
        if not isinstance(domain, str):
            return NoDomain(f"its domain is {domain!r} ({type(domain).__name__}), and a domain is a name")
        try:
            return self._criteria.resolve(domain)
        except InputError as error:
            return NoDomain(str(error).removesuffix("."))

    def _classify(self, prompts: Sequence[Prompt], score_labels: LabelScorer) -> list[str | NoDomain]:
        requests = [read_request(prompt) for prompt in prompts]
        found: dict[str | None, str | NoDomain] = {None: _UNREADABLE}
        found |= {text: self._known[text] for text in requests if text is not None and text in self._known}
        new = list(dict.fromkeys(text for text in requests if text not in found))
        if new:
            labels = list(self.domains)
            scores = score_labels([ask(str(text), labels) for text in new], labels)
            found |= {text: _likeliest(labels, values) for text, values in zip(new, scores, strict=True)}
        if self._model is not None:
            self._known |= {str(text): str(found[text]) for text in new if isinstance(found[text], str)}
            while len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        return [found[text] for text in requests]


def _likeliest(labels: Sequence[str], values: Sequence[float] | NoDomain) -> str | NoDomain:
    """Return the label with the highest log-probability. If one is NaN or none is finite, return the reason."""
    if isinstance(values, NoDomain):
        return values
    broken = [index for index, value in enumerate(values) if math.isnan(value)]
    best = broken[0] if broken else max(range(len(labels)), key=values.__getitem__)
    if math.isfinite(values[best]):
        return labels[best]
    return NoDomain(
        f"its domain can't be told: the strong model's mean log-probability of the label {labels[best]!r} is "
        f"{values[best]}, and must be finite. Check the model's weights, or load it with another cdr_dtype"
    )


def ask(request: str, labels: Sequence[str]) -> str:
    """The classification prompt, whose completion is one of the labels. What all requests share comes first."""
    return (
        f"What kind of request is this? Answer with one of these words: {', '.join(labels)}.\n\n"
        f"Request: {request}\n\nKind:"
    )


def read_request(prompt: Prompt) -> str | None:
    """The text that a prompt is classified by: its last user turn, shortened; None where there is none."""
    content: Any = prompt
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        turns = [turn for turn in prompt if isinstance(turn, Mapping) and turn.get("role") == "user"]
        content = turns[-1].get("content") if turns else None
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content[:_SHOWN_CHARACTERS] if isinstance(content, str) and content.strip() else None


def confusion(expected: Sequence[str], found: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """
    Count the domains that a router found against those that are right.

    Returns:
        `dict`: for each expected domain how often each domain was found (`"none"`: no domain).

    Raises:
        InputError: an expected domain is no name.
    """
    for index, right in enumerate(expected):
        if not isinstance(right, str):
            raise InputError(f"domains[{index}] is {right!r} ({type(right).__name__}). Pass a domain's name.")
    counts = Counter((right, said or "none") for right, said in zip(expected, found, strict=True))
    said_at_all = sorted({said for _, said in counts})
    return {right: {said: counts[right, said] for said in said_at_all} for right in sorted(set(expected))}


def import_callable(path: str) -> Any:
    """
    What a dotted path leads to.

    Raises:
        ConfigError: there is no such module or attribute, or the module fails.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"router is {path!r}, which can't be imported ({reason}). Pass 'column:NAME', 'likelihood' or the dotted "
            "path of a function."
        ) from error
