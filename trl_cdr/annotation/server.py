"""A policy that runs elsewhere: prompts -> completions by an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...).

`writers` does the same with a model of this process. Needs the extra `server`, and imports it when it is used.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ..errors import ConfigError, ModelError
from ..scoring.sources import read_api_key
from ..scoring.types import Completion, Prompt

_AT_ONCE = 32  # requests
_ATTEMPTS = 6
_WAIT = 0.5  # seconds, before the second attempt at most; doubled with each
_SECONDS = {"connect": 10.0, "read": 600.0, "write": 60.0, "pool": None}
_APART = ("tool_calls", "reasoning_content", "reasoning")  # of a message, beside its content
_REFUSED = (401, 403, 404)  # every request would be


class _Again(Exception):
    """What may go well when it is asked again."""


class Server:
    """
    A server's chat completions.

    Args:
        url (`str`): Up to `/v1`. A key, where one is needed, is in the environment as `OPENAI_API_KEY`.
        model (`str`): The model's name there.

    Raises:
        ConfigError: the URL is none, or the extra `server` is not installed.
    """

    def __init__(self, url: str, *, model: str) -> None:
        try:
            import httpx
            import tenacity
        except ImportError as error:
            raise ConfigError(f"server needs {error.name}. Install it: pip install 'trl-cdr[server]'.") from None
        try:
            found = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"server is {url!r}: {error}. Give a URL such as http://localhost:8000/v1.") from None
        if found.scheme not in ("http", "https") or not found.host:
            raise ConfigError(f"server is {url!r}, which is no URL. Give one such as http://localhost:8000/v1.")
        self.url, self.model = url.rstrip("/"), model
        self.shown = str(found.copy_with(userinfo=b"", query=None))
        self._httpx, self._tenacity = httpx, tenacity

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        per_prompt: int,
        temperature: float,
        max_new_tokens: int,
        seeds: Sequence[str],
    ) -> list[list[Completion]]:
        """
        As `writers.write`; each completion is a request with a seed of its own, which many servers honour.

        Raises:
            ModelError: the server can't be reached, refuses, or keeps a part of what the model wrote apart.
            ConfigError: no header takes the key.
        """
        options = {"model": self.model, "temperature": temperature, "top_p": 1.0, "max_tokens": max_new_tokens}
        bodies = [
            {**options, "messages": prompt, "seed": _number(f"{seed} {number}")}
            for prompt, seed in zip(prompts, seeds, strict=True)
            for number in range(per_prompt)
        ]
        key = read_api_key("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = self._httpx.Timeout(**_SECONDS)
        with self._httpx.Client(headers=headers, timeout=timeout) as client, ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(partial(self._ask, client), bodies))
        groups = [found[start : start + per_prompt] for start in range(0, len(found), per_prompt)]
        return [[one for one in group if one is not None] for group in groups]

    def _ask(self, client: Any, body: dict[str, Any]) -> Completion | None:
        """One completion; None where the server does not take the prompt: it is too long, say."""
        retrying = self._tenacity.Retrying(
            retry=self._tenacity.retry_if_exception_type(_Again),
            wait=self._tenacity.wait_random_exponential(multiplier=_WAIT, max=30),
            stop=self._tenacity.stop_after_attempt(_ATTEMPTS),
            reraise=True,
        )
        try:
            return retrying(self._ask_once, client, body)  # type: ignore[no-any-return]
        except _Again as error:
            raise ModelError(
                f"server {self.shown!r} can't be used: {error}, after {_ATTEMPTS} attempts. What is finished stays: "
                "start it, and run the same command again."
            ) from error

    def _ask_once(self, client: Any, body: dict[str, Any]) -> Completion | None:
        try:
            answer = client.post(f"{self.url}/chat/completions", json=body)
        except self._httpx.TransportError as error:
            raise _Again(str(error) or type(error).__name__) from error
        status = answer.status_code
        said = f"status {status}: {' '.join(answer.text.split())[:200]}"
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Again(said)
        if status in _REFUSED:
            raise ModelError(f"server {self.shown!r} refuses {self.model!r} ({said}). Mend policy or OPENAI_API_KEY.")
        if status >= 400:
            return None
        try:
            choice = answer.json()["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            apart = [name for name in _APART if message.get(name)]
            if not apart and not isinstance(message["content"], str):
                raise TypeError(f"content is {message['content']!r}")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"server {self.shown!r} gave no chat completion ({error}): {said}") from error
        if apart:
            raise ModelError(
                f"server {self.shown!r} keeps {apart[0]} apart from the content, and the text as it was written is to "
                "be scored. Start it without such a parser."
            )
        finished = {"stop": True, "length": False}.get(reason)
        return Completion(message["content"], finished, is_generated=True)


def _number(seed: str) -> int:
    """A seed as servers take it."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") >> 1
