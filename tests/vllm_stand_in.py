"""A server on loopback that answers as `vllm serve` does, with a tiny model of transformers. It can lie, tire and die.

What it answers, statuses and bodies alike, was written down from vLLM 0.32; `nox -s vllm` runs against the real one.
"""

import contextlib
import json
import math
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

BLOCK = 16


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """A client that went away, or a server that was killed."""


class StandIn:
    """
    `before(path, body)` may return (status, bytes, headers) in place of an answer; `after(path, answer)` may change it.
    `computed` counts the tokens that the model ran, `seen` holds the (path, body) of every request.
    """

    def __init__(self, model, tokenizer, name, *, root=None, length=256, key=None, tells=True, caches=True):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.root, self.length, self.key, self.tells, self.caches = root or name, length, key, tells, caches
        self.before = lambda path, body: None
        self.after = lambda path, answer: answer
        self.computed, self.seen, self.most_at_once = 0, [], 0
        self._running = 0
        self._blocks = set()
        self._lock = threading.Lock()
        self._connections = set()
        self.port = 0
        self.start()

    @property
    def address(self):
        return f"vllm://127.0.0.1:{self.port}/{self.name}"

    def start(self):
        owner = self

        class Handler(_Handler):
            stand_in = owner

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def kill(self):
        """Close the port and every connection, whatever is being answered."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self._lock:
            for connection in list(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def answer(self, path, body):
        if path == "/health":
            return {}
        if path == "/v1/models":
            return {"data": [{"id": self.name, "root": self.root, "parent": None, "max_model_len": self.length}]}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return {"tokens": ids, "count": len(ids), "max_model_len": self.length}
        if path == "/v1/completions":
            entries, _ = self._score(body["prompt"], reads=False)
            choice = {"index": 0, "text": "x", "prompt_logprobs": entries}
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
            return {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}
        if path == "/inference/v1/generate":
            ids = body["token_ids"]
            entries, read = self._score(ids, reads=not body["sampling_params"]["skip_reading_prefix_cache"])
            usage = {"prompt_tokens": len(ids)}
            if self.tells:
                usage["prompt_tokens_details"] = {"cached_tokens": read}
            return {"model": body["model"], "choices": [{"index": 0}], "prompt_logprobs": entries, "usage": usage}
        return None

    def _score(self, ids, *, reads):
        """vLLM's entries for every token, and how many came out of the cache: for these there are leftovers."""
        blocks = [tuple(ids[:stop]) for stop in range(BLOCK, len(ids) + 1, BLOCK)]
        with self._lock, torch.inference_mode():
            hits = next((n for n, block in enumerate(blocks) if block not in self._blocks), len(blocks))
            read = min(hits, (len(ids) - 1) // BLOCK) * BLOCK if reads and self.caches else 0
            self._blocks.update(blocks)
            self.computed += len(ids) - read
            logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries = [None]
        for place in range(1, len(ids)):
            value = float(logps[place - 1, ids[place]]) if place > read else -0.125
            value = None if math.isnan(value) else value
            entries.append({str(ids[place]): {"logprob": value, "rank": 1, "decoded_token": "x"}})
        return entries, read


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stand_in._connections.add(self.connection)

    def finish(self):
        self.stand_in._connections.discard(self.connection)
        super().finish()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._do(None)

    def do_POST(self):
        self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _do(self, body):
        stand_in = self.stand_in
        with stand_in._lock:
            stand_in.seen.append((self.path, body))
            stand_in._running += 1
            stand_in.most_at_once = max(stand_in.most_at_once, stand_in._running)
        try:
            status, content, headers = self._reply(body)
        finally:
            with stand_in._lock:
                stand_in._running -= 1
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _reply(self, body):
        stand_in = self.stand_in
        given = stand_in.before(self.path, body)
        if given is not None:
            return given
        is_guarded = stand_in.key is not None and self.path.startswith(("/v1", "/inference"))
        if is_guarded and self.headers.get("Authorization") != f"Bearer {stand_in.key}":
            return 401, b'{"error": "Unauthorized"}', {}
        if body and body["model"] != stand_in.name:
            return 404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}}).encode(), {}
        if body and len(body.get("prompt", body.get("token_ids", ""))) >= stand_in.length and self.path != "/tokenize":
            return 400, b'{"error": {"message": "maximum context length"}}', {}
        if self.path.startswith("/inference") and not stand_in.tells:
            return 403, b'{"error": {"message": "Scale-out endpoints are disabled."}}', {}
        found = stand_in.answer(self.path, body)
        if found is None:
            return 404, b'{"detail": "Not Found"}', {}
        return 200, json.dumps(stand_in.after(self.path, found)).encode(), {"Content-Type": "application/json"}


def closed_port():
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
