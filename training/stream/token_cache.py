"""Files of named integer arrays that know whether they are whole.

Layout: a magic line, the sha256 of everything after it, then an .npz archive of plain arrays (never
pickled objects). Written to a temporary name and moved into place, so a reader sees all of a file
or none.
"""

import contextlib
import hashlib
import io
import logging
import os
import zipfile
from pathlib import Path

import numpy as np

_MAGIC = b"sigma-tokens-1\n"
_DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


def write_token_file(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays under their names. A disk that refuses is logged: it costs only time."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    payload = buffer.getbuffer()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(_MAGIC)
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _log.warning(
            "the token cache %s could not be written (%s); the next start tokenizes again",
            path,
            error,
        )


def read_token_file(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None when there is none or it is damaged (the latter is logged)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("the token cache %s could not be read (%s); tokenizing again", path, error)
        return None
    header = len(_MAGIC) + _DIGEST_BYTES
    payload = memoryview(content)[header:]
    if (
        not content.startswith(_MAGIC)
        or hashlib.sha256(payload).digest() != content[len(_MAGIC) : header]
    ):
        _log.warning("the token cache %s is damaged; tokenizing again", path)
        return None
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile) as error:
        _log.warning("the token cache %s is unreadable (%s); tokenizing again", path, error)
        return None
