"""An OpenAI-compatible server on loopback that says what a test wants, and fails when a test wants it to.

`with JudgeServer(lambda request: "[[A]]", faults=every(9, 429, "nonsense")) as server:` is an endpoint at `server.url`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

Said: TypeAlias = str | tuple[str, Mapping[str, float]]
"""A text, or a text with the log-probabilities of the likeliest first tokens."""
Fault: TypeAlias = int | str
"""An HTTP status, or:

- "nonsense": a text (`NONSENSE`) without a verdict,
- "no choices", "no content": a completion with an empty list of choices, or whose message has the content null,
- "half json": a body that ends in its middle,
- "cut": the connection ends without an answer,
- "hang": no answer, until the server is closed,
- "die": as "cut", and every connection is refused from then on, until `revive` is called.
"""
NONSENSE = "I would rather talk about the weather."


def every(n: int, *faults: Fault) -> dict[int, Fault]:
    """The first of the faults at request n, the next at request 2n and so on, then from the first again."""
    return {n * (i + 1): faults[i % len(faults)] for i in range(10_000)}


class JudgeServer:
    """Answers POST {url}/chat/completions; a context manager. `reply` and `faults` may be changed at any time.

    `usage` of an answer counts words: of all messages for the prompt, of the text for the completion.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Said], faults: Mapping[int, Fault] | None = None) -> None:
        self.reply = reply
        """What is said to the body of a request. Log-probabilities are sent only where the request asks for them."""
        self.faults: Mapping[int, Fault] = faults or {}
        """By number of the request, from 1, what goes wrong with it."""
        self.delay = 0.0
        """Seconds that every answer takes."""
        self.retry_after: str | None = None
        """The header of that name of every answer with a status."""
        self.requests: list[dict[str, Any]] = []
        """The body of every request, in the order of their arrival."""
        self.keys: list[str] = []
        """The key that came with each."""
        self.answered: list[dict[str, Any]] = []
        """The bodies of those that got what `reply` says."""
        self.most_at_once = 0
        """The most requests that were waiting for an answer at a time."""
        self._errors: list[Exception] = []
        self._waiting = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """For `base_url`."""
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> JudgeServer:
        self.revive()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._closed.set()
        self._stop()
        if self._errors and kind is None:
            raise self._errors[0]  # `reply` failed, which the client saw as status 400

    def revive(self) -> None:
        """Accept connections again, at the same address."""
        if self._server is None:
            self._server = _Server(("127.0.0.1", self._port), _handler(self))
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def _answer(self, body: dict[str, Any], key: str) -> tuple[int, bytes] | None:
        """Status and content; None ends the connection."""
        with self._lock:
            if self._server is None:  # dead, and this is a connection from before
                return None
            self.requests.append(body)
            self.keys.append(key)
            fault = self.faults.get(len(self.requests))
            if fault == "die":
                self._stop()
        if fault == "hang":
            self._closed.wait()
        if fault in ("hang", "cut", "die"):
            return None
        if self.delay:
            time.sleep(self.delay)
        if isinstance(fault, int):
            words = f"scripted failure {fault} for the key {key}"  # some servers do repeat it
            return fault, json.dumps({"error": {"message": words, "code": fault}}).encode()
        try:
            said = (NONSENSE, {"I": -0.1}) if fault == "nonsense" else self.reply(body)
        except Exception as error:
            self._errors.append(error)
            return 400, json.dumps({"error": {"message": repr(error)}}).encode()
        text, logprobs = (said, {}) if isinstance(said, str) else said
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": None if fault == "no content" else text},
            "logprobs": None,
            "finish_reason": "stop",
        }
        if body.get("logprobs") and logprobs:
            top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in logprobs.items()]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        words = sum(len(message["content"].split()) for message in body["messages"]), len(text.split())
        content = json.dumps(
            {
                "id": f"chatcmpl-{len(self.requests)}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [] if fault == "no choices" else [choice],
                "usage": {"prompt_tokens": words[0], "completion_tokens": words[1], "total_tokens": sum(words)},
            }
        ).encode()
        if fault is None:
            with self._lock:
                self.answered.append(body)
        return 200, content[: len(content) // 2] if fault == "half json" else content


class _Server(ThreadingHTTPServer):
    request_queue_size = 256


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as with a real server
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge._lock:
                judge._waiting += 1
                judge.most_at_once = max(judge.most_at_once, judge._waiting)
            try:
                if self.path == "/v1/chat/completions":
                    key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                    answer = judge._answer(body, key)
                else:
                    answer = 404, json.dumps({"error": {"message": f"no such path: {self.path}"}}).encode()
            finally:
                with judge._lock:
                    judge._waiting -= 1
            if answer is None:
                self.close_connection = True
                return
            status, content = answer
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status != 200 and judge.retry_after is not None:
                self.send_header("Retry-After", judge.retry_after)
            self.end_headers()
            try:
                self.wfile.write(content)
            except OSError:
                self.close_connection = True  # the client did not wait

        def log_message(self, *_: object) -> None:
            pass

    return Handler
