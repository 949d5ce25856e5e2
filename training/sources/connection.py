"""Connections that go where was allowed and nowhere else, and whose reads always come to an end.

The address that is checked is the one connected to: a second look-up could give another (DNS
rebinding). A time-out alone does not bound a read, since a server may send a byte at a time; a
deadline does. Source: RFC 6890 (special addresses).
"""

import http.client
import io
import ipaddress
import socket
import ssl
from collections.abc import Callable

from training.sources.base import SourceError

Allow = Callable[[str], bool]


def allow_hosts(*names: str) -> Allow:
    """Allow these host names or addresses; one that opens with a dot stands for its subdomains."""
    exact = {name.lower() for name in names if not name.startswith(".")}
    suffixes = tuple(name.lower() for name in names if name.startswith("."))

    def allow(host: str) -> bool:
        return host in exact or host.endswith(suffixes)

    return allow


def usable_addresses(host: str, port: int, *, allow: Allow) -> list[str]:
    """The addresses of a host that may be connected to.

    A private, loopback, link-local or otherwise special address is left out unless `allow` takes
    the address itself: a public name must not lead into the user's own network.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceError(f"{host}: no address ({error})", reason="dns", transient=True) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    usable = [address for address in addresses if is_public(address) or allow(address)]
    if not usable:
        raise SourceError(
            f"{host} leads to {addresses[0]}, an address of a private network; not contacted",
            reason="forbidden_address",
            transient=False,
        )
    return usable


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return parsed.is_global and not parsed.is_multicast


class PacedSocket:
    """The face of a socket that http.client uses, with a deadline over all of its reads."""

    def __init__(self, inner: socket.socket, *, clock: Callable[[], float]) -> None:
        self._inner = inner
        self._clock = clock
        self.read_timeout_s = 1.0
        self.deadline_s = 0.0

    def begin_wait(self) -> None:
        """Set the time that the next read may take; TimeoutError when none is left."""
        remaining_s = self.deadline_s - self._clock()
        if remaining_s <= 0:
            raise TimeoutError("slower than the least speed")
        self._inner.settimeout(min(self.read_timeout_s, remaining_s))

    def sendall(self, data: bytes) -> None:
        """Send all of it; TimeoutError when one send takes longer than a read may. The deadline of
        reads does not bound it."""
        self._inner.settimeout(self.read_timeout_s)
        self._inner.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        # The inner socket counts its files, and stays open until the last of them is closed.
        return io.BufferedReader(_PacedReader(self, self._inner.makefile("rb", buffering=0)))

    def close(self) -> None:
        """Close it; a file of `makefile` goes on reading until it is closed itself."""
        self._inner.close()


class _PacedReader(io.RawIOBase):
    """Raw reads of a PacedSocket."""

    def __init__(self, paced: PacedSocket, inner: io.RawIOBase) -> None:
        self._paced = paced
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        self._paced.begin_wait()
        return self._inner.readinto(buffer)

    def close(self) -> None:
        self._inner.close()
        super().close()


class Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under the name that leads there."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        allow: Allow,
        tls: ssl.SSLContext | None,
        read_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(host, port)
        self._allow = allow
        self._tls = tls
        self._read_timeout_s = read_timeout_s
        self._clock = clock
        self._paced: PacedSocket | None = None

    def connect(self) -> None:
        """Connect to the first address that answers. Raises OSError or SourceError."""
        failure: OSError | None = None
        for address in usable_addresses(self.host, self.port, allow=self._allow):
            try:
                inner = socket.create_connection((address, self.port), self._read_timeout_s)
            except OSError as error:
                failure = error
                continue
            try:
                inner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    inner = self._tls.wrap_socket(inner, server_hostname=self.host)
            except OSError:
                inner.close()
                raise
            self._paced = PacedSocket(inner, clock=self._clock)
            self._paced.read_timeout_s = self._read_timeout_s
            self.sock = self._paced
            return
        raise failure or ConnectionError("no address")

    def get(
        self, target: str, *, headers: dict[str, str], deadline_s: float
    ) -> http.client.HTTPResponse:
        """Send a GET and return its reply, whose headers have until the deadline of the clock."""
        if self.sock is None:
            self.connect()
        self.extend(deadline_s)
        self.request("GET", target, headers=headers)
        return self.getresponse()

    def extend(self, deadline_s: float) -> None:
        """Set until when what is still to be read may take."""
        if self._paced is not None:
            self._paced.deadline_s = deadline_s


def shown(url: str) -> str:
    """An address as it may be printed: what follows `?` is often a signature."""
    return url.partition("?")[0]


def transport_error(url: str, error: Exception) -> SourceError:
    """What a failure below HTTP is called."""
    reason = "network"
    for kinds, name in (
        (TimeoutError, "timeout"),
        (ConnectionRefusedError, "refused"),
        (ConnectionError, "reset"),
        (ssl.SSLCertVerificationError, "certificate"),
        (ssl.SSLError, "tls"),
        (http.client.HTTPException, "bad_reply"),
    ):
        if isinstance(error, kinds):
            reason = name
            break
    return SourceError(
        f"{shown(url)}: {error or type(error).__name__}",
        reason=reason,
        transient=reason != "certificate",
    )
