"""A pair on real vLLM servers, on loopback: `nox -s vllm` makes the environment, and names it by `TRL_CDR_VLLM`."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny import BRACKETS, answer, byte_tokenizer, chat, llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_stand_in import closed_port

from trl_cdr import Criteria, DensityRatioScorer, DomainCriteria, ModelError

pytestmark = pytest.mark.vllm
START_SECONDS = 600
SENTENCE = "what is this and that the quick brown fox jumps over a lazy dog while nobody looks 42 café 東京 ( ) , ."
WORDS = SENTENCE.split()
CRITERIA = Criteria(
    {
        "short": DomainCriteria(instruction="A good completion is short: it says what it has to say once. " * 12),
        "long": DomainCriteria(instruction="A good completion goes on for as long as there is anything to say. " * 12),
    }
)


class Server:
    """`vllm serve`, in a process group of its own."""

    def __init__(self, path, log, *options):
        self.path, self.port, self._log, self.options = str(path), closed_port(), log, options
        self.start()

    @property
    def address(self):
        return f"vllm://127.0.0.1:{self.port}/{self.path}?timeout={START_SECONDS}"

    def start(self):
        command = [os.environ["TRL_CDR_VLLM"], "serve", self.path, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", *self.options]
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("PYTHONPATH", None)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self):
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self.process.poll() is None, self._log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise AssertionError(self._log.read_text()[-4000:])

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)


def tiny_pair(folder):
    """With two tokenizers; heads of 64 are what vLLM takes on a CPU."""
    tokenizers = {"strong": byte_tokenizer(), "weak": byte_tokenizer(300, template=BRACKETS, bos=True)}
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "positions": 1024}
    for seed, (role, tokenizer) in enumerate(tokenizers.items()):
        llama(len(tokenizer), seed=seed, initializer_range=0.1, **shape).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return {role: folder / role for role in tokenizers}


def smollm_pair(folder, weak):
    """SmolLM2-135M, and either the folder that `TRL_CDR_STRONG` names or the same model, less sure of all it says."""
    strong = os.environ.get("TRL_CDR_STRONG")
    if strong is None:
        strong = folder / "strong"
        model = AutoModelForCausalLM.from_pretrained(weak)
        model.model.norm.weight.data *= 0.8
        model.save_pretrained(strong)
        AutoTokenizer.from_pretrained(weak).save_pretrained(strong)
    return {"strong": strong, "weak": weak}


@pytest.fixture(scope="module", params=["tiny", "smollm"])
def servers(request, tmp_path_factory):
    """Both models of a pair; of the tiny one the weak server does not tell what it reads from its cache."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        paths = tiny_pair(folder)
    else:
        paths = smollm_pair(folder, request.getfixturevalue("smollm_folder"))
    options = {role: ["--enable-scale-out", "--enable-prompt-tokens-details"] for role in ("strong", "weak")}
    if request.param == "tiny":
        options["weak"] = []
    started = {}
    try:
        for role, path in paths.items():
            started[role] = Server(path, folder / f"{role}.log", *options[role])
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.stop()


def rows(count, seed=0, group=5):
    draw = random.Random(seed)

    def say(most):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    prompts = [chat(say(12)) for _ in range(count // group)]
    return [prompt for prompt in prompts for _ in range(group)], [answer(say(24)) for _ in range(count)]


@pytest.fixture
def scorers(servers):
    def make(**options):
        here = {role: server.path for role, server in servers.items()}
        there = {role: server.address for role, server in servers.items()}
        return [DensityRatioScorer(**pair, gate="none", **options) for pair in (here, there)]

    return make


def assert_same(found, expected, tolerance=1e-3):
    """And how large the largest difference is, of a completion's log-probability or ratio, nats."""
    differences = []
    assert [score.error for score in found] == [score.error for score in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.n_tokens, one.finished, one.truncated) == (other.n_tokens, other.finished, other.truncated)
        for name in ("strong_logps", "weak_logps", "value"):
            differences.append(abs(getattr(one, name) - getattr(other, name)))
    assert max(differences) <= tolerance
    return max(differences)


def timed(action, *args, **kwargs):
    """What comes of it, and seconds."""
    started = time.perf_counter()
    found = action(*args, **kwargs)
    return found, time.perf_counter() - started


def warm(*scorers, **options):
    """The first call loads, and tries ways to run rows."""
    for scorer in scorers:
        scorer.score(*rows(5, seed=9), **options)


def test_two_hundred_rows(scorers):
    here, there = scorers()
    warm(here, there)
    asked = rows(200)
    expected, seconds = timed(here.score, *asked)
    found, elsewhere = timed(there.score, *asked)
    tokens = sum(score.n_tokens for score in expected)
    error = assert_same(found, expected)
    print(f"\n200 rows, {tokens} tokens: largest error {error:.1e}, here {seconds:.1f} s, there {elsewhere:.1f} s")


def test_conditioned_and_again(scorers, servers):
    """The second time all rows are in the caches, the prompt's tokens and the completion's."""
    here, there = scorers(criteria=CRITERIA)
    asked = rows(40, seed=1)
    domains = ["short", "long"] * 20
    warm(here, there, domains=domains[:5])
    expected, seconds = timed(here.score, *asked, domains=domains)
    described = there.describe()
    # With vLLM's V1 model runner, which a CPU has, leftovers decide whether a cache can be read; see RESULTS.md.
    assert described["strong"]["way"] in ("served", "served, prefix read")
    if not servers["weak"].options:
        assert described["weak"]["way"] == "served"
    for _ in range(2):
        found, elsewhere = timed(there.score, *asked, domains=domains)
        error = assert_same(found, expected)
        ways = [described[role]["way"] for role in ("strong", "weak")]
        print(
            f"\n40 conditioned rows: largest error {error:.1e}, here {seconds:.1f} s, there {elsewhere:.1f} s, {ways}"
        )
    cut = ["a " * 2000, "b"], ["c", "d"]
    found = there.score(*cut, domains=["short"] * 2)
    assert [score.truncated for score in found] == [True, False]


def test_a_server_that_is_killed_and_comes_back(scorers, servers):
    """In the middle of a call, which goes on when the server is back; another one does not wait for so long."""
    here, there = scorers()
    addresses = {role: server.address for role, server in servers.items()}
    addresses["strong"] = addresses["strong"].replace(f"={START_SECONDS}", "=30")
    impatient = DensityRatioScorer(**addresses, gate="none")
    asked = rows(50, seed=2)
    expected = here.score(*asked)
    for scorer in (there, impatient):
        scorer.load()
    strong = servers["strong"]
    told = []

    def kill():
        strong.stop(signal.SIGKILL)
        told.append(strong.process.returncode)
        try:
            impatient.score(*asked)
        except ModelError as error:
            told.append(str(error))
        strong.start()

    thread = threading.Timer(0.3, kill)
    thread.start()
    found = [score for _ in range(2) for score in there.score(*asked)]
    thread.join()
    strong.wait()
    assert told[0] == -signal.SIGKILL
    assert "gave no log-probabilities within" in told[1]
    assert "Nothing was scored" in told[1]
    assert_same(found, expected * 2)


@pytest.mark.parametrize("servers", ["smollm"], indirect=True)
def test_beside_the_official_client(scorers, servers):
    """What three make of the same rows, and how long they take. The client is last: it fills the servers' caches."""
    here, there = scorers()
    warm(here, there)
    calls = [(8, 0), (64, 0), (8, 400)]  # rows, and words of what all begin with
    asked, ours = [], []
    for count, words in calls:
        system = (
            [{"role": "system", "content": " ".join(random.Random(count).choices(WORDS, k=words))}] if words else []
        )
        prompts, completions = rows(count, seed=count + words, group=4)
        asked.append(([system + prompt for prompt in prompts], completions))
        expected, seconds = timed(here.score, *asked[-1], finished=[False] * count)
        found, elsewhere = timed(there.score, *asked[-1], finished=[False] * count)
        assert_same(found, expected)
        ours.append((found, seconds, elsewhere))
    given = {
        "servers": {
            f"{role}_{name}": value
            for role, server in servers.items()
            for name, value in (("model_name", server.path), ("port", server.port))
        },
        "calls": [[p + c for p, c in zip(*each, strict=True)] for each in [rows(5, seed=9), *asked]],
    }
    official = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("official_client.py"))],
        input=json.dumps(given),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers = json.loads(official.stdout.splitlines()[-1])[1:]
    described = there.describe()
    print(f"\n{[described[role]['way'] for role in ('strong', 'weak')]}")
    print("   rows  words before  here, s  there, s  official client, s")
    for (count, words), (found, seconds, elsewhere), other in zip(calls, ours, answers, strict=True):
        print(f"{count:7} {words:13} {seconds:8.1f} {elsewhere:9.1f} {other['seconds']:19.1f}")
        for score, row in zip(found, other["rows"], strict=True):
            # It leaves out the end of the turn, which is SmolLM2's padding too, and counts the line break behind it.
            assert score.strong_logps == pytest.approx(sum(row["strong"][:-1]), abs=1e-3)
            assert score.weak_logps == pytest.approx(sum(row["weak"][:-1]), abs=1e-3)
