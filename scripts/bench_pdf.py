"""What PDF volumes give: chunks, characters per second, pages left out, words against pdftotext.

    python scripts/bench_pdf.py FOLDER --name WHAT --output FILE

Every page is in a chunk or counted by reason. The oracle is `pdftotext` of poppler, another
program altogether: of the words that it finds, the share that came out here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.soak import code_version, machine_text
from training.sources.base import Document, SourceExhausted
from training.sources.pdf import PdfSource

_WORD = re.compile(r"[A-Za-z]{3,}")


def read(folder: Path) -> tuple[list[Document], Counter[str], float]:
    """All chunks, what was left out by reason, and the seconds it took."""
    source = PdfSource([folder])
    documents: list[Document] = []
    start = time.perf_counter()
    while True:
        try:
            documents.append(source.next_document())
        except SourceExhausted:
            break
    seconds = time.perf_counter() - start
    source.close()
    return documents, source.rejected, seconds


def words_of_poppler(folder: Path) -> Counter[str]:
    """Words that pdftotext finds; none without that program."""
    program = shutil.which("pdftotext")
    found: Counter[str] = Counter()
    if program is None:
        return found
    for path in sorted(folder.rglob("*.pdf")):
        run = subprocess.run([program, "-enc", "UTF-8", str(path), "-"], capture_output=True)
        found.update(_WORD.findall(run.stdout.decode("utf-8", "replace").lower()))
    return found


def count_pages(folder: Path) -> int:
    import pypdfium2

    total = 0
    for path in sorted(folder.rglob("*.pdf")):
        with pypdfium2.PdfDocument(path) as document:
            total += len(document)
    return total


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="what the folder is, with its version")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    documents, rejected, seconds = read(options.folder)
    text = "".join(document.text for document in documents)
    words = Counter(_WORD.findall(text.lower()))
    expected = words_of_poppler(options.folder)
    report: dict[str, Any] = {
        "what": options.name,
        "files": len({document.id.partition("#")[0] for document in documents}),
        "pages": count_pages(options.folder),
        "chunks": len(documents),
        "characters": len(text),
        "left_out_by_reason": dict(rejected),
        "words_of_pdftotext": expected.total(),
        "share_of_them_found": round((words & expected).total() / max(1, expected.total()), 4),
        "share_of_words_that_are_among_them": round(
            (words & expected).total() / max(1, words.total()), 4
        ),
        "characters_per_s": round(len(text) / seconds),
        "code": code_version(),
        "machine": machine_text(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
