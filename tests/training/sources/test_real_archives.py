"""Real Common Crawl records of 2014: the sample files of the npm package `warc` 1.0.1.

They are fetched by package name with npm, so this is a soak test. The samples are not packed; here
every record becomes a gzip member of its own, as Common Crawl serves them.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import tarfile

import pytest

from tests.fakeworld.clients import drain, make_client
from tests.fakeworld.server import FakeWorld
from training.sources.commoncrawl import CommonCrawlSource

PACKAGE = "warc@1.0.1"
CRAWL = "CC-MAIN-2014-35"
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("npm")
    run = subprocess.run([npm, "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True)
    if run.returncode:
        pytest.skip("the sample package cannot be fetched")
    found = {}
    with tarfile.open(folder / "warc-1.0.1.tgz") as archive:
        for entry in archive.getmembers():
            file = archive.extractfile(entry) if "fixtures/CC-MAIN" in entry.name else None
            if file is not None:
                found[entry.name.rpartition(".")[2]] = file.read()
    return found


def split_records(content: bytes) -> list[bytes]:
    """Records by their own Content-Length."""
    records, position = [], 0
    while position < len(content):
        head = content.index(b"\r\n\r\n", position) + 4
        length = re.search(rb"(?i)^content-length: *(\d+)", content[position:head], re.MULTILINE)
        assert length is not None
        end = head + int(length[1])
        records.append(content[position:end] + b"\r\n\r\n")
        position = end
        while content[position : position + 1] in (b"\r", b"\n"):
            position += 1
    return records


@pytest.mark.parametrize(("kind", "least"), [("wet", 3), ("warc", 2)])
def test_real_records_give_their_text(samples, kind, least):
    records = split_records(samples[kind])
    path = f"crawl-data/{CRAWL}/one.{kind}.gz"
    with FakeWorld() as world:
        world.resources["/collinfo.json"] = f'[{{"id": "{CRAWL}"}}]'.encode()
        world.resources[f"/crawl-data/{CRAWL}/{kind}.paths.gz"] = gzip.compress(path.encode())
        world.resources["/" + path] = b"".join(gzip.compress(record) for record in records)
        source = CommonCrawlSource(
            client=make_client(),
            crawls=1,
            wet_paths_per_crawl=1,
            records_per_file=100,
            kind=kind,
            languages=(),
            index_url=world.url + "/collinfo.json",
            data_url=world.url,
        )
        documents, errors = drain(source)
    wanted = b"conversion" if kind == "wet" else b"response"
    total = sum(b"WARC-Type: " + wanted in record for record in records)
    assert not errors and total == len(documents) + source.rejected.total()
    assert len(documents) >= least
    for document in documents:
        assert len(document.text) > 40 and "<div" not in document.text
        print(document.id, len(document.text), repr(document.text[:160]))
    if kind == "wet":  # the block is the text, whatever a parser makes of the record
        blocks = {record.partition(b"\r\n\r\n")[2].strip().decode() for record in records}
        assert all(document.text in blocks for document in documents)
