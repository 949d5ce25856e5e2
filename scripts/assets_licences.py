"""Write assets/LICENCES.md from the licence pages inside the source packages themselves.

Taking the words from the packages keeps them those of the very version that is shipped.
"""

from pathlib import Path

from scripts.assets_corpus import BIBLE_PACKAGE, BIBLE_SOURCE, PAGE_SOURCES, PageSource
from scripts.assets_html import extract_blocks

_INTRODUCTION = """\
`corpus.jsonl.xz` is made by `scripts/build_assets.py` from the packages below; the tokenizers are
trained on its training split. Versions and checksums are in `MANIFEST.json`.

The texts were changed: mark-up, navigation, pictures and repeated paragraphs were removed, lines
were rewrapped, typographic quotation marks were made plain, and pages that are mostly listings or
tables were left out. Nothing was added except headings that repeat a page's title."""
_BIBLE = """\
The Authorised (King James) Version, 1769 text, is in the public domain in the United States and
elsewhere. In the United Kingdom the right to print it is held by the Crown under letters patent.
The package that carries the text is under the licence below."""


def write_licences(unpacked: dict[str, tuple[Path, str]]) -> str:
    """The licence document for packages given as name -> (unpacked folder, version)."""
    python, postgresql, sqlite = PAGE_SOURCES
    bible_root, bible_version = unpacked[BIBLE_PACKAGE]
    sections = [
        "# Licences of the embedded corpus",
        _INTRODUCTION,
        _heading("Python documentation", python, unpacked),
        _python_licence(unpacked[python.package][0] / python.root),
        _heading("PostgreSQL documentation", postgresql, unpacked),
        _page(unpacked[postgresql.package][0] / postgresql.root / "legalnotice.html"),
        _heading("SQLite documentation", sqlite, unpacked),
        _sqlite_statement(unpacked[sqlite.package][0] / sqlite.root),
        f"## King James Bible (`{BIBLE_SOURCE}`, Python package {BIBLE_PACKAGE} {bible_version})",
        _BIBLE,
        (bible_root / "LICENSE").read_text(encoding="utf-8").strip(),
    ]
    return "\n\n".join(sections) + "\n"


def _heading(title: str, source: PageSource, unpacked: dict[str, tuple[Path, str]]) -> str:
    version = unpacked[source.package][1]
    return f"## {title} (`{source.name}`, Debian package {source.package} {version})"


def _page(path: Path, *, main_class: str | None = None) -> str:
    return "\n\n".join(_blocks(path, main_class=main_class))


def _blocks(path: Path, *, main_class: str | None = None) -> list[str]:
    page = path.read_text(encoding="utf-8")
    blocks = extract_blocks(page, main_class=main_class)[1]
    return ["#" + block if block.startswith("##") else block for block in blocks]


def _python_licence(root: Path) -> str:
    blocks = _blocks(root / "license.html", main_class="body")
    start = next(i for i, block in enumerate(blocks) if "Terms and conditions" in block)
    end = next(
        i
        for i, block in enumerate(blocks)
        if block.startswith("###") and "Incorporated Software" in block
    )
    return "\n\n".join(
        [*_blocks(root / "copyright.html", main_class="body")[1:], *blocks[start:end]]
    )


def _sqlite_statement(root: Path) -> str:
    blocks = _blocks(root / "copyright.html")
    end = next(i for i, block in enumerate(blocks) if "Open-Contribution" in block)
    return "\n\n".join(blocks[:end])
