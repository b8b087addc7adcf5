"""A pair on servers: the same scores as in the process, and what is refused before a row is sent."""

import http.server
import pickle
import socket
import threading

import pytest
import torch
from pairs import preferences
from tiny import BRACKETS, answer, byte_tokenizer, chat, llama
from vllm_stand_in import StandIn, closed_port

from trl_cdr import CDRConfig, CDRReward, ConfigError, Criteria, DensityRatioScorer, DomainCriteria, ModelError
from trl_cdr.annotation.evaluate import evaluate
from trl_cdr.annotation.pair_options import known_options
from trl_cdr.annotation.passes import Passes
from trl_cdr.annotation.rank_pairs import RankOptions, rank_pairs
from trl_cdr.doctor import examine, print_examination

SERVED = {"gate": "none", "string_prompts": "text"}
CRITERIA = Criteria(
    {
        "short": DomainCriteria(instruction="A good completion is short, and says what it says once and no more."),
        "long": DomainCriteria(instruction="A good completion goes on for as long as there is anything to say."),
    }
)
PROMPTS = [chat("hello"), chat("what is this"), chat("hello"), chat("system:be quick", "the fox")]
COMPLETIONS = [answer("world"), answer("a lazy dog"), answer(""), answer("jumps over")]


@pytest.fixture
def serve(strong, weak, tokenizer, checkpoints, monkeypatch):
    """Start servers of the pair, or of others."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    models, started = {"strong": strong, "weak": weak}, []

    def start(role, **options):
        options = {"model": models[role], "tokenizer": tokenizer, "name": role, "root": checkpoints[role]} | options
        started.append(StandIn(options.pop("model"), options.pop("tokenizer"), options.pop("name"), **options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def servers(serve):
    return {role: serve(role) for role in ("strong", "weak")}


def addresses(servers):
    return {role: f"{server.address}?timeout=60" for role, server in servers.items()}


def values(scores):
    return [score.value for score in scores]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.error, one.n_tokens, one.finished, one.truncated, one.domain) == (
            *(other.error, other.n_tokens, other.finished, other.truncated),
            other.domain,
        )
    assert values(found) == pytest.approx(values(expected), abs=1e-3)


@pytest.mark.parametrize("tells", [True, False])
def test_scores_are_the_local_engine_s(serve, checkpoints, tells):
    servers = {role: serve(role, tells=tells) for role in ("strong", "weak")}
    here, there = DensityRatioScorer(**checkpoints, **SERVED), DensityRatioScorer(**addresses(servers), **SERVED)
    assert_same(there.score(PROMPTS, COMPLETIONS), here.score(PROMPTS, COMPLETIONS))
    texts = ["hello", "", "a" * 300], ["world", "a", "b"]
    cut_off = {"finished": [False, True, None]}
    expected = here.score(*texts, **cut_off)
    assert_same(there.score(*texts, **cut_off), expected)
    assert [score.truncated for score in expected] == [False, False, True]
    assert expected[1].error is not None
    ids = [[*range(70, 80), 1], [*range(80, 90)]]
    texts = [here.load().strong.encoder.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    found, expected = (one.score(["hello"] * 2, texts, completion_ids=ids) for one in (there, here))
    assert_same(found, expected)
    assert [score.n_tokens for score in found] == [11, 10]
    assert [score.per_token is not None for score in found] == [True, True]


def test_a_conditioned_pair_runs_its_criteria_once(servers, checkpoints, monkeypatch):
    monkeypatch.setattr("trl_cdr.scoring.vllm_client.AT_ONCE", 1)
    options = SERVED | {"criteria": CRITERIA}
    here, there = DensityRatioScorer(**checkpoints, **options), DensityRatioScorer(**addresses(servers), **options)
    rows = PROMPTS[:2] * 4, [answer(word) for word in "abcdefgh"]
    domains = ["short", "long"] * 4
    there.load()
    servers["strong"].computed, servers["strong"].seen = 0, []
    found = there.score(*rows, domains=domains)
    assert_same(found, here.score(*rows, domains=domains))
    sent = sum(len(body["token_ids"]) for path, body in servers["strong"].seen if "generate" in path)
    assert servers["strong"].computed < sent / 2


def test_a_router_that_asks_the_strong_model(servers, checkpoints):
    options = SERVED | {"criteria": CRITERIA, "router": "likelihood"}
    here, there = DensityRatioScorer(**checkpoints, **options), DensityRatioScorer(**addresses(servers), **options)
    assert there.route(PROMPTS) == here.route(PROMPTS)


def test_two_tokenizers(serve, checkpoints, weak, tmp_path):
    other, model = byte_tokenizer(300, template=BRACKETS, bos=True), llama(302, seed=5)
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    server = serve("weak", model=model, tokenizer=other, root=str(tmp_path))
    here = DensityRatioScorer(checkpoints["strong"], str(tmp_path), **SERVED)
    there = DensityRatioScorer(serve("strong").address, server.address, **SERVED)
    assert_same(there.score(PROMPTS, COMPLETIONS), here.score(PROMPTS, COMPLETIONS))


@pytest.mark.parametrize("gate", ["typicality", "surprise"])
def test_a_weak_model_on_a_server_beside_a_strong_one_here(serve, checkpoints, gate):
    here = DensityRatioScorer(**checkpoints, gate=gate)
    there = DensityRatioScorer(checkpoints["strong"], serve("weak").address, gate=gate)
    found, expected = there.score(PROMPTS, COMPLETIONS), here.score(PROMPTS, COMPLETIONS)
    assert_same(found, expected)
    assert [score.gated for score in found] == [score.gated for score in expected]
    assert there.describe()["weights_mb"] == pytest.approx(here.describe()["weights_mb"] / 2)


def test_strong_and_weak_are_asked_at_the_same_time(servers):
    """Each answers only when the other has been asked."""
    scorer = DensityRatioScorer(**addresses(servers), **SERVED)
    scorer.load()
    meeting = threading.Barrier(2)

    def before(path, body):
        meeting.wait(60)

    for server in servers.values():
        server.before = before
    assert scorer.score(["hello"], ["a"])[0].error is None


def test_a_pair_on_servers_can_be_described_pickled_and_unloaded(servers, checkpoints, capsys):
    reward = CDRReward(**addresses(servers), **SERVED)
    copied = pickle.loads(pickle.dumps(reward))
    assert reward(["hello"], ["a"]) == copied(["hello"], ["a"])
    described = copied.scorer.describe()["strong"]
    assert (described["name"], described["root"], described["weights"]) == ("strong", checkpoints["strong"], None)
    assert described["max_length"] == 255
    assert all(server._connections for server in servers.values())
    for one in (reward, copied):
        one.scorer.unload()
    assert reward(["hello"], ["a"]) == copied(["hello"], ["a"])
    print_examination(examine(CDRConfig.from_options(**addresses(servers), **SERVED)))
    assert f"on http://127.0.0.1:{servers['weak'].port}, which have it from {checkpoints['weak']}" in (
        capsys.readouterr().out
    )


def test_how_rows_are_sent_is_said(serve, caplog):
    cases = [
        (serve("strong", tells=False), "Start it with --enable-scale-out --enable-prompt-tokens-details"),
        (serve("strong", caches=False), "reads nothing from its cache"),
    ]
    weak = serve("weak").address
    for server, said in cases:
        caplog.clear()
        scorer = DensityRatioScorer(server.address, weak, **SERVED)
        assert said in scorer.describe()["strong"]["reason"]
        assert "What rows have in common is run with each of them" in caplog.text
        assert scorer.describe()["weak"]["way"] == "served, prefix read"
    caplog.clear()
    broken = serve("strong")

    def after(path, found):
        if "generate" in path:
            for entry in found["prompt_logprobs"][1:]:
                next(iter(entry.values()))["logprob"] -= 1
        return found

    broken.after = after
    scorer = DensityRatioScorer(broken.address, weak, **SERVED)
    assert "gives other log-probabilities behind what it reads" in scorer.describe()["strong"]["reason"]


def refused(strong, weak, error, message, **options):
    with pytest.raises(error, match=message):
        DensityRatioScorer(strong, weak, **SERVED, **options).load()


def test_servers_that_are_not_there(serve, monkeypatch):
    weak, port = serve("weak").address, closed_port()
    down = rf"server of strong \(http://127.0.0.1:{port}\) can't be reached: .*refused.*http://127.0.0.1:{port}/health"
    refused(f"vllm://127.0.0.1:{port}/strong", weak, ModelError, down)
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if host == "no.such.host":
            raise socket.gaierror(-2, "Name or service not known")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    refused("vllm://no.such.host:80/strong", weak, ModelError, "can't be reached: .*Name or service not known")
    refused("vllm://a..b:80/strong", weak, ConfigError, "cdr_strong has the address http://a..b:80, which is none")


class _Files(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b"<html>no such file")

    def log_message(self, *_):
        pass


def test_the_port_of_another_service(serve):
    with http.server.HTTPServer(("127.0.0.1", 0), _Files) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,))
        thread.start()
        address = f"vllm://127.0.0.1:{other.server_address[1]}/strong"
        refused(
            address, serve("weak").address, ModelError, "has no /v1/models: it is another service, or trl vllm-serve"
        )
        other.shutdown()
        thread.join()


def test_a_server_of_another_model(serve, servers):
    strong, weak = (server.address for server in servers.values())
    refused(f"{strong}-2", weak, ConfigError, "cdr_strong asks .* for 'strong-2', and it serves 'strong'. Name one of")
    swapped = [
        f"vllm://127.0.0.1:{servers[other].port}/{role}" for role, other in (("strong", "weak"), ("weak", "strong"))
    ]
    refused(*swapped, ConfigError, "for 'strong', and it serves 'weak'. The servers of strong and weak are swapped")
    path = serve("strong", name="/data/model").address
    refused(path.replace("//data", "/data"), weak, ConfigError, "Write its slash too: vllm://HOST:PORT//data/model")
    assert DensityRatioScorer(path, weak, **SERVED).describe()["strong"]["name"] == "/data/model"


def test_one_model_on_both_servers(serve, strong, caplog):
    twin = serve("weak", model=strong)
    DensityRatioScorer(serve("strong").address, twin.address, **SERVED).load()
    assert "('strong' and 'weak') give a known row the same: every log-ratio will be 0" in caplog.text


def test_replicas_that_disagree(serve, weak, checkpoints):
    one, partner = serve("strong").address, serve("weak").address
    same, other = serve("strong"), serve("strong", root=checkpoints["weak"])
    DensityRatioScorer(f"{one},{same.address}", partner, **SERVED).load()
    refused(f"{one},{other.address}", partner, ModelError, "replicas of strong differ: .* another has")
    same.model = weak
    refused(f"{one},{same.address}", partner, ModelError, r"replicas of strong disagree: .* by \d+\.\d\d nats a token")


def test_another_tokenizer(serve, checkpoints, tmp_path):
    weak = serve("weak").address
    other = byte_tokenizer(300)
    refused(
        serve("strong", tokenizer=other).address,
        weak,
        ModelError,
        r"strong_tokenizer \(.*\) reads a known text as .*, and the server http.* as .*\?tokenizer=NAME",
    )
    lost = serve("strong", root="/on/another/machine").address
    refused(lost, weak, ModelError, r"strong_tokenizer can't be loaded from '/on/another/machine'.*\?tokenizer=NAME")
    named = DensityRatioScorer(f"{lost}?tokenizer={checkpoints['strong']}", weak, **SERVED)
    given = DensityRatioScorer(lost, weak, strong_tokenizer=named.load().strong.encoder.tokenizer, **SERVED)
    assert values(named.score(["hello"], ["a"])) == values(given.score(["hello"], ["a"]))


def test_a_context_that_is_too_short(serve):
    short, weak = serve("strong", length=100).address, serve("weak").address
    message = r"cdr_max_length is 120, and strong \(strong\) has 99 positions. .*--max-model-len"
    refused(short, weak, ConfigError, message, max_length=120)
    [score] = DensityRatioScorer(short, weak, **SERVED).score(["a" * 300], ["b"])
    assert score.truncated


def test_a_server_whose_weights_are_broken(serve, tokenizer):
    broken = llama(len(tokenizer))
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    refused(
        serve("strong", model=broken).address,
        serve("weak").address,
        ModelError,
        "gives a known row .* not finite.*--dtype",
    )


def test_a_broken_row_is_its_own_trouble(servers):
    scorer = DensityRatioScorer(**addresses(servers), **SERVED)
    scorer.load()

    def after(path, found):
        if found["usage"]["prompt_tokens"] < 20:
            next(iter(found["prompt_logprobs"][-1].values()))["logprob"] = None
        return found

    servers["weak"].after = after
    bad, good = scorer.score(["a", "hello " * 20], ["b", "c"])
    assert "weak gave the log-probability nan at completion token" in bad.error
    assert good.error is None


def test_without_httpx(serve, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl_cdr.scoring.vllm_client", None)
    address = serve("weak").address
    refused(address, address, ConfigError, "cdr_strong is on a server, and .* is not installed. Run: pip install")


@pytest.mark.parametrize("roles", [("strong", "weak"), ("weak",)])
def test_evaluate_and_rank_pairs_take_it(servers, checkpoints, tmp_path, roles):
    """Nothing of what a server said is kept: it may have other weights tomorrow."""
    gate = "none" if "strong" in roles else "surprise"
    places = {**checkpoints, **{role: addresses(servers)[role] for role in roles}}
    data = preferences()[:6]
    here = evaluate(CDRConfig(**prefixed(checkpoints), cdr_gate=gate), data, passes=Passes(tmp_path / "here"))
    passes = Passes(tmp_path / "there")
    there = evaluate(CDRConfig(**prefixed(places), cdr_gate=gate), data, passes=passes)
    assert [row["id"] for row in there.rows] == [row["id"] for row in here.rows]
    for side in ("scores_chosen", "scores_rejected"):
        assert [row[side] for row in there.rows] == pytest.approx([row[side] for row in here.rows], abs=1e-4)
    assert there.summary["judges"] == here.summary["judges"]
    assert len([*passes.folder.glob("*.jsonl")]) == 2 - len(roles)
    again = evaluate(CDRConfig(**prefixed(places), cdr_gate=gate), data, passes=passes)
    assert again.summary["passes"]["run"] == 2 + len(roles)
    assert [row["results"] for row in again.rows] == [row["results"] for row in there.rows]
    if "strong" in roles:
        ranked = rank_pairs([*places.values()], data, RankOptions(cdr_gate="none"), passes=passes)
        assert set(ranked["models"]) == set(places.values())


def test_other_models_of_the_same_server_are_others():
    """What was scored by one is not taken for the other's; where a server is does not matter."""
    first, moved, other = (
        known_options(DensityRatioScorer(f"vllm://{place}", "vllm://h:2/W", gate="none"))
        for place in ("h:1/A", "elsewhere:1/A?timeout=9", "h:1/B")
    )
    assert first["strong_weights"] == moved["strong_weights"] == "A of a server"
    assert other["strong_weights"] == "B of a server"
    assert first["weak_weights"] == "W of a server"


def prefixed(pair):
    return {f"cdr_{role}": place for role, place in pair.items()}
