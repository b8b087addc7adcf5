"""A server that answers as OpenAI's does, on this machine: what is asked of it, and what becomes of its failures."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import chat

from trl_cdr import ConfigError, ModelError
from trl_cdr.annotation import server as module
from trl_cdr.annotation.server import Server
from trl_cdr.scoring.types import Completion


class Handler(BaseHTTPRequestHandler):
    """Says its seed, and does what a prompt asks for."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, self.headers.get("Authorization"), body))
            wish = body["messages"][-1]["content"]
            status = self.server.failures.pop() if self.server.failures else 200
        if wish.isdigit():
            status = int(wish)
        choice = {"message": {"role": "assistant", "content": f"{wish} {body['seed']}"}, "finish_reason": "stop"}
        if wish == "long":
            choice["finish_reason"] = "length"
        if wish == "think":
            choice["message"]["reasoning_content"] = "hm"
        answer = {"error": f"status {status}"} if status != 200 else {"choices": [] if wish == "none" else [choice]}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "_ATTEMPTS", 3)
    monkeypatch.setattr(module, "_WAIT", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        host.asked, host.failures, host.lock = [], [], threading.Lock()
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        host.url = f"http://127.0.0.1:{host.server_port}/v1"
        yield host
        host.shutdown()


def ask(host, *prompts, **options):
    return Server(host.url, model="m").write(
        [chat(prompt) for prompt in prompts],
        **{"per_prompt": 3, "temperature": 0.7, "max_new_tokens": 9, "seeds": list(prompts), **options},
    )


def test_what_is_asked_and_answered(host, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    hello, long = ask(host, "hello", "long")
    assert [one.finished for one in hello + long] == [True] * 3 + [False] * 3
    assert all(one.text.startswith("hello ") for one in hello)
    assert len({one.text for one in hello + long}) == 6  # each has a seed of its own
    path, key, body = host.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer key")
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("m", 0.7, 1.0, 9)
    assert ask(host, "long", "hello") == [long, hello]  # whatever it is asked beside


def test_a_key_is_never_shown(host, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "se\u00e7ret\n")  # as a file with a line break gives it
    with pytest.raises(ConfigError, match="^OPENAI_API_KEY holds a line break or another character") as error:
        ask(host, "hello")
    assert "ret" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "key\r\n")
    ask(host, "hello", per_prompt=1)
    assert host.asked[0][1] == "Bearer key"


def test_what_goes_wrong_for_a_while(host):
    host.failures += [503, 429]
    [group] = ask(host, "hello", per_prompt=2)
    assert all(isinstance(one, Completion) for one in group)
    assert len(host.asked) == 4


def test_a_prompt_that_the_server_does_not_take(host):
    refused, hello = ask(host, "400", "hello")
    assert refused == []
    assert len(hello) == 3
    assert len(host.asked) == 6


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("500", "can't be used: status 500: .*, after 3 attempts. What is finished stays: start it, and run the same"),
        ("401", "refuses 'm' .status 401: .*Mend policy or OPENAI_API_KEY"),
        ("404", "refuses 'm' .status 404"),
        ("none", "gave no chat completion"),
        ("think", "keeps reasoning_content apart from the content"),
    ],
)
def test_what_stops_a_run(prompt, message, host):
    with pytest.raises(ModelError, match=message):
        ask(host, prompt, per_prompt=1)


def test_a_server_that_is_not_there(host):
    host.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ModelError, match="server 'http://127.0.0.1:9/v1' can't be used: .*after 3 attempts"):
        ask(host, "hello")


def test_urls(monkeypatch):
    assert Server("http://me:secret@host:1/v1/", model="m").shown == "http://host:1/v1/"
    for url in ("localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1"):
        with pytest.raises(ConfigError, match="server is .*such as http://localhost:8000/v1"):
            Server(url, model="m")
    monkeypatch.setitem(__import__("sys").modules, "tenacity", None)
    with pytest.raises(ConfigError, match="server needs tenacity. Install it: pip install 'trl-cdr.server.'"):
        Server("http://localhost:8000/v1", model="m")
