"""Folders of models that the demos make once. Knows no model: who asks for a folder says how it is made.

They lie under the folder that the environment variable `TRL_CDR_CACHE` names, else under `trl-cdr` in `$XDG_CACHE_HOME`
or `~/.cache`.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import transformers

from ..errors import ConfigError


def build_once(name: str, build: Callable[[Path], None], *, cache: bool = True) -> Path:
    """
    A folder of the cache, built if it is not there.

    It is built in a temporary folder beside its place and renamed at the end: a killed build leaves no half of a cache,
    and of two builds at once one wins.

    Args:
        name (`str`): What the folder is called, before transformers' major version.
        build (`Callable`): Makes the folder that it is given, and fills it.
        cache (`bool`, *optional*, defaults to `True`): Take what is cached; `False` builds again and replaces it.

    Raises:
        ConfigError: the cache folder can't be written.
    """
    # transformers 4 can't load a tokenizer that transformers 5 saved, so each has its own.
    folder = _cache_folder() / f"{name}-transformers{transformers.__version__.split('.')[0]}"
    if cache and folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
            built = Path(scratch) / "built"
            build(built)
            if not cache and folder.is_dir():
                folder.rename(Path(scratch) / "replaced")
            try:
                built.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same recipe
                    raise
    except OSError as error:
        raise ConfigError(
            f"{str(folder)!r} can't be written ({error}). Make room, or set TRL_CDR_CACHE to another folder."
        ) from error
    return folder


def _cache_folder() -> Path:
    if chosen := os.environ.get("TRL_CDR_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl-cdr"
