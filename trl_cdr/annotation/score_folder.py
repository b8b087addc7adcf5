"""The folder that scores are written to: of one command, one input and one set of options, and each file whole or not
there at all.

Knows no model and no schema: `shards` lays rows out in it, `score_file` and `annotate` say what they are made of.
"""

import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..config import CDRConfig, with_date
from ..errors import ConfigError

OPTIONS, SUMMARY = "options.json", "summary.json"
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
    "cdr_date",  # the date that templates write is compared
    "cdr_dtype",  # "auto" is not the same everywhere: the types in force are compared
    *("cdr_device", "cdr_token_budget", "cdr_prefix_cache_tokens"),  # where, and in what portions: rounding
    "cdr_offload",  # where the weights are between calls
    "cdr_replicas",  # and in which processes
    *("cdr_name", "cdr_on_unscorable", "cdr_on_gaming"),  # a reward's, and scores are no rewards
    "cdr_policy_tokenizer",  # of completion_ids, which a file has none of
    *("input", "input_rows"),  # what they are is compared by content
    *("batch_size", "policy", "server", "versions"),  # portions again; what its weights are is compared; where; whose
}


@contextmanager
def hold(folder: Path, share: str, *, wait: bool = False) -> Iterator[None]:
    """
    Keep a share of the work in a folder to this process; the lock goes when the process ends, however it ends.

    Args:
        folder (`Path`): Made if missing.
        share (`str`): Which share.
        wait (`bool`, *optional*, defaults to `False`): Until another process lets go of it.

    Raises:
        ConfigError: another process has it, or it can't be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".lock{share}")
        lock.acquire(timeout=-1 if wait else 0)
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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """
    What can't be written inside is an error that says what to do.

    Raises:
        ConfigError: an `OSError` came: the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output_dir is {str(folder)!r}, which can't be written: {error}. What is finished stays there: make room "
            "and run the same command again."
        ) from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """
    Write a file that is there whole or not at all, also where the process is killed, the disk is full, another process
    writes the same one, or the power goes.

    Args:
        path (`Path`): The file; replaced where it is there.
        write (`Callable`): Writes its content.

    Raises:
        OSError: it can't be written; nothing of it is left.
    """
    partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_whole`, of JSON."""
    write_whole(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def fix_date(config: CDRConfig, folder: Path) -> CDRConfig:
    """
    Return the options with a date for chat templates that write today's: the one with which the folder's run began.

    Args:
        config (`CDRConfig`): Returned unchanged if it has a date.
        folder (`Path`): Its `options.json`, if there is one, has the date. Otherwise it is today's.

    Raises:
        ConfigError: the options have another date than the prompts of the folder's scores.
    """
    try:
        recorded = dict(json.loads((folder / OPTIONS).read_bytes()))
    except (OSError, ValueError, TypeError):
        recorded = {}
    written = recorded.get("date")
    if None not in (config.cdr_date, written) and written != config.cdr_date:
        raise ConfigError(
            f"output_dir {str(folder)!r} holds scores of prompts with the date {written}, and cdr_date is "
            f"{config.cdr_date}. Leave cdr_date out to go on with that date. {_ELSEWHERE}"
        )
    return with_date(config, recorded.get("cdr_date"))


def check_ours(folder: Path) -> None:
    """
    Whether a folder is empty, or one that scores were written to.

    Raises:
        ConfigError: it holds something else.
    """
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if found and OPTIONS not in found:
        raise ConfigError(
            f"output_dir is {str(folder)!r}, which holds {found[0]!r} and no {OPTIONS}: no run of ours wrote it. "
            "Pass another output_dir."
        )


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """
    See that scores of different inputs or options do not end up in one folder.

    Args:
        folder (`Path`): It holds scores; its `options.json` says what they were made of and with.
        options (`Mapping`): Options, or some of them, that are in force now.

    Raises:
        ConfigError: one differs that scores depend on, or `options.json` can't be read.
    """
    path = folder / OPTIONS
    try:
        before = json.loads(path.read_bytes())
        if not isinstance(before, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(path)!r} says what the scores beside it were made with, and can't be read: {error}. {_ELSEWHERE}"
        ) from None
    for name in sorted(set(options) - WITHOUT_EFFECT):
        then, now = before.get(name), options[name]
        if then == now:
            continue
        if name == "input_sha256":
            raise ConfigError(
                f"output_dir {str(folder)!r} holds the scores of another input: {before.get('input')!r} had "
                f"{before.get('input_rows')} rows, and {options['input']!r} has {options['input_rows']}, of other "
                f"content. {_ELSEWHERE}"
            )
        role = name.removesuffix("_weights")
        if name in ("strong_weights", "weak_weights"):
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
