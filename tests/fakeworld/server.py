"""A web server on 127.0.0.1 with ranges, versions, a log of what was asked, and faults on request.

A fault is chosen for each request by `world.plan`; the request is logged with it. Nothing here
sleeps to provoke a time-out: a stalled reply waits for the client to hang up.
"""

from __future__ import annotations

import hashlib
import json
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.fakeworld.faults import FAULTS

Plan = Callable[["Seen"], str | None]
Resource = bytes | Callable[["Handler"], "Answer"]


@dataclass(kw_only=True)
class Seen:
    """One request. `number` counts those for the same path."""

    method: str
    path: str
    query: str
    host: str
    range: str | None
    authorization: str | None
    number: int
    fault: str | None = None


@dataclass(kw_only=True)
class Answer:
    """What a resource replies; `body` is cut to the range that was asked for."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class FakeWorld:
    """Paths and what they hold. Use it as a context manager."""

    def __init__(self) -> None:
        self.resources: dict[str, Resource] = {}
        self.routes: list[tuple[re.Pattern[str], Callable[[Handler], Answer]]] = []
        self.seen: list[Seen] = []
        self.plan: Plan = lambda seen: None
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.world = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._closed_door = socket.socket()  # bound and never listened on: connections are refused
        self._closed_door.bind(("127.0.0.1", 0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def refusing_url(self) -> str:
        return f"http://127.0.0.1:{self._closed_door.getsockname()[1]}"

    def __enter__(self) -> FakeWorld:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._closed_door.close()
        self._thread.join()

    @contextmanager
    def planned(self, plan: Plan) -> Iterator[list[Seen]]:
        """Faults by a plan, with a log that begins empty."""
        with self._lock:
            before, self.plan, self.seen = self.plan, plan, []
        try:
            yield self.seen
        finally:
            self.plan = before

    def log(self, handler: Handler) -> Seen:
        parts = urlsplit(handler.path)
        path = unquote(parts.path)
        with self._lock:
            seen = Seen(
                method=handler.command,
                path=path,
                query=parts.query,
                host=handler.headers.get("Host", ""),
                range=handler.headers.get("Range"),
                authorization=handler.headers.get("Authorization"),
                number=sum(earlier.path == path for earlier in self.seen),
            )
            seen.fault = self.plan(seen)
            self.seen.append(seen)
        return seen


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    world: FakeWorld

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what the tests are about; nothing is printed."""


class Handler(BaseHTTPRequestHandler):
    """Answers a GET, HEAD or POST from the world's resources."""

    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def world(self) -> FakeWorld:
        return self.server.world

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are logged in `world.seen`."""

    def do_GET(self) -> None:
        seen = self.world.log(self)
        answer = self.find(seen.path)
        if seen.fault is None:
            self.answer(answer)
        else:
            FAULTS[seen.fault](self, answer)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def find(self, path: str) -> Answer:
        """What belongs to a path, with its version and cut to the range."""
        resource = self.world.resources.get(path)
        if resource is None:
            for pattern, route in self.world.routes:
                if pattern.fullmatch(path):
                    resource = route
                    break
        if resource is None:
            return Answer(status=404, body=b"not here")
        answer = resource(self) if callable(resource) else Answer(body=resource)
        if answer.status != 200:
            return answer
        tag = f'"{hashlib.sha256(answer.body).hexdigest()[:16]}"'
        answer.headers = {"ETag": tag, "Accept-Ranges": "bytes", **answer.headers}
        return self.cut(answer)

    def cut(self, answer: Answer) -> Answer:
        """The part that was asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not match:
            return answer
        size = len(answer.body)
        start = int(match[1])
        stop = min(size, int(match[2]) + 1 if match[2] else size)
        if start >= size:
            return Answer(status=416, headers={"Content-Range": f"bytes */{size}"})
        headers = {**answer.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return Answer(status=206, body=answer.body[start:stop], headers=headers)

    def answer(self, answer: Answer, *, sent: int | None = None) -> None:
        """Send a reply, or only the first `sent` bytes of its body."""
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:sent])
        self.wfile.flush()

    def wait_for_hang_up(self, seconds: float | None = None) -> bool:
        """Wait until the client closes the connection; False when the time ran out first."""
        readable, _, _ = select.select([self.connection], [], [], seconds)
        return bool(readable)


def json_answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """A reply in JSON."""
    body = json.dumps(value).encode()
    return Answer(
        body=body, status=status, headers={"Content-Type": "application/json", **(headers or {})}
    )
