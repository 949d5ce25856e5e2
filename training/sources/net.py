"""An HTTP client for parts of large files that believes no reply and asks only allowed hosts.

Why not a general client: a mirror that ignores `Range`, a body cut short, or a file replaced
between two ranges all look like success to most of them, and would put wrong bytes into the
training text without a word. Here each reply is held against what was asked for and against the
file's version (size and ETag) as first seen; what came before a fault is kept, and only the rest is
asked for again. Every host, of a redirect too, must pass `allow`.
Source: RFC 9110 (ranges, Retry-After, redirects).
"""

import http.client
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

from training.sources.base import SourceError
from training.sources.connection import Allow, Connection, shown, transport_error

USER_AGENT = "sigma-trainer/0.1"
MAX_REDIRECTS = 5
MAX_BACKOFF_S = 8.0
MAX_RETRY_AFTER_S = 30.0  # longer pauses belong to whoever decides when to try this source again
KEPT_PROGRESS_BYTES = 1 << 16  # an attempt that brought this much was no failure
_CHUNK_BYTES = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")
_URL_CHARS = "!#$%&'()*+,/:;=?@[]~"
_Result = TypeVar("_Result")
_Origin = tuple[str, str, int]  # scheme, host, port


@dataclass(slots=True, kw_only=True, frozen=True)
class FileVersion:
    """What must not change between two reads of one file; `tag` is its ETag or Last-Modified."""

    size: int  # bytes
    tag: str


@dataclass(slots=True, kw_only=True, frozen=True)
class Reply:
    """A whole document. `url` is where it was found after redirects."""

    url: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class HttpStatusError(SourceError):
    """The server answered, but not with what was asked for. Header names are in lower case."""

    def __init__(self, url: str, *, status: int, headers: Mapping[str, str]) -> None:
        reason = f"http_{status}"
        super().__init__(
            f"{shown(url)} answered {status}",
            reason=reason,
            transient=status in _PASSING_STATUSES,
        )
        self.status = status
        self.headers = headers
        self.retry_after_s = retry_after_s(headers)


@dataclass(slots=True, kw_only=True)
class _Part:
    """A range as far as it has arrived."""

    start: int
    stop: int
    version: FileVersion | None
    is_pinned: bool
    body: bytearray = field(default_factory=bytearray)

    @property
    def position(self) -> int:
        return self.start + len(self.body)

    @property
    def is_whole(self) -> bool:
        return self.version is not None and self.position >= min(self.stop, self.version.size)


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """A reply whose body is still to be read."""

    url: str
    origin: _Origin
    connection: Connection
    response: http.client.HTTPResponse

    def header(self, name: str) -> str:
        return self.response.getheader(name) or ""

    def fault(self, reason: str, what: str, *, passing: bool = True) -> SourceError:
        """Hang up and say why."""
        self.connection.close()
        return SourceError(f"{shown(self.url)}: {what}", reason=reason, transient=passing)


class HttpClient:
    """Reads documents and ranges of files; safe to use from several threads.

    A call ends after at most `retries` + 1 attempts without progress. Each lasts at most three
    times the read time-out plus the time that its bytes take at `min_bytes_per_s`. Between them it
    pauses for `backoff_s`, doubled each time up to 8 s, or as long as the server asks. Then, or
    when the server asks for more than 30 s, it raises SourceError. `counts` holds requests, retries
    and faults by reason.
    """

    def __init__(
        self,
        *,
        read_timeout_s: float,
        allow: Allow,
        retries: int = 4,
        backoff_s: float = 0.5,
        min_bytes_per_s: int = 1 << 15,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.read_timeout_s = read_timeout_s
        self.counts: Counter[str] = Counter()
        self._allow = allow
        self._retries = retries
        self._backoff_s = backoff_s
        self._min_bytes_per_s = min_bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._idle: dict[_Origin, list[Connection]] = {}
        self._tls: ssl.SSLContext | None = None

    def read(self, url: str, *, max_bytes: int, headers: Mapping[str, str] | None = None) -> Reply:
        """A whole document of at most `max_bytes`."""

        def attempt() -> Reply:
            exchange = self._open(url, headers or {})
            if exchange.response.status == 206:
                raise exchange.fault("wrong_range", "sent a part of what was asked for")
            if exchange.response.status != 200:
                raise self._status_error(exchange)
            length = exchange.header("content-length")
            expected = int(length) if length.isdecimal() else None
            body = bytearray()
            if expected is None or expected <= max_bytes:
                limit = max_bytes if expected is None else expected
                self._fill(exchange, body, limit=limit + 1)
            if max(len(body), expected or 0) > max_bytes:
                raise exchange.fault("too_large", f"more than {max_bytes} bytes", passing=False)
            if expected not in (None, len(body)):
                raise exchange.fault("truncated", f"only {len(body)} of {expected} bytes came")
            self._keep(exchange)
            return Reply(url=exchange.url, headers=_headers_of(exchange), body=bytes(body))

        return self._persist(attempt, progress=lambda: 0)

    def read_range(
        self,
        url: str,
        *,
        start: int,
        stop: int,
        version: FileVersion | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[bytes, FileVersion]:
        """Bytes start to stop of a file (fewer where it ends before) and the file's version.

        With `version`, SourceError of reason `changed` says that the file is another one by now.
        """
        if not 0 <= start < stop:
            raise ValueError(f"no bytes lie between {start} and {stop}")
        part = _Part(start=start, stop=stop, version=version, is_pinned=version is not None)

        def attempt() -> tuple[bytes, FileVersion]:
            while part.version is None or not part.is_whole:
                self._extend(url, part, headers or {})
            return bytes(part.body), part.version

        return self._persist(attempt, progress=lambda: len(part.body))

    def close(self) -> None:
        """Close the connections that wait for a next request."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _extend(self, url: str, part: _Part, headers: Mapping[str, str]) -> None:
        """Ask for what a part still lacks and append it, or raise with what came kept."""
        wanted = {**headers, "Range": f"bytes={part.position}-{part.stop - 1}"}
        exchange = self._open(url, wanted)
        if exchange.response.status == 200:
            raise exchange.fault("range_ignored", "the server sends whole files, never parts")
        if exchange.response.status != 206:
            raise self._status_error(exchange)
        match = _CONTENT_RANGE.match(exchange.header("content-range"))
        first, last, size = (int(number) for number in match.groups()) if match else (-1, -1, -1)
        if first != part.position or last != min(part.stop, size) - 1:
            raise exchange.fault("wrong_range", "sent another range than was asked for")
        tag = exchange.header("etag") or exchange.header("last-modified")
        version = FileVersion(size=size, tag=tag)
        if part.version not in (None, version):
            if not part.is_pinned:  # none of it was handed out yet: the new file will do as well
                part.body.clear()
                part.version = None
            raise exchange.fault("changed", "the file was replaced while it was being read")
        count = last - first + 1
        length = exchange.header("content-length")
        if length and length != str(count):
            raise exchange.fault("wrong_length", f"announces {length} bytes where {count} belong")
        part.version = version
        goal = len(part.body) + count
        self._fill(exchange, part.body, limit=count)
        if len(part.body) < goal:
            missing = goal - len(part.body)
            raise exchange.fault("truncated", f"the last {missing} of {count} bytes are missing")
        self._keep(exchange)

    def _persist(self, attempt: Callable[[], _Result], *, progress: Callable[[], int]) -> _Result:
        """Repeat an attempt until it succeeds, or fails too often or for good."""
        failures = 0
        while True:
            before = progress()
            try:
                return attempt()
            except SourceError as error:
                self._count(error.reason)
                advanced = progress() - before >= KEPT_PROGRESS_BYTES
                failures = 0 if advanced else failures + 1
                pause_s = error.retry_after_s if isinstance(error, HttpStatusError) else 0.0
                if not error.transient or failures > self._retries or pause_s > MAX_RETRY_AFTER_S:
                    raise
            self._count("retries")
            backoff_s = self._backoff_s * 2 ** (failures - 1) if failures else 0.0
            self._sleep(max(pause_s, min(backoff_s, MAX_BACKOFF_S)))

    def _open(self, url: str, headers: Mapping[str, str]) -> _Exchange:
        """Send a GET and follow redirects, each to an allowed host only."""
        origin = self._origin_of(url)
        for _ in range(MAX_REDIRECTS + 1):
            exchange = self._send(url, origin, headers)
            if exchange.response.status not in _REDIRECTS:
                return exchange
            exchange.connection.close()
            following = _joined(url, exchange.header("location"))
            next_origin = self._origin_of(following)
            if next_origin[0] != origin[0] == "https":
                raise SourceError(
                    f"{shown(url)} leads from https to http; not followed",
                    reason="forbidden_host",
                    transient=False,
                )
            if next_origin != origin:  # a token is meant for one host
                headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
            url, origin = following, next_origin
        raise SourceError(f"{shown(url)}: endless redirects", reason="redirects", transient=True)

    def _origin_of(self, url: str) -> _Origin:
        """Scheme, host and port of an address that may be asked; SourceError for any other."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            parts, host, port = urlsplit(""), "", None
        if parts.scheme not in ("http", "https") or not self._allow(host):
            raise SourceError(
                f"{host or shown(url)} is none of the hosts this run may ask; not contacted",
                reason="forbidden_host",
                transient=False,
            )
        return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)

    def _send(self, url: str, origin: _Origin, headers: Mapping[str, str]) -> _Exchange:
        """One request. A kept connection that the server closed meanwhile is replaced at once."""
        parts = urlsplit(url)
        target = quote(parts.path or "/", safe=_URL_CHARS)
        if parts.query:
            target += "?" + quote(parts.query, safe=_URL_CHARS)
        sent = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                kept = idle.pop() if idle else None
            connection = kept or self._new_connection(origin)
            deadline_s = self._clock() + 2 * self.read_timeout_s
            try:
                self._count("requests")
                response = connection.get(target, headers=sent, deadline_s=deadline_s)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept is not None and isinstance(error, ConnectionError):
                    continue
                raise transport_error(url, error) from error
            return _Exchange(url=url, origin=origin, connection=connection, response=response)

    def _new_connection(self, origin: _Origin) -> Connection:
        scheme, host, port = origin
        if scheme == "https" and self._tls is None:
            self._tls = ssl.create_default_context()
        return Connection(
            host,
            port,
            allow=self._allow,
            tls=self._tls if scheme == "https" else None,
            read_timeout_s=self.read_timeout_s,
            clock=self._clock,
        )

    def _fill(self, exchange: _Exchange, body: bytearray, *, limit: int) -> None:
        """Append the reply's body, at most `limit` bytes of it."""
        goal = len(body) + limit
        allowed_s = self.read_timeout_s + limit / self._min_bytes_per_s
        exchange.connection.extend(self._clock() + allowed_s)
        try:
            while len(body) < goal:
                chunk = exchange.response.read1(min(_CHUNK_BYTES, goal - len(body)))
                if not chunk:
                    return
                body += chunk
        except (OSError, http.client.HTTPException) as error:
            exchange.connection.close()
            raise transport_error(exchange.url, error) from error

    def _keep(self, exchange: _Exchange) -> None:
        """Keep the connection for the next request if the reply was read to its end."""
        response = exchange.response
        is_read = response.isclosed() or response.length == 0
        response.close()
        if is_read and not response.will_close and exchange.connection.sock is not None:
            with self._lock:
                self._idle.setdefault(exchange.origin, []).append(exchange.connection)
        else:
            exchange.connection.close()

    def _status_error(self, exchange: _Exchange) -> HttpStatusError:
        exchange.connection.close()
        return HttpStatusError(
            exchange.url, status=exchange.response.status, headers=_headers_of(exchange)
        )

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds a server asks to wait, 0 when it says nothing that can be read."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:  # a date; the server's own clock is the one that it was written by
        pause = parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("date", ""))
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, pause.total_seconds())


def _joined(url: str, location: str) -> str:
    """Where a redirect leads; the location itself when it is no address at all."""
    try:
        return urljoin(url, location)
    except ValueError:
        return location


def _headers_of(exchange: _Exchange) -> dict[str, str]:
    return {name.lower(): value for name, value in exchange.response.getheaders()}
