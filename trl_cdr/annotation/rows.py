"""A JSONL file, or a data set by name -> rows of prompts, with completions where there are any. Runs no model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

_BUILDERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(path: Path, *, fields: Sequence[str], reserved: Sequence[str] = ()) -> list[dict[str, Any]]:
    """
    The objects of a JSONL file; empty lines are passed over.

    Args:
        path (`Path`): The file.
        fields (`Sequence[str]`): What each row needs.
        reserved (`Sequence[str]`, *optional*): What none may have.

    Raises:
        InputError: the file can't be read, or a line, which is named, is no such object, or has a `finished` that is
            no truth value.
    """
    if not path.is_file():
        raise InputError(f"input is {str(path)!r}, and no such file exists. Give the path of a JSONL file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"input is {str(path)!r}, which is no UTF-8 ({error}). Convert it.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is no JSON ({error}). Write one JSON object a line.") from None
        rows.append(_check(row, f"{path}:{number}", fields, reserved))
    return rows


def load_rows(name: str, *, fields: Sequence[str], most: int) -> list[dict[str, Any]]:
    """
    The first rows of a JSONL file, of another data file or a folder, or of a data set on the Hub (its split `train`).

    Args:
        name (`str`): A path, or a name on the Hub.
        fields (`Sequence[str]`): What each row needs.
        most (`int`): At most so many.

    Raises:
        InputError: it can't be read, or a row lacks a field.
    """
    path = Path(name).expanduser()
    if path.suffix == ".jsonl" or (path.is_file() and path.suffix not in _BUILDERS):
        return read_rows(path, fields=fields)[:most]
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        if path.suffix in _BUILDERS:
            found = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        else:
            found = load_dataset(str(path) if path.is_dir() else name, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"input is {name!r}, which can't be read: {reason[0]}. Give a .jsonl, {', '.join(_BUILDERS)} file, a "
            "folder or a name on the Hub."
        ) from error
    rows = found.select(range(min(most, len(found))))
    return [_check(row, f"{name}, row {number}", fields) for number, row in enumerate(rows)]


def _check(row: Any, where: str, fields: Sequence[str], reserved: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(row, dict) or not {*fields} <= row.keys():
        what = f"field{'s' * (len(fields) > 1)} {' and '.join(fields)}"
        raise InputError(f"{where} needs the {what}. Add {'them' if len(fields) > 1 else 'it'}.")
    for name in reserved:
        if name in row:
            raise InputError(f"{where} has a field {name} already, which would be overwritten. Rename it.")
    if row.get("finished") not in (True, False, None):
        raise InputError(f"{where} has finished: {row['finished']!r}. Use true, false or null.")
    return row
