"""The folder that scores are written to: one process at a time, and scores of one input under one set of options.

Knows no model: `score_file` scores, and asks here what an earlier run has left.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config import shareable_options
from ..errors import ConfigError

_ELSEWHERE = "Pass another output_dir, or remove this one."

# Options under which an earlier run's scores stay valid. Whatever is not named here has to be the same.
WITHOUT_EFFECT = {
    # The weights themselves are compared, an adapter's too.
    *(
        f"cdr_{role}{part}"
        for role in ("strong", "weak")
        for part in ("", "_revision", "_adapter", "_adapter_revision")
    ),
    *("cdr_criteria", "cdr_chat_template"),  # paths, whose contents are compared
    "cdr_dtype",  # "auto" is not the same everywhere: the types in force are compared
    *("cdr_device", "cdr_token_budget", "cdr_prefix_cache_tokens"),  # where, and in what portions: rounding
    "cdr_offload",  # where the weights are between calls
    "cdr_replicas",  # and in which processes
    *("cdr_name", "cdr_on_unscorable", "cdr_on_gaming"),  # a reward's, and scores are no rewards
    "cdr_policy_tokenizer",  # of completion_ids, which a file has none of
}


@dataclass(frozen=True)
class Done:
    """What an earlier run has left: the scores of the first rows, and the bytes of the file that hold them."""

    scores: list[dict[str, Any]]
    bytes: int


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """
    Keep a folder to this process; the lock goes when the process ends, however it ends.

    Raises:
        ConfigError: another process has it, or it can't be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"output_dir {str(folder)!r} is in use by another process that scores. Wait for it, or pass another one."
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter: filelock < 4 where the file system has no locks
        raise ConfigError(f"output_dir is {str(folder)!r}, which can't be written or locked: {error}") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all, also where the process is killed meanwhile."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_done(path: Path, rows: Sequence[Mapping[str, Any]], *, fields: set[str], batch_size: int) -> Done:
    """
    The scores that an earlier run wrote, cut to whole batches: a batch's rows share forwards, and rounding would tell
    where the run was stopped.

    Args:
        path (`Path`): The file of scores; it need not exist. It is not changed.
        rows (`Sequence[Mapping]`): The input.
        fields (`set[str]`): What each score has.
        batch_size (`int`): Rows that are scored together.

    Raises:
        ConfigError: a line is not what was written there (a last one without its end is left out), or the rows differ.
    """
    text = path.read_bytes() if path.exists() else b""
    lines = text.split(b"\n")[:-1]
    written = [_read_line(line, f"{path}:{number}", fields) for number, line in enumerate(lines, start=1)]
    # As text: a NaN is not equal to itself.
    if [json.dumps(row) for row, _ in written] != [json.dumps(row) for row in rows[: len(written)]]:
        raise ConfigError(f"{str(path)!r} holds the scores of another input. {_ELSEWHERE}")
    kept = len(written) if len(written) == len(rows) else len(written) // batch_size * batch_size
    return Done([score for _, score in written[:kept]], sum(len(line) + 1 for line in lines[:kept]))


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """
    See that scores of different options do not end up in one file. Without scores there is nothing to see.

    Args:
        folder (`Path`): Its `options.json` says what the scores there were made with.
        options (`Mapping`): Options, or some of them, that are in force now.

    Raises:
        ConfigError: one differs that scores depend on, or `options.json` can't be read.
    """
    if not (folder / "scores.jsonl").exists() or b"\n" not in (folder / "scores.jsonl").read_bytes():
        return
    path = folder / "options.json"
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it holds no JSON object")
        before = shareable_options(before)  # an earlier version stored all of them
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} says what the scores beside it were made with, and can't be read: {error}. {_ELSEWHERE}"
        ) from None
    for name in sorted(set(options) - WITHOUT_EFFECT):
        then, now = before.get(name), options[name]
        if then == now:
            continue
        role, _, kind = name.partition("_")
        if kind == "weights":
            if then is None:
                raise ConfigError(
                    f"output_dir {str(folder)!r} holds scores, and does not say which weights of {role} they are by: "
                    f"an earlier version wrote it. {_ELSEWHERE}"
                )
            commit = re.fullmatch("commit ([0-9a-f]+)", str(then))
            remedy = f"Pass cdr_{role}_revision={commit[1]!r} to go on with those, or" if commit else "Pass"
            raise ConfigError(
                f"output_dir {str(folder)!r} holds scores by other weights of {role}: {before.get(f'cdr_{role}')!r} "
                f"was {then}, and {options[f'cdr_{role}']!r} is {now}. {remedy} another output_dir, or remove this one."
            )
        raise ConfigError(
            f"output_dir {str(folder)!r} holds scores with {name}={then!r}, and now it is {now!r}. {_ELSEWHERE}"
        )


def _read_line(line: bytes, where: str, fields: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A line's row and its score."""
    try:
        row = json.loads(line)
        score = row.pop("score")
        if not fields <= set(score):
            raise ValueError("its score is not whole")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{where} is no line that trl-cdr score wrote ({error}). Cut the file off before it, and the run goes on "
            "from there; or pass another output_dir."
        ) from None
    return row, score
