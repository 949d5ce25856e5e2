"""The asset builder on small made packages: clean text, and the same bytes every time."""

import json
import lzma

import pytest

from scripts.assets_corpus import (
    BIBLE_PACKAGE,
    PAGE_SOURCES,
    RawDocument,
    deduplicate,
    prose_share,
    read_pages,
)
from scripts.assets_html import extract_blocks
from scripts.build_assets import build, unpack
from training.tokenizer import Tokenizer

PROSE = (
    "The {0} module of the library is for those who want to read the {0} of a file, and it is "
    "the one that you should use when the file is not larger than the memory of the machine. "
)


def sphinx_page(topic):
    return f"""<html><head><title>{topic} - Docs</title></head><body>
<div class="related"><ul><li>index</li></ul></div>
<div class="body" role="main"><section><h1>{topic}<a class="headerlink" href="#">¶</a></h1>
<p>{PROSE.format(topic)}</p><p>{PROSE.format(topic + " writer")}</p>
<div class="highlight"><pre>import {topic}
x = 1 &lt; 2</pre></div></section></div><div class="sphinxsidebar"><p>Navigation</p></div>
</body></html>"""


def docbook_page(topic):
    return f"""<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head>
<title>{topic}</title></head><body><div class="navheader"><a>Prev</a></div>
<div class="sect1"><div class="titlepage"></div><h2 class="title">9.3. {topic}</h2>
<p>{PROSE.format(topic)}</p><p>{PROSE.format(topic + " reader")}</p></div>
<div class="navfooter">Next</div></body></html>"""


def loose_page(topic):
    return f"""<html><head><title>{topic}</title></head><body>
<div class=nosearch><ul><li>Home<li>About</ul></div><script>x()</script>
<h1>1. Overview</h1><p>{PROSE.format(topic)}<p>{PROSE.format(topic + " checker")}
<ul><li>first<li>second</ul><p><small><i>This page last modified on today</i></small>
</body></html>"""


@pytest.fixture
def unpacked(tmp_path):
    pages = {"python3.11-doc": sphinx_page, "postgresql-doc-15": docbook_page}
    folders = {}
    for source in PAGE_SOURCES:
        root = tmp_path / source.package / source.root
        root.mkdir(parents=True)
        make = pages.get(source.package, loose_page)
        for number in range(12):
            page = make(f"{source.name}{number}")
            (root / f"page{number}.html").write_text(page, encoding="utf-8")
        folders[source.package] = (tmp_path / source.package, "1.0")
    roots = [folders[source.package][0] / source.root for source in PAGE_SOURCES]
    (roots[0] / "license.html").write_text(
        '<div class="body"><h2>Terms and conditions</h2><p>Do as you like.</p>'
        "<h2>Licenses for Incorporated Software</h2>"
        "<h3>Licenses and Acknowledgements for Incorporated Software</h3></div>",
        encoding="utf-8",
    )
    (roots[0] / "copyright.html").write_text(
        '<div class="body"><h1>Copyright</h1><p>Copyright of somebody.</p></div>', encoding="utf-8"
    )
    (roots[1] / "legalnotice.html").write_text("<p>A notice.</p>", encoding="utf-8")
    (roots[2] / "copyright.html").write_text(
        "<p>In the Public Domain.</p><h2>Open-Source, not Open-Contribution</h2>", encoding="utf-8"
    )
    bible = tmp_path / BIBLE_PACKAGE
    (bible / "bible" / "data").mkdir(parents=True)
    verses = [
        {"book": "Genesis", "chapter": chapter, "verse": verse, "text": f"And it was so {verse}."}
        for chapter in (1, 2)
        for verse in range(1, 6)
    ]
    text = "".join(json.dumps(verse) + "\n" for verse in verses)
    (bible / "bible" / "data" / "kjv.jsonl").write_text(text, encoding="utf-8")
    (bible / "LICENSE").write_text("A licence.", encoding="utf-8")
    folders[BIBLE_PACKAGE] = (bible, "0.1")
    return folders


def test_two_builds_are_byte_identical(unpacked):
    first, second = build(unpacked), build(unpacked)
    assert first == second
    assert list(first)[-1] == "MANIFEST.json"
    tokenizer = Tokenizer(first["tokenizer_4k.json"])
    assert tokenizer.decode_bytes(tokenizer.encode(b"\xff ok")) == b"\xff ok"


def test_built_text_is_clean_and_whole(unpacked):
    files = build(unpacked)
    rows = [json.loads(line) for line in lzma.decompress(files["corpus.jsonl.xz"]).splitlines()]
    texts = {row["id"]: row["text"] for row in rows}
    assert len(texts) == 3 * 12 + 1  # the second chapter of the Bible repeats the first
    page = texts["python-docs/page3"]
    assert page.startswith("# python-docs3\n\nThe python-docs3 module")
    assert page.endswith("    import python-docs3\n    x = 1 < 2\n")
    assert texts["postgresql-docs/page0"].startswith("## postgresql-docs0\n\nThe")
    loose = texts["sqlite-docs/page5"]
    assert loose.startswith("# sqlite-docs5\n\n## Overview\n\nThe")
    assert loose.endswith("- first\n\n- second\n")
    for text in texts.values():
        for chrome in ("Home", "Prev", "Next", "Navigation", "¶", "modified", "x()", "<"):
            assert chrome not in text.replace("1 < 2", "")


def test_changed_text_changes_the_manifest(unpacked):
    before = json.loads(build(unpacked)["MANIFEST.json"])
    folder = unpacked["sqlite3-doc"][0] / PAGE_SOURCES[2].root
    page = (folder / "page1.html").read_text(encoding="utf-8").replace("larger", "smaller")
    (folder / "page1.html").write_text(page, encoding="utf-8")
    after = json.loads(build(unpacked)["MANIFEST.json"])
    assert before["corpus_text_sha256"] != after["corpus_text_sha256"]
    assert before["packages"] == after["packages"]


def test_left_out_pages_stay_out(unpacked):
    folder = unpacked["postgresql-doc-15"][0] / PAGE_SOURCES[1].root
    (folder / "bookindex.html").write_text(docbook_page("index of all"), encoding="utf-8")
    (folder / "release-15-1.html").write_text(docbook_page("release"), encoding="utf-8")
    ids = [doc.id for doc in read_pages(PAGE_SOURCES[1], unpacked["postgresql-doc-15"][0])]
    assert len(ids) == 12


def test_a_repeated_paragraph_stays_where_it_first_stood():
    shared = PROSE.format("shared").strip()
    own = [PROSE.format(f"own {number} thing") * 2 for number in range(2)]
    documents = [
        RawDocument(id=f"d{number}", source="sqlite-docs", blocks=[own[number], "  " + shared])
        for number in range(2)
    ]
    rows = list(deduplicate(documents))
    assert [shared in row["text"] for row in rows] == [True, False]


def test_headings_without_text_go():
    body = PROSE.format("body") * 3
    blocks = ["# Title", "## Empty", "## Full", body, "## Last"]
    (row,) = deduplicate([RawDocument(id="d", source="sqlite-docs", blocks=blocks)])
    assert row["text"] == f"# Title\n\n## Full\n\n{body}\n"


def test_prose_share_tells_text_from_listings():
    assert prose_share([PROSE.format("a")]) == 1.0
    assert prose_share(["    x = 1\n    y = 2", "oid | int4 | name | text | a | b | c | d"]) == 0.0


def test_converter_handles_nesting_entities_and_tables():
    page = """<body><p>A &amp; B&nbsp;&#8220;q&#8221;</p>
<ol><li><p>one</p><ul><li>inner</ul><li>two</ol>
<dl><dt>term<dd>meaning<dl><dt>deep</dt><dd>more</dd></dl></dl>
<table><tr><th>k<th>v<tr><td>a<td>1</table><table><tr><td><p>alone</p><p>again</p></table>
<blockquote><pre>
  if x:
      y

</pre></blockquote><svg><text>no</text></svg><p>tail"""
    title, blocks = extract_blocks(page)
    assert title == ""
    assert blocks == [
        'A & B "q"',
        "1. one",
        "   - inner",
        "2. two",
        "term",
        "    meaning",
        "    deep",
        "        more",
        "k | v",
        "a | 1",
        "alone",
        "again",
        "    if x:\n        y",
        "tail",
    ]


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match=r"python3\.11-doc_\*\.deb"):
        unpack(tmp_path, tmp_path / "out")
