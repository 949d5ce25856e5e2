"""R16: 200 decompression bombs among good files: little memory, little work, good text unchanged.

Work is counted in decoded bytes, memory is the peak of a process of its own.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.training.sources.material import (
    drain,
    gzip_bomb,
    make_texts,
    repeated_value_parquet,
    to_lines,
    xz_bomb,
    zero_page_parquet,
    zstd_bomb,
)
from training.sources import byte_stream
from training.sources.byte_stream import ByteStream
from training.sources.local import LocalSource

ROOT = Path(__file__).resolve().parents[3]
NUM_BOMBS = 200
MEMORY_LIMIT = 64 << 20
LINE = b'{"text": "' + b"all work and no play " * 20 + b'"}\n'
FILLS = (b"\0", b"a", b" ", b"\n", b"[", LINE)

MEASURE = """
import json, sys, psutil
from pathlib import Path
from training.sources.local import LocalSource
from tests.training.sources.material import drain

def peak():
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return memory.peak_wset
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

drain(LocalSource([Path(sys.argv[1])]))
before = peak()
drain(LocalSource([Path(sys.argv[2])]))
print(json.dumps(peak() - before))
"""


def write_bomb(folder: Path, number: int, rng: random.Random) -> None:
    """One bomb; the kinds take turns, fill, size and harmless head are drawn."""
    fill, head = rng.choice(FILLS), rng.choice((b"", to_lines(make_texts(20, seed=number))))
    suffix = rng.choice((".jsonl", ".txt", ".py"))
    name = f"bomb-{number:03}{suffix}"
    kind = number % 10
    if kind < 4:
        size = rng.choice((2, 8))
        (folder / f"{name}.gz").write_bytes(
            gzip_bomb(fill, members=rng.randrange(40, 200), megabytes=size, head=head)
        )
    elif kind < 7:
        size = rng.choice((2, 16))
        (folder / f"{name}.zst").write_bytes(
            zstd_bomb(fill, frames=rng.randrange(40, 400), megabytes=size, head=head)
        )
    elif kind == 7:
        (folder / f"{name}.xz").write_bytes(xz_bomb(fill, megabytes=32, head=head))
    elif kind == 8:
        path = folder / f"bomb-{number:03}.parquet"
        repeated_value_parquet(path, megabytes=rng.randrange(3, 6), rows=100_000)
    else:
        path = folder / f"bomb-{number:03}.parquet"
        zero_page_parquet(path, megabytes=rng.randrange(16, 48))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of good files, and one with the same files and the bombs among them."""
    clean, mined = (tmp_path_factory.mktemp(name) / "x" for name in ("clean", "mined"))
    for folder in (clean, mined):
        folder.mkdir()
        for number in range(0, NUM_BOMBS, 20):
            content = to_lines(make_texts(100, seed=1000 + number))
            (folder / f"bomb-{number:03}-good.jsonl").write_bytes(content)
    rng = random.Random(0)
    for number in range(NUM_BOMBS):
        write_bomb(mined, number, rng)
    return clean, mined


def is_good(document) -> bool:
    return "-good" in document.id


def test_good_text_is_unchanged_and_every_bomb_is_counted(folders, monkeypatch):
    clean, mined = folders
    decoded: Counter[str] = Counter()
    original = ByteStream.read_chunk

    def counted(stream):
        chunk = original(stream)
        decoded[stream._file.name] += len(chunk)
        return chunk

    monkeypatch.setattr(ByteStream, "read_chunk", counted)
    source = LocalSource([mined])
    found = drain(source)
    assert [d for d in found if is_good(d)] == drain(LocalSource([clean]))
    assert source.rejected["bomb"] == NUM_BOMBS
    assert max(decoded.values()) < 24 << 20


def test_memory_stays_small(folders):
    clean, mined = folders
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(clean), str(mined)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < MEMORY_LIMIT


def test_without_the_rule_a_bomb_unpacks(tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip_bomb(b"a", members=40, megabytes=2))
    assert len(drain(LocalSource([tmp_path]))) == 0
    monkeypatch.setattr(byte_stream, "EXCESS_BYTES", 1 << 40)
    assert sum(len(d.text) for d in drain(LocalSource([tmp_path]))) == 80 << 20


def test_text_that_packs_well_is_no_bomb(tmp_path):
    """Tables and logs pack thirty times and more."""
    rows = [
        f"2026-11-21T00:{n // 60:02}:{n % 60:02} INFO worker ready, queue empty"
        for n in range(60_000)
    ]
    packed = gzip_bomb(("\n".join(rows) + "\n").encode(), members=3, megabytes=4)
    (tmp_path / "log.txt.gz").write_bytes(packed)
    source = LocalSource([tmp_path])
    assert sum(len(d.text) for d in drain(source)) > 9_000_000 and not source.rejected
