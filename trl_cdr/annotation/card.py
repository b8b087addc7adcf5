"""The card of a data set that was written here, and its way to the Hub. Knows no model, and no row."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..config import shareable_name
from ..errors import ConfigError
from .score_folder import OPTIONS, SUMMARY, write_whole

# What `load_dataset` reads of the folder: the shards alone, as one split.
_HEADER = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- trl
- trl-cdr
- {command}
---
"""


def write_card(folder: Path, options: Mapping[str, Any], summary: Mapping[str, Any], *, about: str) -> None:
    """
    Write `README.md`: the header by which `load_dataset` and the Hub read the folder, and what made the rows.

    Args:
        folder (`Path`): With `options.json` and the shards in it.
        options (`Mapping`): What is in `options.json`.
        summary (`Mapping`): What is in `summary.json`.
        about (`str`): What the rows are, in Markdown.

    Raises:
        OSError: it can't be written.
    """
    lines = [_HEADER.format(command=options["command"]), f"# {shareable_name(options['input'])}, labelled", "", about]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in _describe(options).items()]
    lines += ["", f"All options and versions: `{OPTIONS}`. What came of it, by domain (`{SUMMARY}`):", ""]
    lines += ["```json", json.dumps({**summary, "bad_rows": summary["bad_rows"]["count"]}, indent=2), "```", ""]
    write_whole(folder / "README.md", lambda file: file.write("\n".join(lines).encode()))


def push(folder: Path, name: str) -> None:
    """
    Upload a finished data set. Rows that were pushed to the same name before are replaced.

    Args:
        folder (`Path`): Where it lies.
        name (`str`): What it is called on the Hub; made, and private, if it is not there.

    Raises:
        ConfigError: the Hub can't be reached, or refuses. The folder is as it was.
    """
    try:
        api = HfApi()
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        kept = ["README.md", OPTIONS, SUMMARY, "data/*.parquet"]
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=kept,
            delete_patterns="data/*.parquet",  # of an earlier push, whose shards may have been more
        )
    except Exception as error:  # whatever the client raises: of the network, of its own, of a name that is none
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"push_to_hub is {name!r}, and the Hub can't be reached or refuses: {reason}. The data set is whole in "
            f"{str(folder)!r}: the same command pushes it later."
        ) from error


def _describe(options: Mapping[str, Any]) -> dict[str, str]:
    """What made the rows, in a few words each."""
    found = {
        role: f"`{shareable_name(options[f'cdr_{role}'])}`, {options[f'{role}_weights']}, {options[f'{role}_dtype']}"
        for role in ("strong", "weak")
    }
    if options.get("policy"):
        found["policy"] = f"`{shareable_name(options['policy'])}`, {options['policy_identity']}"
    criteria = options["criteria_sha256"]
    found["criteria"] = "none" if criteria is None else f"`{options['cdr_criteria']}`, sha256 {criteria}"
    found |= {name: f"`{options[name]}`" for name in ("cdr_reduction", "cdr_gate", "pair_strategy") if name in options}
    found["trl-cdr"] = str(options["versions"]["trl-cdr"])
    return found
