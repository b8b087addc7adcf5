"""Names in the options -> where a model is: a base, and maybe an adapter upon it, or a server that holds it.

Reads configs, and keys from the environment; `loading` loads a base, `adapters` puts the adapter on it, `served_lm`
asks a server.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from transformers.utils import cached_file, find_adapter_config_file

from ..config import CDRConfig, is_served
from ..errors import ConfigError, ModelError
from .checkpoint import find_folder, identify_weights, same_weights
from .loading import hub_kwargs

logger = logging.getLogger(__name__)

_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Kinds whose scores are compared with those of merged weights in the tests.
VERIFIED = ("LORA", "LOHA", "LOKR", "IA3")
# Ways to begin an adapter that leave the base's weights as they are. Others (PiSSA, OLoRA, CorDA, LoftQ) take from the
# base what they put into the adapter: a base that is shared would change for all.
_NEUTRAL = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """
    An adapter's weights and what its config says of its base.

    Attributes:
        name (`str`), revision (`str` or `None`): As the options name it.
        folder (`Path`): Where it lies on this machine.
        weights (`str`): Which weights they are; see `identify_weights`.
        base (`str` or `None`), base_revision (`str` or `None`): What it was trained on.
        has_tokenizer (`bool`): A tokenizer was saved with it.
    """

    name: str
    revision: str | None
    folder: Path
    weights: str
    base: str | None
    base_revision: str | None
    has_tokenizer: bool


@dataclass(frozen=True)
class Source:
    """
    Where the weights of strong or weak come from.

    Attributes:
        name (`str`), revision (`str` or `None`): The base: a name on the Hub or a path.
        adapter (`Adapter` or `None`): What is put on it.
    """

    name: str
    revision: str | None
    adapter: Adapter | None

    @property
    def tokenizer(self) -> tuple[str, str | None]:
        """Name and revision of what has the tokenizer: the adapter, where one was saved with it, else the base."""
        if self.adapter is not None and self.adapter.has_tokenizer:
            return self.adapter.name, self.adapter.revision
        return self.name, self.revision

    def identify(self, role: str, *, init_kwargs: Mapping[str, Any] | None = None) -> str:
        """Which weights these are, the adapter's too; see `identify_weights`."""
        base = identify_weights(self.name, role, revision=self.revision, init_kwargs=init_kwargs)
        return base if self.adapter is None else f"{base} with adapter {self.adapter.weights}"


@dataclass(frozen=True)
class Served:
    """
    A model on vLLM servers.

    Attributes:
        urls (`tuple[str, ...]`): Where its replicas answer, such as `http://gpu1:8000`.
        model (`str`): What they call it.
        tokenizer (`str` or `None`): Name or path of its tokenizer; `None`: where the servers have it from.
        timeout (`float`): How long a row is waited for, seconds, however often a server has to be asked anew.
    """

    urls: tuple[str, ...]
    model: str
    tokenizer: str | None = None
    timeout: float = 300.0


def read_served(address: str, role: str) -> Served:
    """
    `vllm://HOST:PORT/MODEL`, or `vllm+https://`, of several replicas one after the other with commas between them.
    Behind a `?`, of one or of all: `tokenizer=NAME`, `timeout=SECONDS`.

    Args:
        address (`str`): As `is_served` knows it.
        role (`str`): `"strong"` or `"weak"`, for messages.

    Raises:
        ConfigError: it can't be read, holds a password, or its replicas name different models.
    """
    urls, models = [], []
    options: dict[str, str] = {}
    for part in address.split(","):
        try:
            split = urlsplit(part.strip())
            is_complete = is_served(part.strip()) and bool(split.hostname) and (split.port or True)
        except ValueError:  # a port that is no number
            is_complete = False
        model = unquote(split.path[1:]).rstrip("/") if is_complete else ""
        if not model:
            raise ConfigError(
                f"cdr_{role} is {address!r}, of which {part.strip()!r} can't be read. Write vllm://HOST:PORT/MODEL, "
                "with the name that the server gives the model; replicas one after the other, with commas."
            )
        if split.username is not None:
            raise ConfigError(
                f"cdr_{role} has a user or password in its address, which would be written into records. Leave it out: "
                "an API key is read from the environment variable VLLM_API_KEY."
            )
        urls.append(f"{'https' if split.scheme == 'vllm+https' else 'http'}://{split.netloc}")
        models.append(model)
        options |= dict(parse_qsl(split.query))
    if len(set(models)) > 1:
        raise ConfigError(
            f"cdr_{role} names replicas of {models[0]!r} and of {models[-1]!r}: replicas serve one model. Give it one "
            "name on all of them (--served-model-name)."
        )
    return Served(tuple(dict.fromkeys(urls)), models[0], **_read_options(options, role))


def _read_options(options: Mapping[str, str], role: str) -> dict[str, Any]:
    """What stands behind the `?` of an address."""
    unknown = sorted(set(options) - {"tokenizer", "timeout"})
    if unknown:
        raise ConfigError(f"cdr_{role} has ?{unknown[0]}= in its address. Known there: tokenizer, timeout.")
    read: dict[str, Any] = dict(options)
    if "timeout" in options:
        try:
            read["timeout"] = float(options["timeout"])
        except ValueError:
            read["timeout"] = 0.0
        if not 0 < read["timeout"] < float("inf"):
            raise ConfigError(f"cdr_{role} has timeout={options['timeout']} in its address. Give seconds, above 0.")
    return read


def find_source(config: CDRConfig, role: str) -> Source:
    """
    The base and the adapter of one model of the pair. A folder or a repository that holds an adapter is one also where
    it stands in the model's place; its base is then the one that its config names.

    Args:
        config (`CDRConfig`): The options.
        role (`str`): `"strong"` or `"weak"`.

    Raises:
        ModelError: the adapter can't be found, has no weights or none in safetensors, is of a kind that is not
            supported, or was trained on another base.
    """
    init_kwargs: Any = config.cdr_model_init_kwargs
    name, revision, adapter_name, adapter_revision = (
        getattr(config, f"cdr_{role}{part}") for part in ("", "_revision", "_adapter", "_adapter_revision")
    )
    if adapter_name is None:
        return find_model(name, role, revision=revision, init_kwargs=init_kwargs)
    if _find_adapter(name, role, revision=revision, init_kwargs=init_kwargs) is not None:
        raise _stacked(role, adapter_name, name)
    adapter = _find_adapter(adapter_name, f"{role}_adapter", revision=adapter_revision, init_kwargs=init_kwargs)
    if adapter is None:
        raise ModelError(
            f"{role}_adapter is {adapter_name!r}, where no {_CONFIG} can be found. Give the folder or the name of an "
            "adapter that peft saved."
        )
    if adapter.base == name and revision is None:
        revision = adapter.base_revision
    source = Source(name, revision, adapter)
    _check_base(source, role, init_kwargs)
    return source


def find_model(
    name: str, role: str, *, revision: str | None = None, init_kwargs: Mapping[str, Any] | None = None
) -> Source:
    """
    The base, and the adapter where the name is one's: its base is then the one that its config names.

    Args:
        name (`str`): On the Hub, or a path.
        role (`str`): `"strong"`, `"weak"` or `"policy"`, for messages.
        revision (`str`, *optional*): Branch, tag or commit.
        init_kwargs (`Mapping`, *optional*): Those that say where a repository is are heeded.

    Raises:
        ModelError: see `find_source`.
    """
    inner = _find_adapter(name, role, revision=revision, init_kwargs=init_kwargs)
    if inner is None:
        return Source(name, revision, None)
    if inner.base is None:
        other = "" if role == "policy" else f", or pass the base as cdr_{role} and this as cdr_{role}_adapter"
        raise ModelError(
            f"{role} is {name!r}, an adapter whose config names no base. Write base_model_name_or_path into its "
            f"{_CONFIG}{other}."
        )
    if _find_adapter(inner.base, role, revision=inner.base_revision, init_kwargs=init_kwargs) is not None:
        raise _stacked(role, name, inner.base)
    return Source(inner.base, inner.base_revision, inner)


def find_sources(config: CDRConfig) -> dict[str, Source]:
    """
    `find_source` for strong and weak, without what is on a server.

    Raises:
        ConfigError: with adapters, one base is named with two revisions.
        ModelError: see `find_source`.
    """
    here = [role for role in ("strong", "weak") if not is_served(getattr(config, f"cdr_{role}"))]
    found = {role: find_source(config, role) for role in here}
    if len(found) < 2:
        return found
    strong, weak = found["strong"], found["weak"]
    is_adapted = strong.adapter is not None or weak.adapter is not None
    has_two = strong.name == weak.name and strong.revision != weak.revision
    if is_adapted and has_two and not share_base(config, found):
        raise ConfigError(
            f"the base {strong.name!r} is named with two revisions, {strong.revision!r} for strong and "
            f"{weak.revision!r} for weak: adapters are compared on one base. Give cdr_strong_revision and "
            "cdr_weak_revision the same value, or merge the adapter into its base where two bases are meant."
        )
    return found


def read_api_key(variable: str) -> str:
    """
    A server's key from the environment; empty where there is none.

    Args:
        variable (`str`): The environment variable's name.

    Raises:
        ConfigError: no header takes it. HTTP clients refuse such a key with the whole of it in their message.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} holds a line break or another character that no header takes. Mend it.")
    return key


def share_base(config: CDRConfig, sources: Mapping[str, Source]) -> bool:
    """Whether strong and weak are both here, and stand on the same weights, under names that may differ."""
    return len(sources) == 2 and same_weights(*(_folder(source, role, config) for role, source in sources.items()))


def _folder(source: Source, role: str, config: CDRConfig) -> Path:
    init_kwargs: Any = config.cdr_model_init_kwargs
    return find_folder(source.name, role, revision=source.revision, init_kwargs=init_kwargs)


def _find_adapter(
    name: str, role: str, *, revision: str | None, init_kwargs: Mapping[str, Any] | None
) -> Adapter | None:
    """What lies there, if it is an adapter."""
    kwargs = hub_kwargs({"revision": revision, **(init_kwargs or {})})
    kwargs.pop("trust_remote_code", None)
    kwargs["subfolder"] = kwargs.get("subfolder") or ""
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        found = find_adapter_config_file(path, **kwargs)
    except Exception:  # no such name: whoever reads the model's own config will say so
        found = None
    if found is None:
        return None
    try:
        content = json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{role} is {name!r}, whose {_CONFIG} can't be read: {error}") from error
    reason = _why_not(content)
    if reason is not None:
        raise ModelError(f"{role} is {name!r}, an adapter that can't be used: {reason}")
    try:
        folder = Path(cached_file(path, WEIGHTS, **kwargs)).parent
    except Exception as error:  # as above
        raise ModelError(
            f"{role} is {name!r}, an adapter without {WEIGHTS}. Adapters are read from safetensors alone; where there "
            "is an adapter_model.bin, load and save it anew with peft."
        ) from error
    return Adapter(
        name=name,
        revision=revision,
        folder=folder,
        weights=identify_weights(path, role, revision=revision, init_kwargs=init_kwargs, config=_CONFIG),
        base=content.get("base_model_name_or_path") or None,
        base_revision=content.get("revision"),
        has_tokenizer=_exists(path, "tokenizer_config.json", kwargs),
    )


def _exists(name: str, file: str, kwargs: Mapping[str, Any]) -> bool:
    try:
        return cached_file(name, file, **kwargs) is not None
    except OSError:
        return False


def _why_not(content: Mapping[str, Any]) -> str | None:
    """What of an adapter's config rules it out."""
    kind, init = content.get("peft_type"), content.get("init_lora_weights")
    if kind not in VERIFIED:
        return f"its peft_type is {kind}, and only {', '.join(VERIFIED)} are compared with merged weights."
    if init not in _NEUTRAL:
        return (
            f"it began with init_lora_weights={init!r}, which changes the weights of its base, and a base is shared. "
            "Save it with path_initial_model_for_weight_conversion, or merge it."
        )
    if content.get("bias") not in (None, "none"):
        return f"with bias={content['bias']!r} it changes biases of its base, and a base is shared. Merge it."
    for name in ("layer_replication", "alora_invocation_tokens", "arrow_config"):
        if content.get(name):
            return f"it has {name}, which changes how its base runs. Merge it, or pass it as a loaded model."
    return None


def _check_base(source: Source, role: str, init_kwargs: Mapping[str, Any] | None) -> None:
    """
    Raises:
        ModelError: the adapter was trained on another base than the one that is named.
    """
    adapter = source.adapter
    assert adapter is not None
    if adapter.base is None:
        return
    asked, named = ((source.name, source.revision), (adapter.base, adapter.base_revision))
    if asked[0] == named[0] and (named[1] is None or asked[1] == named[1]):
        return
    is_here = [Path(name).expanduser().is_dir() for name, _ in (asked, named)]
    if is_here[0] != is_here[1] or (not is_here[1] and _is_path(adapter.base)):
        logger.warning(
            "%s_adapter (%s) names the base %r, which can't be compared with %r: taken at your word.",
            *(role, adapter.name, adapter.base, source.name),
        )
        return
    places = [
        find_folder(name, who, revision=revision, init_kwargs=init_kwargs)
        for who, (name, revision) in ((role, asked), (f"the base of {role}_adapter", named))
    ]
    # A commit is the last part of its folder, also under another name of the repository.
    if same_weights(*places) or (not any(is_here) and places[0].name == places[1].name):
        return
    raise ModelError(
        f"{role}_adapter is {adapter.name!r}, whose config names the base {_show(*named)}, and {role} is "
        f"{_show(*asked)}, with other weights. Pass the base that it was trained on; if both hold the same, write "
        f"{asked[0]!r} as base_model_name_or_path into its {_CONFIG}."
    )


def _is_path(name: str) -> bool:
    """Whether a name can't be one on the Hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _show(name: str, revision: str | None) -> str:
    return repr(name) if revision is None else f"{name!r} at {revision!r}"


def _stacked(role: str, adapter: str, base: str) -> ModelError:
    return ModelError(
        f"{role} is the adapter {adapter!r} on {base!r}, which is an adapter itself. Merge one of them into its base."
    )
