"""A data set's name, folder or file -> splits with a column `prompt`, as TRL's online trainers take them.

Knows no trainer and no model; `train` calls it.
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from trl import ScriptArguments, maybe_extract_prompt

from ..errors import ConfigError, InputError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(arguments: ScriptArguments, *, splits: Sequence[str]) -> list[Any]:
    """
    Load splits of a data set and see that each has prompts.

    Rows of preference data (`chosen`, `rejected`) lose their completions, and where the prompt is the turns that both
    begin with, these become `prompt`. Of a conversation (`messages`) the prompt is what stands before the last
    assistant's turn. Other columns stay: `router="column:NAME"` reads them.

    Args:
        arguments (`ScriptArguments`): `dataset_name` is a name on the Hub, a folder (with data files, or written by
            `save_to_disk`) or a .jsonl, .json, .csv or .parquet file, which is all one split, `train`;
            `dataset_config` and `dataset_streaming` are `load_dataset`'s.
        splits (`Sequence[str]`): Which, in the order wanted.

    Returns:
        `list[Dataset | IterableDataset]`: as many as `splits`.

    Raises:
        ConfigError: the data set is not named, or has no such split.
        InputError: it can't be read, or has no prompts.
    """
    name = arguments.dataset_name
    if not name:
        raise ConfigError("dataset_name is missing. Pass a name on the Hub, a folder or a .jsonl file.")
    try:
        found = _load(name, arguments)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"dataset_name is {name!r}, which can't be read: {reason[0]}. Give a name on the Hub, a folder or a "
            f"{', '.join(_BUILDERS)} file, and dataset_config where it has several."
        ) from error
    for split in splits:
        if split not in found:
            raise ConfigError(
                f"{name!r} has no split {split!r}, but {', '.join(found)}. Pass dataset_train_split, and for "
                "evaluation dataset_test_split."
            )
    return [_with_prompts(found[split], f"{name!r}, split {split!r},") for split in splits]


def _load(name: str, arguments: ScriptArguments) -> Mapping[str, Any]:
    path = Path(name).expanduser()
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError("no such file exists")
        return load_dataset(  # type: ignore[no-any-return]
            _BUILDERS[path.suffix], data_files=glob.escape(str(path)), streaming=arguments.dataset_streaming
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, Mapping) else {arguments.dataset_train_split: saved}
    return load_dataset(  # type: ignore[no-any-return]
        str(path) if path.is_dir() else name, name=arguments.dataset_config, streaming=arguments.dataset_streaming
    )


def _with_prompts(dataset: Any, where: str) -> Any:
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a streamed data set may not know its columns
    if {"chosen", "rejected"} <= set(columns):
        return dataset.map(maybe_extract_prompt).remove_columns(["chosen", "rejected"])
    if "prompt" in columns:
        return dataset
    if "messages" in columns:
        return dataset.map(_before_the_completion).remove_columns(["messages"])
    raise InputError(
        f"{where} has no column prompt, and none that prompts are taken from (chosen with rejected, or messages); its "
        f"columns are: {', '.join(columns) or 'none'}. Rename the column that holds the prompts."
    )


def _before_the_completion(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    return {"prompt": messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages}
