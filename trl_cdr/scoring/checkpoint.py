"""What can be known of a checkpoint without loading its weights: its config, which weights they are, their size.

Loads nothing; `loading` does. Asked before a long run begins, and by whoever must tell two checkpoints apart.
"""

import filecmp
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file, extract_commit_hash

from ..errors import ModelError
from .loading import hub_kwargs, refuse_encoder_decoder

# What else in a folder decides on the scores: architecture, end tokens, tokenizer and chat template.
_READ_WHOLE = (
    *("config.json", "adapter_config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer*", "chat_template*", "vocab.json", "merges.txt"),
)
_BLOCKS, _BLOCK = 256, 16 * 1024


def read_config(
    name: str, role: str, *, revision: str | None = None, init_kwargs: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """
    The config of a checkpoint.

    Args:
        name (`str`): Name on the Hub or path.
        role (`str`): What the model is to the caller (`"strong"`, say), for the message.
        revision (`str`, *optional*): Branch, tag or commit.
        init_kwargs (`Mapping`, *optional*): `from_pretrained`'s; those that say where a repository is are heeded.

    Raises:
        ModelError: there is none, no such model, or it is an encoder-decoder.
    """
    kwargs = {"revision": revision, "trust_remote_code": False, **(init_kwargs or {})}
    try:
        config = AutoConfig.from_pretrained(name, **hub_kwargs(kwargs))
    except Exception as error:  # the libraries below have a dozen ways to say that it can't be loaded
        raise _unreadable(name, role, error) from error
    refuse_encoder_decoder(config, role)
    return config


def identify_weights(
    name: str,
    role: str,
    *,
    revision: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    config: str = "config.json",
) -> str:
    """
    Which weights a name or a path stands for now.

    Args:
        name, role, revision, init_kwargs: As for `read_config`.
        config (`str`, *optional*, defaults to `"config.json"`): The file that every such repository has.

    Returns:
        `str`: `"commit ..."` of a model on the Hub. Of a folder `"sha256 ..."`: its config and tokenizer, and of each
        file of weights the size and 256 blocks at even distances. The header and the size alone are the same after
        every training of one architecture; every byte would take as long as loading.

    Raises:
        ModelError: there is no such model.
    """
    folder = find_folder(name, role, revision=revision, init_kwargs=init_kwargs, config=config)
    if not Path(name).expanduser().is_dir():
        # transformers 5.23 keeps no _commit_hash in a config: the path in the cache says it in every version.
        return f"commit {extract_commit_hash(str(folder / config), None)}"
    digest = hashlib.sha256()
    for patterns, read in ((_READ_WHOLE, Path.read_bytes), (_weights(folder), _read_blocks)):
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
            content = read(path)
            digest.update(f"{path.name}\0{path.stat().st_size}\0{len(content)}\0".encode())
            digest.update(content)
    return f"sha256 {digest.hexdigest()}"


def find_folder(
    name: str,
    role: str,
    *,
    revision: str | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
    config: str = "config.json",
) -> Path:
    """
    The folder on this machine that holds a checkpoint, or its config at least: a path itself, or the place of that
    commit in the Hub's cache.

    Args:
        name, role, revision, init_kwargs, config: As for `identify_weights`.

    Raises:
        ModelError: there is no such model.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser() / str((init_kwargs or {}).get("subfolder") or "")
    kwargs = hub_kwargs({"revision": revision, **(init_kwargs or {})})
    kwargs.pop("trust_remote_code", None)
    try:
        return Path(cached_file(name, config, **kwargs)).parent
    except Exception as error:  # as above
        raise _unreadable(name, role, error) from error


def same_weights(first: Path, second: Path) -> bool:
    """
    Whether two folders surely hold one and the same model: they are one folder, or config and weights are equal byte by
    byte. Unlike models cost a glance, since they differ early.
    """
    if first.resolve() == second.resolve():
        return True
    names = [
        sorted(
            path.name
            for pattern in ("config.json", "generation_config.json", *_weights(folder))
            for path in folder.glob(pattern)
        )
        for folder in (first, second)
    ]
    if names[0] != names[1] or not set(names[0]) - {"config.json", "generation_config.json"}:
        return False
    return all(filecmp.cmp(first / name, second / name, shallow=False) for name in names[0])


def weights_mb(name: str) -> float | None:
    """The size of a folder's weights in 2**20 bytes; None where the name is no folder, or has none."""
    folder = Path(name).expanduser()
    sizes = [path.stat().st_size for pattern in _weights(folder) for path in folder.glob(pattern)]
    return sum(sizes) / 2**20 if sizes else None


def _weights(folder: Path) -> tuple[str, ...]:
    """Safetensors, which are what is loaded; where there are none, what `use_safetensors=False` would read."""
    return ("*.safetensors",) if any(folder.glob("*.safetensors")) else ("pytorch_model*.bin",)


def _unreadable(name: str, role: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())
    return ModelError(f"{role} is {name!r}, whose config can't be loaded: {reason}")


def _read_blocks(path: Path) -> bytes:
    """Some of a large file, all of a small one."""
    size = path.stat().st_size
    if size <= _BLOCKS * _BLOCK:
        return path.read_bytes()
    with path.open("rb") as file:
        blocks = []
        for index in range(_BLOCKS):
            file.seek((size - _BLOCK) * index // (_BLOCKS - 1))
            blocks.append(file.read(_BLOCK))
    return b"".join(blocks)
