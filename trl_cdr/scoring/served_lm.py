"""One model of the pair that is on servers: what `causal_lm` is for weights, and whether the servers can be trusted.

`vllm_client` asks them; it is imported when the first one is asked, since it needs httpx and tenacity.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..config import is_served
from ..errors import ConfigError, ModelError
from .loading import hub_kwargs
from .logps import Reduce, token_logps
from .packing import Layout
from .sources import Served, read_served
from .types import shorten

if TYPE_CHECKING:
    from .vllm_client import VllmClient

logger = logging.getLogger(__name__)

# What every server is asked about before it is believed: words, numbers, accents, another script, code.
_KNOWN_TEXT = (
    "The committee met on 14 March 2019 to discuss the café's new opening hours. Nobody had asked the neighbours, who "
    "prefer their Sundays quiet; 東京 was mentioned twice. def area(r): return 3.14159 * r ** 2\n"
)
# Tokens of it, at most, and what is left of them by 16: the blocks that vLLM caches are multiples of that, so that the
# last tokens are never read from a cache. A CPU's blocks have 128 tokens.
_KNOWN_TOKENS, _BLOCK, _BEHIND_BLOCK = 400, 16, 9
# Nats a token, in the mean over the known row: what bfloat16 and the company of other rows do stays well below; another
# checkpoint does not.
_TOLERANCE = 0.05
# Below this two models are one.
_EQUAL = 1e-5


class ServedLM:
    """
    A causal language model on vLLM servers, asked for the log-probabilities of rows; see [`ServedLM.connect`].

    Args:
        client (`VllmClient`): Asks the servers.
        role (`str`): `"strong"` or `"weak"`, for messages.
        root (`str`): Where the servers have the model, and its tokenizer, from.
        max_model_len (`int`, *optional*): Tokens of the servers' context.
    """

    def __init__(self, client: "VllmClient", role: str, *, root: str, max_model_len: int | None) -> None:
        self._client = client
        self._role = role
        self._root = root
        self._max_model_len = max_model_len
        self._num_embeddings = 0
        self._reason = ""
        self.end_ids: frozenset[int] = frozenset()
        self.known: Tensor | None = None  # log-probabilities of the known row, (T - 1,) nats

    @classmethod
    def connect(cls, served: Served, role: str, *, other: Served | None = None) -> "ServedLM":
        """
        Find a model on its servers.

        Args:
            served (`Served`): Addresses and name.
            role (`str`): `"strong"` or `"weak"`, for messages.
            other (`Served`, *optional*): The partner's, to tell whether the two were swapped.

        Raises:
            ConfigError: httpx or tenacity is not installed, a server wants an API key, or serves no such model.
            ModelError: a server can't be reached or is no vLLM, or replicas differ.
        """
        try:
            from .vllm_client import VllmClient
        except ImportError as error:
            raise ConfigError(
                f"cdr_{role} is on a server, and {error.name} is not installed. Run: pip install 'trl-cdr[server]'"
            ) from error
        client = VllmClient(served, role)
        entries = [_find_entry(client, url, role, other) for url in served.urls]
        roots = [entry["root"] for entry in entries]
        if len(set(roots)) > 1:
            raise ModelError(
                f"replicas of {role} differ: {served.urls[0]} has {roots[0]!r}, another has "
                f"{next(root for root in roots if root != roots[0])!r}. Serve one model on all of them."
            )
        lengths = [entry["max_model_len"] for entry in entries if entry["max_model_len"] is not None]
        return cls(client, role, root=roots[0], max_model_len=min(lengths, default=None))

    @property
    def name(self) -> str:
        """What the servers call it."""
        return self._client.served.model

    @property
    def tokenizer(self) -> str:
        """Name or path of its tokenizer."""
        return self._client.served.tokenizer or self._root

    @property
    def num_embeddings(self) -> int:
        """Token ids that rows may have: the tokenizer's, once `check` has seen it."""
        return self._num_embeddings

    @property
    def num_positions(self) -> int | None:
        """Tokens of a row, at most: a server wants room for one that it writes."""
        return None if self._max_model_len is None else self._max_model_len - 1

    def check(self, tokenizer: PreTrainedTokenizerBase, *, init_kwargs: Mapping[str, Any] | None = None) -> None:
        """
        See whether every server reads text as this tokenizer does, all have one model, and how they are best asked.

        Args:
            tokenizer: The one that makes the rows.
            init_kwargs (`Mapping`, *optional*): Those that say where a repository is are heeded.

        Raises:
            ModelError: one of these does not hold, or a server can't be reached.
            ConfigError: a server wants an API key.
        """
        self._num_embeddings = max(tokenizer.get_vocab().values()) + 1
        self.end_ids = _read_end_ids(self.tokenizer, init_kwargs)
        ids = _known_ids(tokenizer, self.num_positions)
        for url in self._client.served.urls:
            self._check_tokenizer(url, tokenizer)
            logps = self._ask_known(url, ids)
            if self.known is None:
                self.known = logps
                self._client.remember(ids, logps, tolerance=_TOLERANCE)
            difference = float((logps - self.known).abs().mean())
            if not difference <= _TOLERANCE:
                raise ModelError(
                    f"replicas of {self._role} disagree: {url} gives a known row other log-probabilities than "
                    f"{self._client.served.urls[0]}, by {difference:.2f} nats a token. Serve one model, in one type, "
                    "on all of them."
                )
        self._reason = next(filter(None, (self._why_not_cached(url, ids) for url in self._client.served.urls)), "")
        self._client.reads_prefix = not self._reason
        logger.log(
            logging.WARNING if self._reason else logging.INFO,
            "%s is %s on %s, which has it from %s%s.",
            *(self._role, self.name, ", ".join(self._client.served.urls), self._root),
            f". What rows have in common is run with each of them: {self._reason}" if self._reason else "",
        )

    def per_token_logps(
        self,
        layout: Layout,
        *,
        token_budget: int = 0,  # noqa: ARG002 - the servers have their own
        reduce: Reduce = token_logps,
    ) -> list[Tensor]:
        """Log-probability of every completion token of every row; see `VllmClient.logps`. There is nothing else."""
        assert reduce is token_logps, "a server gives no distribution"
        return self._client.logps(layout.rows)

    def describe(self, *, token_budget: int = 0) -> dict[str, Any]:  # noqa: ARG002 - the servers have their own
        """How the model will run, for people, under the names of `CausalLM.describe`; `None` is unknown."""
        return {
            **dict.fromkeys(("weights", "adapter", "adapter_weights", "parameters", "attention")),
            "name": self.name,
            "architecture": "on vLLM servers",
            "servers": list(self._client.served.urls),
            "root": self._root,
            **dict.fromkeys(("weights_mb", "prefix_mb", "work_mb"), 0.0),
            "dtype": "the server's",
            "device": "the server's",
            "way": "served, prefix read" if self._client.reads_prefix else "served",
            "reason": self._reason,
        }

    def _ask_known(self, url: str, ids: tuple[int, ...]) -> Tensor:
        with _reaching(url, self._role):
            found = self._client.answer(url, ids, reads_prefix=False)
        assert found is not None
        if not found.logps.isfinite().all():
            raise ModelError(
                f"the server of {self._role} ({url}) gives a known row a log-probability that is not finite: the "
                "weights are broken, or their type overflows. Start it with another --dtype."
            )
        return found.logps

    def _check_tokenizer(self, url: str, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = tokenizer(_KNOWN_TEXT, add_special_tokens=False)["input_ids"]
        body = {"model": self.name, "prompt": _KNOWN_TEXT, "add_special_tokens": False}
        with _reaching(url, self._role):
            found = self._client.ask(url, "/tokenize", body=body, num_tokens=len(_KNOWN_TEXT))
        assert found is not None
        if found.get("tokens") != ids:
            raise ModelError(
                f"{self._role}_tokenizer ({self.tokenizer}) reads a known text as {shorten(ids)}, and the server "
                f"{url} as {shorten(found.get('tokens'))}. Name the server's own behind the address, ?tokenizer=NAME, "
                f"or pass {self._role}_tokenizer."
            )

    def _why_not_cached(self, url: str, ids: tuple[int, ...]) -> str:
        """Why a server's prefix cache is not read, or nothing."""
        found = None
        with _reaching(url, self._role):
            for _ in range(2):  # the first fills the cache where nobody has
                found = self._client.answer(url, ids, reads_prefix=True)
                if found is None:
                    return (
                        f"{url} has no endpoint that reads its cache, or does not say how much. Start it with "
                        "--enable-scale-out --enable-prompt-tokens-details, where vLLM's model runner is V2"
                    )
        assert found is not None
        assert self.known is not None
        if not found.read:
            return f"{url} reads nothing from its cache, where it is off (--no-enable-prefix-caching)"
        behind = slice(found.read, None)
        if not float((found.logps[behind] - self.known[behind]).abs().mean()) <= _TOLERANCE:
            return f"{url} gives other log-probabilities behind what it reads from its cache"
        return ""


def connect(models: Mapping[str, Any]) -> dict[str, ServedLM]:
    """
    Those of strong and weak that are on servers.

    Args:
        models (`Mapping`): By role names, paths, addresses or loaded models.

    Raises: as `ServedLM.connect`.
    """
    found = {
        role: read_served(model, role) for role, model in models.items() if isinstance(model, str) and is_served(model)
    }
    others = {"strong": found.get("weak"), "weak": found.get("strong")}
    return {role: ServedLM.connect(served, role, other=others[role]) for role, served in found.items()}


def warn_of_twins(served: Mapping[str, ServedLM]) -> None:
    """Say so where two servers have one model."""
    known = [lm.known for lm in served.values()]
    if len(known) < 2 or known[0] is None or known[1] is None or known[0].shape != known[1].shape:
        return
    if float((known[0] - known[1]).abs().max()) <= _EQUAL:
        names = " and ".join(repr(lm.name) for lm in served.values())
        logger.warning("strong and weak (%s) give a known row the same: every log-ratio will be 0.", names)


def _find_entry(client: "VllmClient", url: str, role: str, other: Served | None) -> dict[str, Any]:
    """What a server says of the model: `root` and `max_model_len`."""
    with _reaching(url, role):
        found = client.ask(url, "/v1/models", num_tokens=1024)
    listed = found.get("data") if found is not None else None
    entries = {
        str(entry["id"]): entry
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, Mapping) and "id" in entry
    }
    model = client.served.model
    if model not in entries and f"/{model}" in entries:
        raise ConfigError(
            f"cdr_{role} asks {url} for {model!r}, and it serves the path '/{model}'. Write its slash too: "
            f"vllm://HOST:PORT//{model}."
        )
    if model not in entries:
        is_swapped = other is not None and other.model in entries
        raise ConfigError(
            f"cdr_{role} asks {url} for {model!r}, and it serves {', '.join(map(repr, entries)) or 'nothing'}. "
            + ("The servers of strong and weak are swapped." if is_swapped else "Name one of these, or another server.")
        )
    entry = entries[model]
    base = entries.get(str(entry.get("parent")), entry)  # of a LoRA adapter, whose folder seldom has a tokenizer
    length = base.get("max_model_len")
    root = base.get("root") or model
    return {"root": str(root), "max_model_len": length if isinstance(length, int) else None}


@contextmanager
def _reaching(url: str, role: str) -> Iterator[None]:
    """One that can't be reached now is an error: before the first row nobody waits."""
    from .vllm_client import Unavailable

    try:
        yield
    except Unavailable as error:
        raise ModelError(
            f"the server of {role} ({url}) can't be reached: {error}. Start it with vllm serve, wait until "
            f"{url}/health answers, or mend the address."
        ) from error


def _known_ids(tokenizer: PreTrainedTokenizerBase, most: int | None) -> tuple[int, ...]:
    """The known row: as much text as the servers' context holds, up to what is enough."""
    room = min(_KNOWN_TOKENS, most or _KNOWN_TOKENS)
    ids = list(tokenizer(_KNOWN_TEXT, add_special_tokens=False)["input_ids"])
    while len(ids) < room:
        ids += ids
    length = max(2, (room - _BEHIND_BLOCK) // _BLOCK * _BLOCK + _BEHIND_BLOCK)
    return tuple(ids[:length])


def _read_end_ids(name: str, init_kwargs: Mapping[str, Any] | None) -> frozenset[int]:
    """Where the model's own generation stops, if its generation config is where its tokenizer is."""
    try:
        found = GenerationConfig.from_pretrained(name, **hub_kwargs(init_kwargs or {}))
    except (OSError, ValueError):
        return frozenset()
    ids = found.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
