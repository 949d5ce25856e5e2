"""What sources over a network share: a file read by ranges, orders drawn from a seed, patience.

A source may not lose text to a passing fault, and may not stand still for ever at text that is
really broken. So a fault that lies in the material itself (a damaged file, one that is gone) is
raised each time it is met, and when the very same fault was met three times in a row its place is
left out and counted. Damage of other bytes is another fault: then it lies on the way and will pass.
Time-outs and overload never count: an outage loses nothing.
"""

import hashlib
import io
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from training.sources.base import SourceError
from training.sources.net import FileVersion, HttpClient

MAX_MEETINGS = 3
_OF_THE_MATERIAL = frozenset(
    {
        "bad_gzip",
        "bad_parquet",
        "changed",
        "http_404",
        "http_410",
        "http_416",
        "range_ignored",
        "wrong_length",
        "wrong_range",
    }
)


def is_of_the_material(error: SourceError) -> bool:
    """Whether waiting is no cure: the file or its server is broken, not the way to it."""
    return error.reason in _OF_THE_MATERIAL


@dataclass(slots=True, kw_only=True)
class Patience:
    """How often the last fault was met in a row."""

    fault: str = ""
    meetings: int = 0

    def is_spent_by(self, error: SourceError) -> bool:
        """Count a meeting; True when it was one too many, after which the count begins anew."""
        self.meetings = self.meetings + 1 if str(error) == self.fault else 1
        self.fault = str(error)
        if self.meetings < MAX_MEETINGS:
            return False
        self.renew()
        return True

    def renew(self) -> None:
        """Forget the fault: its place was read, or left out."""
        self.fault, self.meetings = "", 0


def as_passing(error: SourceError) -> SourceError:
    """The same error as one that need not end anything: the place will be left out in time."""
    return SourceError(str(error), reason=error.reason, transient=True)


def seeded_order(items: Iterable[str], *, seed: int, salt: str) -> list[str]:
    """Distinct names in an order that depends on them, seed and salt alone."""

    def key(item: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{salt}\0{item}".encode(), digest_size=16).digest()

    return sorted(items, key=key)


def version_to_json(version: FileVersion | None) -> list[int | str] | None:
    """Size and tag, as a saved position keeps them; None where none was asked yet."""
    return None if version is None else [version.size, version.tag]


def version_from_json(value: list | None) -> FileVersion | None:
    """The version that `version_to_json` wrote."""
    return None if value is None else FileVersion(size=value[0], tag=value[1])


class RemoteFile(io.RawIOBase):
    """A file on a server as pyarrow wants to read it. Reads raise SourceError.

    Opening asks for one byte, which tells size and version; with `version` nothing is asked.
    """

    def __init__(
        self,
        client: HttpClient,
        url: str,
        *,
        headers: Mapping[str, str],
        version: FileVersion | None,
    ) -> None:
        self._client = client
        self._url = url
        self._headers = headers
        self._position = 0
        self.checksum = 0  # of what was read last
        if version is None:
            _, version = client.read_range(url, start=0, stop=1, headers=headers)
        self.version = version

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new position, which may lie behind the end but not before the beginning; asks
        nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.version.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """One range request; all that was asked for, less only at the end. Sets `checksum`
        (CRC-32)."""
        stop = self.version.size if size < 0 else min(self._position + size, self.version.size)
        if stop <= self._position:
            return b""
        content, _ = self._client.read_range(
            self._url,
            start=self._position,
            stop=stop,
            version=self.version,
            headers=self._headers,
        )
        self._position = stop
        self.checksum = zlib.crc32(content)
        return content
