"""The corpus that ships with the program, so that a first run needs no network.

`assets/corpus.jsonl.xz` holds one JSON object a line (`id`, `source`, `text`);
scripts/build_assets.py makes it from freely redistributable documentation and the King James Bible
(assets/LICENCES.md).
"""

import hashlib
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from training.sources.base import ASSETS_DIRECTORY, Document, in_scoring_order, split_of

CORPUS_FILE = "corpus.jsonl.xz"
MANIFEST_FILE = "MANIFEST.json"


class EmbeddedCorpus:
    """The shipped documents. Opening reads the packed file; text is unpacked when asked for."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or ASSETS_DIRECTORY / CORPUS_FILE
        try:
            self._packed = self.path.read_bytes()
        except OSError as error:
            raise RuntimeError(
                f"the embedded corpus cannot be read ({error}); restore it with the program"
            ) from error
        self._fingerprint = hashlib.sha256(self._packed).hexdigest()

    @property
    def fingerprint(self) -> str:
        """sha256 of the shipped file."""
        return self._fingerprint

    def documents(self) -> Iterator[Document]:
        """Every document in the file's order. A damaged file raises RuntimeError."""
        try:
            content = lzma.decompress(self._packed)
        except lzma.LZMAError as error:
            raise RuntimeError(
                f"{self.path} is damaged ({error}); restore it from the program's sources"
            ) from error
        for line in content.split(b"\n")[:-1]:
            row = json.loads(line)
            yield Document(id=row["id"], source=row["source"], text=row["text"])

    def validation_text(self) -> bytes:
        """The validation split as UTF-8 bytes, documents in the order in which they are scored."""
        held_out = [doc for doc in self.documents() if split_of(doc.id) == "validation"]
        return "".join(doc.text for doc in in_scoring_order(held_out)).encode()


def reference_bits_per_byte() -> dict[str, float]:
    """What `xz -9e` makes of the whole validation split, by name, as measured when assets/ was
    built: a model above it has learned no more than repetition."""
    content = (ASSETS_DIRECTORY / MANIFEST_FILE).read_text(encoding="utf-8")
    return json.loads(content)["validation_bits_per_byte"]
