"""Token ids -> log-probabilities over HTTP: one model on vLLM servers, asked row by row, believed where it adds up.

Knows no text and no tokenizer: `served_lm` is a model of the pair that asks through this, and checks whom it asks.

vLLM reads nothing from its prefix cache for a request that wants `prompt_logprobs`: what is read is not computed, and
has none (vllm#28194). At `/inference/v1/generate` a request may ask for the cache all the same. The log-probabilities
of what was read are then missing, or left over from another request; those behind it are right. So rows go there only
where the server has that endpoint (`--enable-scale-out`) and tells with each answer how many tokens it read
(`--enable-prompt-tokens-details`), and once more elsewhere where these reach into the completion. Elsewhere is
`/v1/completions`, which runs the prefix with every row.
"""

import json
import math
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import httpx
import torch
from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_any,
    stop_before_delay,
    stop_when_event_set,
    wait_exponential,
)
from tenacity.nap import sleep_using_event
from torch import Tensor

from ..errors import ConfigError, ModelError
from .sources import Served, read_api_key
from .types import Row, shorten

# Rows that wait for one replica. vLLM batches as many as it has room for, and queues the rest.
AT_ONCE = 32
_CONNECT_SECONDS = 10.0
_LAST_SECONDS = 1.0  # that a try has at least, so that the last one says what is wrong
# What a server says while it starts, or has too much to do. Everything else is said for good.
_BUSY = (429, 502, 503, 504)
_TOO_MANY = 429
# Of an answer: at most so many bytes, and so many more for each token of the row.
_BYTES, _TOKEN_BYTES = 2**16, 2**10
# vLLM writes minus infinity so, for which JSON has no word.
_MINUS_INFINITY = -9999.0
# A log-probability that is larger is none: rounding alone does not get there.
_LARGEST_LOGP = 0.01


class Unavailable(Exception):
    """A server can't be reached or has no time: worth another try. `is_lost`: it may be another one when it is back."""

    def __init__(self, reason: str, *, is_lost: bool) -> None:
        super().__init__(reason)
        self.is_lost = is_lost


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What a server gave for a sequence.

    Attributes:
        logps (`Tensor` of shape (T - 1,)): Log-probability of every token but the first, nats; NaN where it is unknown.
        read (`int`): The first so many tokens came out of its prefix cache: what they predict is unknown.
    """

    logps: Tensor
    read: int


class VllmClient:
    """
    One model on its servers.

    Connections are kept and used again; safe to call from several threads. Rows go out in the order of their ids, so
    that those that begin alike follow one another, each replica a stretch of them.

    Args:
        served (`Served`): Addresses, name, patience.
        role (`str`): `"strong"` or `"weak"`, for messages.

    Attributes:
        reads_prefix (`bool`): Rows are sent so that the servers read what they have of them from their prefix cache.
        close (`Callable`): Lets go of the connections, as the end of the client does.
    """

    def __init__(self, served: Served, role: str) -> None:
        self.served = served
        self.reads_prefix = False
        self._role = role
        key = read_api_key("VLLM_API_KEY")
        self._has_key = bool(key)
        most = AT_ONCE * len(served.urls)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
        )
        self._known: tuple[tuple[int, ...], Tensor, float] | None = None
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._recognising = {url: threading.Lock() for url in served.urls}
        self.close = weakref.finalize(self, self._http.close)

    def remember(self, ids: tuple[int, ...], logps: Tensor, *, tolerance: float) -> None:
        """
        How the model is known again by a server that was lost and is back.

        Args:
            ids (`tuple[int, ...]`): A sequence.
            logps (`Tensor` of shape (T - 1,)): Its log-probabilities, nats.
            tolerance (`float`): By how much another answer may differ in the mean, nats a token.
        """
        self._known = ids, logps, tolerance

    def logps(self, rows: Sequence[Row]) -> list[Tensor]:
        """
        Log-probability of every completion token of every row.

        Args:
            rows (`Sequence[Row]`): Each fits the servers' context.

        Returns:
            `list[Tensor]`: in the rows' order, each of shape (C,), float32, nats. NaN or minus infinity where the model
            gave that.

        Raises:
            ModelError: a server can't be reached within the time-out, refuses a row, or gives what is no answer to it.
            ConfigError: it wants an API key.
        """
        stop = threading.Event()  # one error is enough: those that wait for another try give up
        with ThreadPoolExecutor(max_workers=AT_ONCE * len(self.served.urls)) as pool:
            futures = {
                index: pool.submit(self._ask_until, rows[index], replica=replica, stop=stop)
                for replica, index in self._order(rows)
            }
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return [futures[index].result() for index in range(len(rows))]

    def answer(self, url: str, ids: Sequence[int], *, reads_prefix: bool, until: float | None = None) -> Answer | None:
        """
        Ask one replica, once.

        Args:
            url (`str`): The replica.
            ids (`Sequence[int]`): Two tokens or more.
            reads_prefix (`bool`): Let it read its prefix cache.
            until (`float`, *optional*): When to give up, as `time.monotonic` counts; by default after the time-out.

        Returns:
            `Answer` or `None`: the latter where `reads_prefix` was asked for, and the server has no such endpoint or
            does not tell what it read.

        Raises:
            Unavailable: another try may help.
            ModelError, ConfigError: none will.
        """
        body: dict[str, Any] = {"model": self.served.model}
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        if reads_prefix:
            # What is left over may be no token: it can't be detokenized.
            params |= {"skip_reading_prefix_cache": False, "detokenize": False}
            path, body = "/inference/v1/generate", body | {"token_ids": [*ids], "sampling_params": params}
        else:
            path, body = "/v1/completions", body | {"prompt": [*ids], **params}
        found = self.ask(url, path, body=body, num_tokens=len(ids), optional=reads_prefix, until=until)
        if found is None:
            return None
        if found.get("model", self.served.model) != self.served.model:
            raise self._error(url, f"answered as {shorten(found['model'])}, and was asked for {self.served.model!r}")
        usage = _mapping(found.get("usage"))
        read = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens") if reads_prefix else 0
        if not isinstance(read, int):
            return None
        if not 0 <= read < len(ids) or usage.get("prompt_tokens", len(ids)) != len(ids):
            raise self._error(url, f"says that it ran {dict(usage)} of a row of {len(ids)} tokens")
        entries = found.get("prompt_logprobs") if reads_prefix else _entries(found)
        return Answer(self._read_logps(url, entries, ids, read), read)

    def ask(
        self,
        url: str,
        path: str,
        *,
        body: Any = None,
        num_tokens: int = 0,
        optional: bool = False,
        until: float | None = None,
    ) -> dict[str, Any] | None:
        """
        What a server answers: a JSON object, or `None` where it has no such path and need not have it.

        Raises: as `answer`.
        """
        now, whole = time.monotonic(), self.served.timeout
        left = whole if until is None else max(until - now, min(whole, _LAST_SECONDS))
        method, timeout = "GET" if body is None else "POST", httpx.Timeout(left, connect=min(_CONNECT_SECONDS, left))
        try:
            with self._http.stream(method, url + path, json=body, timeout=timeout) as response:
                most = _BYTES + _TOKEN_BYTES * num_tokens
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > most:
                        raise self._error(url, f"answered {path} with more than the {most:,} bytes that it may take")
                    if time.monotonic() > now + left:
                        raise Unavailable(f"{path} was answered too slowly", is_lost=True)
        except (httpx.InvalidURL, UnicodeError) as error:  # the latter of a host that no resolver takes
            raise ConfigError(f"cdr_{self._role} has the address {url}, which is none: {error}. Mend it.") from error
        except httpx.TimeoutException as error:
            raise Unavailable(f"no answer to {path} ({type(error).__name__})", is_lost=True) from error
        except httpx.TransportError as error:
            raise Unavailable(str(error) or type(error).__name__, is_lost=True) from error
        return self._read(url, path, response, bytes(content), optional=optional)

    def _order(self, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
        """Pairs of a replica and a row, as they are sent."""
        order = sorted(range(len(rows)), key=lambda index: rows[index].ids)
        count = len(self.served.urls)
        stretches = [order[len(order) * part // count : len(order) * (part + 1) // count] for part in range(count)]
        for level in zip_longest(*stretches):
            yield from ((replica, index) for replica, index in enumerate(level) if index is not None)

    def _ask_until(self, row: Row, *, replica: int, stop: threading.Event) -> Tensor:
        """A row's log-probabilities, however often its replica, or the next one, has to be asked."""
        urls, started = self.served.urls, time.monotonic()
        until = started + self.served.timeout
        tries = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_exponential(multiplier=0.1, max=5),  # no jitter: that draws from the global random state
            stop=stop_any(stop_before_delay(self.served.timeout), stop_when_event_set(stop)),
            sleep=sleep_using_event(stop),
            reraise=True,
        )
        url = urls[replica]
        try:
            for attempt in tries:
                with attempt:
                    url = urls[(replica + attempt.retry_state.attempt_number - 1) % len(urls)]
                    share = self.served.timeout / len(urls)  # one that never answers leaves time for the next
                    return self._ask_once(url, row, min(until, time.monotonic() + share))
        except Unavailable as error:
            seconds = time.monotonic() - started
            raise self._error(
                url,
                f"gave no log-probabilities within {seconds:.0f} s: {error}. Nothing was scored: see to the server, or "
                f"wait longer with ?timeout=SECONDS behind the address (now {self.served.timeout:g})",
            ) from error
        raise AssertionError("tenacity ends with a result or an error")

    def _ask_once(self, url: str, row: Row, until: float) -> Tensor:
        try:
            self._recognise(url, until)
            first = len(row.prompt_ids)  # of the completion
            found = self.answer(url, row.ids, reads_prefix=True, until=until) if self.reads_prefix else None
            if found is None or found.read >= first:
                found = self.answer(url, row.ids, reads_prefix=False, until=until)
        except Unavailable as error:
            if error.is_lost:
                with self._lock:
                    self._lost.add(url)
            raise
        assert found is not None
        return found.logps[first - 1 :]

    def _recognise(self, url: str, until: float) -> None:
        """
        Whether a server that was lost, and is back, still has the same model. One row asks; the others do not wait for
        the answer, which may take as long as a connection, but go on to the next replica.
        """
        if url not in self._lost or self._known is None:
            return
        if not self._recognising[url].acquire(blocking=False):
            raise Unavailable("it was lost, and is being asked whether it is back", is_lost=False)
        try:
            if url not in self._lost:
                return
            ids, logps, tolerance = self._known
            found = self.answer(url, ids, reads_prefix=False, until=until)
            assert found is not None
            if not (found.logps - logps).abs().mean() <= tolerance:
                raise self._error(
                    url,
                    "was lost and is back with another model: a known row has other log-probabilities. Start it with "
                    "the one that it had",
                )
            with self._lock:
                self._lost.discard(url)
        finally:
            self._recognising[url].release()

    def _read(
        self, url: str, path: str, response: httpx.Response, content: bytes, *, optional: bool
    ) -> dict[str, Any] | None:
        """A response's object, or what its status means."""
        status = response.status_code
        if status in _BUSY:
            raise Unavailable(f"{status}, {_message(content)}", is_lost=status != _TOO_MANY)
        # 403 where it is not enabled, 500 where what is left over in place of a log-probability is no number for JSON;
        # whatever else is wrong is so elsewhere.
        if optional and status >= 400:
            return None
        if status == 401:
            given = "which it does not take" if self._has_key else "which is not set"
            raise ConfigError(
                f"the server of {self._role} ({url}) wants an API key. It is read from the environment "
                f"variable VLLM_API_KEY, {given}. Set it to the server's."
            )
        if response.is_redirect:
            place = response.headers.get("location", "nowhere")
            raise self._error(url, f"sends {path} on to {place}. Name the server itself: rows and key go nowhere else")
        if status == 404 and _error_text(content) is None:
            raise self._error(
                url,
                f"has no {path}: it is another service, or trl vllm-serve, which writes for the policy. Start the "
                "model with vllm serve",
            )
        if status != 200:
            raise self._error(url, f"refuses {path} ({status}): {_message(content)}")
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._error(url, f"answers {path} with {shorten(content)}: it is another service")
        return found

    def _read_logps(self, url: str, entries: Any, ids: Sequence[int], read: int) -> Tensor:
        """The tokens' log-probabilities, from a list with one entry for each or for each that was not read."""
        if not isinstance(entries, list) or len(entries) not in (len(ids), len(ids) - read):
            count = len(entries) if isinstance(entries, list) else "no"
            raise self._error(url, f"gave {count} log-probabilities for {len(ids)} tokens")
        logps = [math.nan] * len(ids)
        for place in range(read + 1, len(ids)):
            entry = entries[place - len(ids)]
            own = entry.get(str(ids[place])) if isinstance(entry, Mapping) else None
            if not isinstance(own, Mapping) or "logprob" not in own:
                raise self._error(url, f"gave none for the token {ids[place]} at {place}, but {shorten(entry)}")
            logps[place] = self._read_logp(url, own["logprob"])
        return torch.tensor(logps[1:], dtype=torch.float32)

    def _read_logp(self, url: str, value: Any) -> float:
        if value is None:  # of NaN, for which JSON has no word
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value > _LARGEST_LOGP:
            raise self._error(url, f"gave the log-probability {shorten(value)}, which is none")
        return -math.inf if value <= _MINUS_INFINITY else float(value)

    def _error(self, url: str, what: str) -> ModelError:
        return ModelError(f"the server of {self._role} ({url}) {what}.")


def _entries(found: Mapping[str, Any]) -> Any:
    """The prompt's log-probabilities in an answer of `/v1/completions`; `None` where it holds none."""
    choices = found.get("choices")
    is_one = isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], Mapping)
    return choices[0].get("prompt_logprobs") if is_one else None  # type: ignore[index]


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _error_text(content: bytes) -> str | None:
    """The message of an error as vLLM words it, old and new."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    for place in (found, found.get("error")) if isinstance(found, dict) else ():
        if isinstance(place, dict) and isinstance(place.get("message"), str):
            return str(place["message"])
    return None


def _message(content: bytes) -> str:
    """What an error says, on one line."""
    text = _error_text(content) or content.decode("utf-8", "replace")
    return " ".join(text.split())[:300] or "and nothing more"
