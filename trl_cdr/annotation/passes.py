"""One pass of one model over texts -> a table of their log-probabilities, kept on disk. No text is run twice.

    model   ->  a file, named by a hash of what its log-probabilities depend on (weights, type, template, gate, ...)
    text    ->  a line of it, named by a hash of what the model reads (the conditioned prompt and the completion)

A pair's log-ratio is the difference of two tables' columns: `evaluate` reads two tables, `rank_pairs` M of them for all
M (M - 1) pairs, and whoever comes later finds what is there. One model is in memory at a time. A pass that was stopped
goes on where it was. Of a model on servers nothing is kept: nobody knows its weights.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from filelock import FileLock
from rich.console import Console
from rich.progress import track

from ..conditioning.criteria import Conditioning
from ..config import CDRConfig, shareable_options, with_date
from ..errors import ConfigError
from ..scoring.checkpoint import read_config
from ..scoring.completions import read_completion
from ..scoring.gate import examine, gate_statistics
from ..scoring.loading import expected_dtype, find_device
from ..scoring.packing import group_rows
from ..scoring.pair import Member
from ..scoring.pair_loading import find_template, load_member
from ..scoring.ratio import sum_logps
from ..scoring.sources import find_source
from ..scoring.types import Completion, Prompt, Row, Unscorable

_FORMAT = 2  # 2: texts are read as chat templates write them
_BATCH = 64  # texts that are run, and then written, together

# Options on which a model's log-probabilities depend, beside its weights, its template and the type in force.
_OPTIONS = (
    *("cdr_model_init_kwargs", "cdr_chat_template_kwargs", "cdr_add_special_tokens", "cdr_max_length"),
    *("cdr_gate", "cdr_typicality"),
)


@dataclass(frozen=True)
class Text:
    """
    A completion to a prompt.

    Attributes:
        prompt (`Prompt`): As the model reads it, conditioning and all.
        completion (`str`): It ended by itself.
        conditioning (`Conditioning` or `None`): What was put before the prompt.
    """

    prompt: Prompt
    completion: str
    conditioning: Conditioning | None = None

    @cached_property
    def key(self) -> str:
        """What tells texts apart."""
        return sha256(json.dumps([self.prompt, self.completion]).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Entry:
    """
    What a model gives for a text.

    Attributes:
        logps (`float` or `None`): Log-probability of the whole completion, nats.
        n_tokens (`int`): Its tokens.
        surprise, survival, typicality, gated: As in [`Score`], were this model the strong one.
        truncated (`bool`): The prompt lost tokens on its left.
        error (`str` or `None`): Why there is no log-probability.
    """

    logps: float | None = None
    n_tokens: int = 0
    surprise: float | None = None
    survival: float | None = None
    typicality: float | None = None
    gated: bool = False
    truncated: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Model:
    """
    A model that texts are run through.

    Attributes:
        config (`CDRConfig`), role (`str`): It is `cdr_<role>` there.
        template (`str` or `None`): The chat template that it reads, Jinja text.
        identity (`dict`): What its log-probabilities depend on.
    """

    config: CDRConfig
    role: str
    template: str | None
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """See `name_model`."""
        return name_model(self.config, self.role)

    @property
    def is_served(self) -> bool:
        """It is on servers."""
        return self.role in self.config.served

    @property
    def key(self) -> str:
        """What tells models apart."""
        return sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]


def name_model(config: CDRConfig, role: str) -> str:
    """As the config has it, `name@revision + adapter@revision`, so that no two models of one base share a name."""
    parts = []
    for each in (f"cdr_{role}", f"cdr_{role}_adapter"):
        name, revision = getattr(config, each), getattr(config, f"{each}_revision")
        if name is not None:
            parts.append(str(name) if revision is None else f"{name}@{revision}")
    return " + ".join(parts)


def find_models(places: Sequence[tuple[CDRConfig, str]]) -> list[Model]:
    """
    Find models, and what their log-probabilities depend on. Loads tokenizers alone, and asks servers which they read.

    Args:
        places (`Sequence[tuple[CDRConfig, str]]`): A config and `"strong"` or `"weak"` for each. A model without a
            chat template reads that of the first one that has one.

    Raises:
        ConfigError, ModelError: as `load_pair`.
    """
    today = date.today().isoformat()
    places = [(with_date(config, today), role) for config, role in places]
    templates = [find_template(config, role) for config, role in places]
    first = next((template for template in templates if template is not None), None)
    return [
        _find_model(config, role, template or first) for (config, role), template in zip(places, templates, strict=True)
    ]


def _find_model(config: CDRConfig, role: str, template: str | None) -> Model:
    options = shareable_options(config)
    identity = {
        "format": _FORMAT,
        **(_find_served(config, role) if role in config.served else _find_weights(config, role)),
        "template": None if template is None else sha256(template.encode()).hexdigest(),
        # Templates read today's date by this function.
        "date": config.cdr_date if template is not None and "strftime_now" in template else None,
        **{name: options[name] for name in _OPTIONS},
    }
    return Model(config, role, template, identity)


def _find_weights(config: CDRConfig, role: str) -> dict[str, Any]:
    init_kwargs: Any = config.cdr_model_init_kwargs
    source = find_source(config, role)
    checkpoint = read_config(source.name, role, revision=source.revision, init_kwargs=init_kwargs)
    return {
        "weights": source.identify(role, init_kwargs=init_kwargs),
        "dtype": str(expected_dtype(checkpoint, config.cdr_dtype, find_device(config.cdr_device))),
    }


def _find_served(config: CDRConfig, role: str) -> dict[str, Any]:
    return {"weights": None, "server": getattr(config, f"cdr_{role}")}


class Passes:
    """
    Tables of models, in a folder.

    Args:
        folder (`Path`, *optional*): Where they are kept; by default `passes` in the folder that `TRL_CDR_CACHE` names,
            else in `trl-cdr` below `$XDG_CACHE_HOME` or `~/.cache`.

    Attributes:
        run (`int`): Models that were run.
        found (`int`): Models all of whose texts were there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() / "passes" if folder is None else folder
        self.run = 0
        self.found = 0

    def read(self, model: Model, texts: Sequence[Text]) -> list[Entry]:
        """
        What a model gives for texts, of which those are run that are not in its table yet; of one on servers, all.

        Args:
            model (`Model`): One of `find_models`.
            texts (`Sequence[Text]`): In any order, some of them equal.

        Raises:
            ConfigError: the folder can't be written, or its table can't be read.
            ModelError: see `load_pair`.
        """
        distinct = {text.key: text for text in texts}
        if model.is_served:
            self.run += 1
            asked = _run(model, list(distinct.values()))
            table = {text.key: one for batch, entries in asked for text, one in zip(batch, entries, strict=True)}
            return [table[text.key] for text in texts]
        path = self.folder / f"{model.key}.jsonl"
        with self._locked(path):
            table, size = _read_table(path)
            left = [text for key, text in distinct.items() if key not in table]
            if left:
                if self.run:  # the model before this one is to leave the memory before this one comes
                    clear_device_cache(garbage_collection=True)
                self.run += 1
                self._cut(path, size, head={"model": model.name, **model.identity})
                for batch, entries in _run(model, left):
                    table |= {text.key: entry for text, entry in zip(batch, entries, strict=True)}
                    lines = [{"text": text.key, **_changed(table[text.key])} for text in batch]
                    with _saying_why(self.folder), path.open("ab") as out:
                        out.write(b"".join(map(_line, lines)))
            else:
                self.found += 1
        return [table[text.key] for text in texts]

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Keep a table to this process; another one that wants it waits, and finds what was run."""
        lock = FileLock(f"{path}.lock")
        with _saying_why(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _cut(self, path: Path, size: int, *, head: dict[str, Any]) -> None:
        """Take part of a line off a table's end, and begin a new table with what it is of."""
        with _saying_why(self.folder), path.open("ab") as out:
            out.truncate(size)
            if not size:
                out.write(_line(head))


def cache_folder() -> Path:
    """Where what is costly to make is kept for this user; see [`Passes`]."""
    if chosen := os.environ.get("TRL_CDR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-cdr"


def _run(model: Model, texts: Sequence[Text]) -> Iterator[tuple[Sequence[Text], list[Entry]]]:
    """Batches of texts with what the model gives for them."""
    member = load_member(model.config, model.role, chat_template=model.template)
    batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    for batch in track(batches, description=f"running {model.name[-40:]}", console=Console(stderr=True)):
        yield batch, run_texts(member, batch, model.config)


def run_texts(member: Member, texts: Sequence[Text], config: CDRConfig) -> list[Entry]:
    """
    Run texts through a model.

    Args:
        member (`Member`): The model.
        texts (`Sequence[Text]`): As many as are to be packed together.
        config (`CDRConfig`): Its gate says what else is kept (of a model on servers nothing), its `cdr_token_budget`
            how much is run at once.
    """
    gate = "none" if member.is_served else config.cdr_gate
    rows: dict[int, Row] = {}
    entries: dict[int, Entry] = {}
    for place, text in enumerate(texts):
        try:
            rows[place] = member.encode(text.prompt, Completion(read_completion(text.completion), True))
        except Unscorable as reason:
            entries[place] = Entry(error=str(reason))
    constants = [
        () if conditioning is None else member.constant_ids(conditioning, is_text=isinstance(texts[place].prompt, str))
        for place, conditioning in ((place, texts[place].conditioning) for place in rows)
    ]
    found = member.per_token_logps(
        group_rows(list(rows.values()), constants),
        token_budget=config.cdr_token_budget,
        reduce=gate_statistics(gate, member.final_ids),
    )
    for (place, row), statistics in zip(rows.items(), found, strict=True):
        logps = statistics if statistics.ndim == 1 else statistics[:, 0]  # (T,) nats
        if not logps.isfinite().all():
            entries[place] = Entry(error="a log-probability is not finite: weights are broken, or the type overflows")
            continue
        said = examine(statistics, gate=gate, least_typicality=-config.typicality_bound, finished=True)
        if not math.isfinite(said.get("typicality", 0.0)):
            said["typicality"] = None  # JSON has no word for it; it is gated
        entries[place] = Entry(logps=sum_logps(logps), n_tokens=len(logps), truncated=row.truncated, **said)
    return [entries[place] for place in range(len(texts))]


@contextmanager
def _saying_why(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter: filelock < 4 where the file system has no locks
        raise ConfigError(
            f"cache_dir is {str(folder)!r}, which can't be written or locked: {error}. What was written stays: make "
            "room and run again, or pass another one."
        ) from error


def _read_table(path: Path) -> tuple[dict[str, Entry], int]:
    """The lines of a table, and how many bytes hold whole ones: a pass that was killed leaves part of its last."""
    content = path.read_bytes() if path.exists() else b""
    head, *lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
    table = {}
    for number, line in enumerate(lines, start=2):
        try:
            fields = json.loads(line)
            key = str(fields.pop("text"))
            table[key] = Entry(**fields)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}:{number} is no line of a table of log-probabilities ({error}). Remove the file; what it held "
                "is run anew."
            ) from None
    return table, len(head) + sum(map(len, lines))


def _changed(entry: Entry) -> dict[str, Any]:
    """What a line has to say of an entry."""
    default = asdict(Entry())
    return {name: value for name, value in asdict(entry).items() if value != default[name]}


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
