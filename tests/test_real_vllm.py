"""A pair on real vLLM servers, on loopback: `nox -s vllm` makes the environment, and names it by `TRL_CDR_VLLM`."""

import os
import random
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from tiny import BRACKETS, answer, byte_tokenizer, chat, llama
from vllm_stand_in import closed_port

from trl_cdr import Criteria, DensityRatioScorer, DomainCriteria

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smollm_folder):
    """Of each pair two folders. The tiny pair's tokenizers differ; heads of 64 are what vLLM takes on a CPU."""
    made = {}
    for role, tokenizer, seed in (
        ("strong", byte_tokenizer(), 0),
        ("weak", byte_tokenizer(300, template=BRACKETS, bos=True), 1),
    ):
        made[role] = tmp_path_factory.mktemp("tiny") / role
        shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "positions": 1024}
        llama(len(tokenizer), seed=seed, initializer_range=0.1, **shape).save_pretrained(made[role])
        tokenizer.save_pretrained(made[role])
    strong = os.environ.get("TRL_CDR_STRONG") or smollm_folder
    return {"tiny": made, "smollm": {"strong": strong, "weak": smollm_folder}}


@pytest.fixture(scope="module", params=["tiny", "smollm"])
def servers(request, folders, tmp_path_factory):
    """Both models of a pair; of the tiny one the weak server does not tell what it reads from its cache."""
    folder = tmp_path_factory.mktemp("log")
    options = {role: ["--enable-scale-out", "--enable-prompt-tokens-details"] for role in ("strong", "weak")}
    if request.param == "tiny":
        options["weak"] = []
    started = {}
    try:
        for role, path in folders[request.param].items():
            started[role] = Server(path, folder / f"{role}.log", *options[role])
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.stop()


def rows(count, seed=0):
    draw = random.Random(seed)

    def say(most):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    prompts = [chat(say(12)) for _ in range(count // 5)]
    return [prompt for prompt in prompts for _ in range(5)], [answer(say(24)) for _ in range(count)]


@pytest.fixture
def scorers(servers):
    def make(**options):
        here = {role: server.path for role, server in servers.items()}
        there = {role: server.address for role, server in servers.items()}
        return [DensityRatioScorer(**pair, gate="none", **options) for pair in (here, there)]

    return make


def assert_same(found, expected, tolerance=1e-3):
    assert [score.error for score in found] == [score.error for score in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.n_tokens, one.finished, one.truncated) == (other.n_tokens, other.finished, other.truncated)
        assert one.strong_logps == pytest.approx(other.strong_logps, abs=tolerance)
        assert one.weak_logps == pytest.approx(other.weak_logps, abs=tolerance)


def test_two_hundred_rows(scorers):
    here, there = scorers()
    asked = rows(200)
    started = time.perf_counter()
    expected = here.score(*asked)
    middle = time.perf_counter()
    found = there.score(*asked)
    print(f"\n200 rows: here {middle - started:.1f} s, there {time.perf_counter() - middle:.1f} s, loading included")
    assert_same(found, expected)


def test_conditioned_and_again(scorers, servers):
    """The second time all rows are in the caches, the prompt's tokens and the completion's."""
    here, there = scorers(criteria=CRITERIA)
    asked = rows(40, seed=1)
    domains = ["short", "long"] * 20
    expected = here.score(*asked, domains=domains)
    described = there.describe()
    # With vLLM's V1 model runner, which a CPU has, leftovers decide whether a cache can be read; see RESULTS.md.
    assert described["strong"]["way"] in ("served", "served, prefix read")
    if not servers["weak"].options:
        assert described["weak"]["way"] == "served"
    for _ in range(2):
        assert_same(there.score(*asked, domains=domains), expected)
    cut = ["a " * 2000, "b"], ["c", "d"]
    found = there.score(*cut, domains=["short"] * 2)
    assert [score.truncated for score in found] == [True, False]


def test_a_server_that_is_killed_and_comes_back(scorers, servers):
    here, there = scorers()
    asked = rows(100, seed=2)
    expected = here.score(*asked)
    there.load()
    strong = servers["strong"]
    killed = []

    def kill():
        strong.stop(signal.SIGKILL)
        killed.append(strong.process.returncode)
        strong.start()

    thread = threading.Timer(0.3, kill)
    thread.start()
    found = [score for _ in range(3) for score in there.score(*asked)]
    thread.join()
    strong.wait()
    assert killed == [-signal.SIGKILL]
    assert_same(found, expected * 3)
