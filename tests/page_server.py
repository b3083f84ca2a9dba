"""A server for tests of the chat page: its files, and answers that the test has written down."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pyllama_dist.api.page import HEADERS, files

Json = dict[str, Any]


def chunk(delta: Json | None = None, finish: str | None = None, **fields: object) -> bytes:
    """One event of a stream."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    return event({"id": "chatcmpl-1", "choices": [choice], "usage": None, **fields})


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def answer(*contents: str, reasoning: str = "", **last: object) -> list[bytes]:
    """A whole stream as the specification orders it."""
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    return [
        chunk({"role": "assistant", "content": ""}),
        *([chunk({"reasoning_content": reasoning})] if reasoning else []),
        *(chunk({"content": content}) for content in contents),
        chunk(finish="stop", **last),
        event({"id": "chatcmpl-1", "choices": [], "usage": usage}),
        b"data: [DONE]\n\n",
    ]


@dataclass
class Failure:
    """An answer that is no stream."""

    status: int
    body: Json
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Script:
    """What the server answers, and what it was asked."""

    # Streams and failures, one for each completion, in order. The last one is repeated.
    completions: list[list[bytes] | Failure] = field(default_factory=list)
    # Seconds before each piece of a stream.
    pause: float = 0.0
    key: str | None = None
    model: Json = field(default_factory=lambda: {"id": "tiny-glm", "meta": {"n_ctx": 4096}})
    nodes: Callable[[], Json] = lambda: {"nodes": [], "error": None}
    requests: list[Json] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    dropped: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        self.script.paths.append(self.path)
        if self.path == "/":
            self._file("index.html")
        elif self.path.startswith("/page/"):
            self._file(self.path.removeprefix("/page/"))
        elif self._refused():
            return
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [self.script.model]})
        elif self.path == "/nodes":
            self._json(200, self.script.nodes())
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.script.keys.append(self.headers["Authorization"])
        if self.path != "/v1/chat/completions":
            self._json(404, {"error": {"message": "no such path"}})
        elif not self._refused():
            self.script.requests.append(body)
            completions = self.script.completions
            now = completions.pop(0) if len(completions) > 1 else completions[0]
            if isinstance(now, Failure):
                self._json(now.status, now.body, now.headers)
            else:
                self._stream(now)

    def _refused(self) -> bool:
        key = self.script.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self._json(401, {"error": {"message": "The key is missing or wrong"}})
        return True

    def _file(self, name: str) -> None:
        if name not in files():
            self._json(404, {"error": {"message": "no such file"}})
            return
        content, media_type = files()[name]
        self._send(200, content, {"Content-Type": media_type, **HEADERS})

    def _json(self, status: int, body: Json, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self._send(status, content, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, pieces: list[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            for piece in pieces:
                time.sleep(self.script.pause)
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            self.script.dropped.set()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The address of a server that follows the script."""
    handler = type("Handler", (_Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
