"""Folders of models that the demos make once. Knows no model: who asks for a folder says how it is made.

They lie under the folder that the environment variable `TRL_CDR_CACHE` names, else under `trl-cdr` in `$XDG_CACHE_HOME`
or `~/.cache`.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from ..annotation.passes import cache_folder
from ..errors import ConfigError


def build_once(name: str, build: Callable[[Path], None], *, cache: bool = True) -> Path:
    """
    A folder of the cache, built if it is not there.

    It is built in a temporary folder beside its place and renamed at the end: a killed build leaves no half of a cache,
    and of two builds at once one wins.

    Args:
        name (`str`): What the folder is called, before transformers' major version.
        build (`Callable`): Makes the folder that it is given, and fills it. What it raises is raised.
        cache (`bool`, *optional*, defaults to `True`): Take what is cached; `False` builds again and replaces it.

    Raises:
        ConfigError: the cache folder can't be written.
    """
    # transformers 4 can't load a tokenizer that transformers 5 saved, so each has its own.
    folder = cache_folder() / f"{name}-transformers{transformers.__version__.split('.')[0]}"
    if cache and folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with scratch as place:
        built = Path(place) / "built"
        build(built)
        try:
            if not cache and folder.is_dir():
                folder.rename(Path(place) / "replaced")
            built.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # else another process was first, with the same recipe
                raise _unwritable(folder, error) from error
    return folder


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """
    What can't be saved inside is an error that says what to do; safetensors has one of its own for a full disk.

    Raises:
        ConfigError: instead of whatever came.
    """
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{str(folder)!r} can't be written ({error}). Make room, or set TRL_CDR_CACHE to another folder."
        ) from error


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{str(folder)!r} can't be written ({error}). Set TRL_CDR_CACHE to another folder.")
