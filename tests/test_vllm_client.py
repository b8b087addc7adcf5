"""What is believed of a server's answers, and what becomes of a call when it is slow, busy, lying or dead."""

import math
import random
import threading
import time

import pytest
import torch
from vllm_stand_in import StandIn, closed_port

from trl_cdr import ConfigError, ModelError
from trl_cdr.scoring import vllm_client
from trl_cdr.scoring.causal_lm import CausalLM
from trl_cdr.scoring.packing import Layout
from trl_cdr.scoring.sources import Served
from trl_cdr.scoring.types import Row
from trl_cdr.scoring.vllm_client import VllmClient

PATIENT = 60.0


@pytest.fixture
def server(strong, tokenizer):
    server = StandIn(strong, tokenizer, "m")
    yield server
    server.kill()


@pytest.fixture
def ask(server):
    """A client of the server, of others too, with its own patience; closed at the end."""
    clients = []

    def make(*others, timeout=PATIENT, reads_prefix=False):
        urls = [f"http://127.0.0.1:{one.port}" for one in (server, *others)]
        clients.append(VllmClient(Served(tuple(urls), "m", timeout=timeout), "strong"))
        clients[-1].reads_prefix = reads_prefix
        return clients[-1].logps

    yield make
    for client in clients:
        client.close()


def rows(count, *, prompt=20, seed=0, vocabulary=300):
    """Rows of different lengths that all begin alike."""
    draw = random.Random(seed)
    start = tuple(draw.randrange(vocabulary) for _ in range(prompt))
    made = []
    for index in range(count):
        own = [draw.randrange(vocabulary) for _ in range(3 + index % 7)]
        made.append(Row((*start, *own[:2]), tuple(own[2:])))
    return made


def local(model, asked):
    return CausalLM(model, "strong").per_token_logps(Layout(asked), token_budget=4096)


def assert_equal(found, expected):
    assert [len(one) for one in found] == [len(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reads_prefix", [False, True])
def test_two_hundred_rows_at_once_come_back_each_to_its_place(server, strong, ask, reads_prefix):
    asked = rows(200)
    random.Random(1).shuffle(asked)
    assert len({row.ids for row in asked}) == 200
    assert_equal(ask(reads_prefix=reads_prefix)(asked), local(strong, asked))
    assert 1 < server.most_at_once <= vllm_client.AT_ONCE
    assert len(server._connections) <= vllm_client.AT_ONCE  # kept, and used again


def test_nothing_is_asked_for_nothing(server, ask):
    assert ask()([]) == []
    assert server.seen == []


def test_rows_that_begin_alike_follow_one_another(server, ask, monkeypatch):
    monkeypatch.setattr(vllm_client, "AT_ONCE", 1)
    asked = [*rows(3, seed=1), *rows(3, seed=2)]
    ask()([asked[index] for index in (0, 3, 1, 4, 2, 5)])
    starts = [body["prompt"][0] for _, body in server.seen]
    assert starts == sorted(starts)


def test_a_prefix_is_run_once_where_the_server_tells_what_it_read(server, strong, ask, monkeypatch):
    monkeypatch.setattr(vllm_client, "AT_ONCE", 1)
    asked = rows(8, prompt=100)
    assert_equal(ask()(asked), local(strong, asked))
    without, server.computed = server.computed, 0
    server._blocks.clear()
    assert_equal(ask(reads_prefix=True)(asked), local(strong, asked))
    assert server.computed < without / 3


def test_a_completion_that_is_in_the_cache_is_run_again(server, strong, ask):
    """What was read has no log-probabilities of its own, and leftovers in their place."""
    [row] = rows(1, prompt=20)
    longer = Row(row.prompt_ids, row.completion_ids * 20)
    for _ in range(2):
        assert_equal(ask(reads_prefix=True)([longer]), local(strong, [longer]))
    assert [path for path, _ in server.seen] == ["/inference/v1/generate"] * 2 + ["/v1/completions"]


def test_a_server_that_leaves_out_what_it_read(server, strong, ask):
    def shorten(path, answer):
        read = answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
        answer["prompt_logprobs"] = answer["prompt_logprobs"][:1] + answer["prompt_logprobs"][read + 1 :]
        return answer

    asked = rows(4, prompt=40)
    ask(reads_prefix=True)(asked)
    server.after = shorten
    others = [Row(row.prompt_ids, row.completion_ids[::-1]) for row in asked]
    assert_equal(ask(reads_prefix=True)(others), local(strong, others))


def test_replicas_get_a_stretch_each(server, strong, tokenizer, ask):
    second = StandIn(strong, tokenizer, "m")
    asked = rows(10)
    assert_equal(ask(second)(asked), local(strong, asked))
    assert len(server.seen) == len(second.seen) == 5
    first_ids = [body["prompt"] for _, body in server.seen]
    assert max(first_ids) < min(body["prompt"] for _, body in second.seen)
    second.kill()
    assert_equal(ask(second)(asked), local(strong, asked))  # and all of them go to the one that is left


def test_nobody_waits_for_a_replica_that_does_not_come_back(server, strong, tokenizer, ask, monkeypatch):
    """Connecting takes long where nothing refuses it: one row tries, the others are scored by the next replica."""
    second = StandIn(strong, tokenizer, "m")
    asked, known = rows(80), rows(1, seed=1)
    expected, probes = local(strong, asked), []
    client = ask(second, timeout=20.0).__self__
    client.remember(known[0].ids, torch.cat(local(strong, [Row(known[0].ids[:1], known[0].ids[1:])])), tolerance=1e-3)
    gone, real = client.served.urls[0], client.answer
    client._lost.add(gone)

    def answer(url, ids, **options):
        if url != gone:
            return real(url, ids, **options)
        probes.append(ids)
        time.sleep(0.5)  # 40 of them, one after the other, would take all the time that there is
        raise vllm_client.Unavailable("no connection", is_lost=True)

    monkeypatch.setattr(client, "answer", answer)
    assert_equal(client.logps(asked), expected)
    assert 0 < len(probes) < 20
    monkeypatch.setattr(client, "answer", real)
    assert_equal(client.logps(asked), expected)  # it is back, and the same
    assert not client._lost
    second.kill()


def test_a_replica_that_never_answers_leaves_time_for_the_next(server, strong, tokenizer, ask):
    second = StandIn(strong, tokenizer, "m")
    held = threading.Event()
    second.before = lambda path, body: held.wait(PATIENT) and None
    asked = rows(4)
    assert_equal(ask(second, timeout=12.0)(asked), local(strong, asked))
    held.set()
    second.kill()


@pytest.mark.parametrize("key", ["secret\nnext", "s\u00e9cret"])
def test_a_key_that_no_header_takes_is_not_shown(key, ask, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ConfigError, match="^VLLM_API_KEY holds a line break or another character") as error:
        ask()
    assert "cret" not in str(error.value)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_has_no_time_is_asked_again(server, strong, ask, status):
    refused = []

    def before(path, body):
        if len(refused) < 3:
            refused.append(path)
            return status, b'{"error": {"message": "overloaded"}}', {}
        return None

    server.before = before
    asked = rows(4)
    assert_equal(ask()(asked), local(strong, asked))
    assert len(server.seen) == 4 + 3


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_never_has_time(server, ask, status):
    server.before = lambda path, body: (status, b'{"error": {"message": "too much to do"}}', {})
    with pytest.raises(ModelError, match=rf"server of strong \(http.*within \d+ s: {status}, too much to do.*timeout="):
        ask(timeout=0.3)(rows(40))


def test_a_slow_server(server, strong, ask):
    server.before = lambda path, body: time.sleep(0.2)
    asked = rows(2)
    assert_equal(ask()(asked), local(strong, asked))
    server.before = lambda path, body: time.sleep(1)
    with pytest.raises(ModelError, match="gave no log-probabilities within .* no answer to /v1/completions"):
        ask(timeout=0.2)(asked)


def kill_at(server, number, after):
    """Kill the server in the midst of a request, and do the rest meanwhile."""
    first, killed = threading.Lock(), threading.Event()

    def then():
        server.kill()
        killed.set()
        after()

    def before(path, body):
        # Requests run at once: the number may be passed before anyone looks.
        if len(server.seen) >= number and first.acquire(blocking=False):
            threading.Thread(target=then).start()
            killed.wait(30)

    server.before = before


def test_a_server_that_is_killed_and_comes_back(server, strong, ask):
    asked = rows(60)
    kill_at(server, 20, server.start)
    assert_equal(ask()(asked), local(strong, asked))
    assert len(server.seen) > 60


def test_a_server_that_is_killed_and_stays_away(server, ask):
    killed = threading.Event()
    kill_at(server, 20, killed.set)
    with pytest.raises(
        ModelError, match=r"server of strong .* gave no log-probabilities within .*: .+Nothing was scor"
    ):
        ask(timeout=0.5)(rows(60))
    assert killed.wait(PATIENT)
    server.start()


def test_a_server_that_comes_back_as_another_one(server, weak, ask):
    asked = rows(60)
    client = ask().__self__
    known = asked[0].ids
    logps = client.answer(client.served.urls[0], known, reads_prefix=False).logps
    client.remember(known, logps, tolerance=0.05)

    def swap():
        server.model = weak
        server.start()

    kill_at(server, 20, swap)
    with pytest.raises(ModelError, match="was lost and is back with another model"):
        client.logps(asked)


def entry(answer):
    return answer["choices"][0]["prompt_logprobs"]


LIES = {
    "one too few": (lambda answer: entry(answer).pop(), "gave 24 log-probabilities for 25 tokens"),
    "none": (lambda answer: answer["choices"][0].pop("prompt_logprobs"), "gave no log-probabilities"),
    "no choice": (lambda answer: answer["choices"].clear(), "gave no log-probabilities"),
    "a token without": (lambda answer: entry(answer).__setitem__(-1, None), r"gave none for the token \d+ at 24"),
    "another token": (
        lambda answer: entry(answer).__setitem__(-1, {"9999": {"logprob": -1.0}}),
        r"gave none for the token \d+ at 24, but {'9999'",
    ),
    "a probability": (
        lambda answer: entry(answer)[-1].update({key: {"logprob": 0.5} for key in entry(answer)[-1]}),
        "gave the log-probability 0.5, which is none",
    ),
    "text": (
        lambda answer: entry(answer)[-1].update({key: {"logprob": "-1"} for key in entry(answer)[-1]}),
        "gave the log-probability '-1', which is none",
    ),
    "another model": (lambda answer: answer.update(model="other"), "answered as 'other', and was asked for 'm'"),
    "other tokens": (lambda answer: answer["usage"].update(prompt_tokens=7), "says that it ran .* of a row of 25"),
    "no usage": (lambda answer: answer.update(usage=[]), None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies(server, strong, ask, lie):
    tell, message = LIES[lie]

    def after(path, answer):
        tell(answer)
        return answer

    server.after = after
    asked = rows(3)[2:]  # of 25 tokens
    if message is None:
        assert_equal(ask()(asked), local(strong, asked))
    else:
        with pytest.raises(ModelError, match=rf"server of strong \(http://127.*{message}"):
            ask()(asked)
        assert len(server.seen) == 1  # no answer is better at the second time


@pytest.mark.parametrize(("told", "meant"), [(None, math.nan), (math.nan, math.nan), (-9999.0, -math.inf)])
def test_a_model_that_gives_no_number_is_the_row_s_trouble(server, ask, told, meant):
    def after(path, answer):
        for own in entry(answer)[-1].values():
            own["logprob"] = told
        return answer

    server.after = after
    [found] = ask()(rows(3)[2:])
    assert found[-1].item() == pytest.approx(meant, nan_ok=True)
    assert found[:-1].isfinite().all()


def test_a_server_that_says_it_read_more_than_there_is(server, ask):
    def after(path, answer):
        answer["usage"]["prompt_tokens_details"]["cached_tokens"] = 1000
        return answer

    server.after = after
    with pytest.raises(ModelError, match="says that it ran .*1000.* of a row of 25 tokens"):
        ask(reads_prefix=True)(rows(3)[2:])


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ((200, b"x" * 10**6, {}), ModelError, "answered /v1/completions with more than the 91,136 bytes that it may"),
        ((200, b"<html>", {}), ModelError, "answers /v1/completions with b'<html>': it is another service"),
        ((200, b"[1]", {}), ModelError, "it is another service"),
        ((404, b"<html>not here", {}), ModelError, "has no /v1/completions: it is another service, or trl vllm-serve"),
        (
            (307, b"", {"Location": "http://elsewhere/v1"}),
            ModelError,
            "sends /v1/completions on to http://elsewhere/v1",
        ),
        ((400, b'{"error": {"message": "too long"}}', {}), ModelError, r"refuses /v1/completions \(400\): too long"),
        ((500, b"oh\nno", {}), ModelError, r"refuses /v1/completions \(500\): oh no"),
        ((401, b"", {}), ConfigError, r"wants an API key.* VLLM_API_KEY, which is not set"),
    ],
)
def test_an_answer_that_is_none(server, ask, reply, error, message, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server.before = lambda path, body: reply
    with pytest.raises(error, match=message):
        ask()(rows(3)[2:])


def test_the_api_key(server, strong, ask, monkeypatch):
    server.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with pytest.raises(ConfigError, match="VLLM_API_KEY, which it does not take"):
        ask()(rows(1))
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    asked = rows(1)
    assert_equal(ask()(asked), local(strong, asked))


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_server_without_the_other_endpoint_is_asked_at_the_first(server, strong, ask, status):
    server.before = lambda path, body: (status, b"", {}) if "generate" in path else None
    asked = rows(2)
    assert_equal(ask(reads_prefix=True)(asked), local(strong, asked))


def test_where_nobody_listens():
    client = VllmClient(Served((f"http://127.0.0.1:{closed_port()}",), "m", timeout=0.2), "weak")
    with pytest.raises(ModelError, match=r"server of weak .* gave no log-probabilities within 0 s: .*refused"):
        client.logps(rows(1))
    client.close()
