"""Dataclasses of arguments -> the text of `--help`, and what to say of an argument that none has, or of a folder.

Parses nothing; `cli` does.
"""

import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigError

DATA_HELP = "JSONL of prompt, chosen, rejected to tune the strong model on, in place of pairs of its own"
"""Of the real model's `--data`, wherever it is an argument."""
_COLUMN = 32
_WIDEST = 110


@dataclass(frozen=True)
class Group:
    """
    A dataclass of arguments, as `--help` shows it.

    Attributes:
        title (`str`): The heading.
        kind (`type`): The dataclass.
        often (`Mapping[str, str]`, *optional*): The fields that are shown, in this order, where not all are asked for,
            with words for them (`""`: the first sentence of their own). `None`: all of them.
    """

    title: str
    kind: type
    often: Mapping[str, str] | None = None


def write_help(
    command: str, summary: str, groups: Sequence[Group], *, examples: Sequence[str] = (), everything: bool = False
) -> str:
    """
    The text of a command's `--help`.

    Args:
        command (`str`): Such as `"train"`.
        summary (`str`): What it does.
        groups (`Sequence[Group]`): Its arguments.
        examples (`Sequence[str]`, *optional*): Command lines, shown last.
        everything (`bool`, *optional*, defaults to `False`): Explain every field.
    """
    width = min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)
    lines = [f"usage: trl-cdr {command} [--config FILE] [--ARGUMENT VALUE ...]", "", summary, ""]
    lines += _write("--config FILE", "YAML with any of the arguments below; the command line goes before it.", width)
    for group in groups:
        lines += ["", f"{group.title}:"]
        known = {field.name: field for field in fields(group.kind) if field.init}
        hints = get_type_hints(group.kind)
        texts = {name: str(field.metadata.get("help", "")).replace("%%", "%") for name, field in known.items()}
        if group.often is not None and not everything:
            texts = {name: words or _first(texts[name]) for name, words in group.often.items() if name in known}
        for name, text in texts.items():
            lines += _write(f"--{name} {_metavar(hints[name])}", (text + _default(known[name], text)).strip(), width)
        if len(texts) < len(known):
            lines.append(f"  and {len(known) - len(texts)} more: --help_all")
    if examples:
        lines += ["", "examples:", *(f"  {example}" for example in examples)]
    return "\n".join(lines)


def explain_unknown(
    names: Iterable[str], known: Collection[str], *, elsewhere: Callable[[str], str | None] | None = None
) -> str | None:
    """
    Say what is wrong with names of arguments.

    Args:
        names (`Iterable[str]`): Names that were given.
        known (`Collection[str]`): Those that there are.
        elsewhere (`Callable`, *optional*): What to say of a name that is known in another place, else `None`.

    Returns:
        `str | None`: Each unknown name with what may have been meant; `None` where there is none.
    """
    reasons = []
    for name in dict.fromkeys(name for name in names if name not in known):
        hint = None if elsewhere is None else elsewhere(name)
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.75)
        if hint is None and near:
            hint = f"did you mean {near[0]}?"
        reasons.append(name if hint is None else f"{name} ({hint})")
    return ", ".join(reasons) or None


def check_output(folder: str) -> None:
    """
    Whether a folder can be made and written, before a long run finds out.

    Raises:
        ConfigError: it can't.
    """
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir is {folder!r}, and {str(existing)!r} is no folder that can be written. Pass another one."
        )


def _write(invocation: str, text: str, width: int) -> Iterator[str]:
    """An argument on the left, what it is on the right."""
    wrapped = textwrap.wrap(text, max(width - _COLUMN, 30), break_long_words=False, break_on_hyphens=False) or [""]
    left = f"  {invocation}"
    if len(left) + 2 > _COLUMN:
        yield left
        left = ""
    for line in wrapped:
        yield f"{left:{_COLUMN}}{line}".rstrip()
        left = ""


def _first(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=[\w)`'\]]\.)\s+(?=[A-Z])", text)[0]


def _default(field: Field[Any], text: str) -> str:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is MISSING:
        return " (required)"
    default = getattr(default, "value", default)  # an enumeration's member
    is_plain = isinstance(default, (str, int, float)) and default is not False and default != ""
    return f" (default: {default})" if is_plain and "efault" not in text else ""


def _metavar(hint: Any) -> str:
    """What a value looks like."""
    origin, inner = get_origin(hint), [kind for kind in get_args(hint) if kind is not NoneType]
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is dict or (origin is list and get_origin(inner[0]) is dict):
        return "JSON"
    if origin is list:
        return f"{_metavar(inner[0])} ..."
    if inner:  # a union: the command line has the widest kind
        return _metavar(inner[0])
    return {bool: "BOOL", int: "INT", float: "NUMBER"}.get(hint, "TEXT")
