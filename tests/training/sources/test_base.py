"""The split is a function of a document's name alone."""

from training.sources.base import (
    SOURCE_IDS,
    Document,
    hash_of,
    in_scoring_order,
    split_of,
)

KNOWN = {
    "king-james-bible/genesis-1": "train",
    "king-james-bible/exodus-16": "validation",
    "python-docs/library/bisect": "train",
    "python-docs/library/logging": "validation",
    "postgresql-docs/sql-insert": "validation",
    "sqlite-docs/partialindex": "validation",
}


def test_the_split_is_fixed_for_ever():
    # Published names and their sides: a change here moves text between training and validation.
    assert {name: split_of(name) for name in KNOWN} == KNOWN


def test_four_percent_of_names_are_held_out():
    held_out = sum(split_of(f"example/{number}") == "validation" for number in range(20_000))
    assert 0.035 < held_out / 20_000 < 0.045


def test_source_ids_are_distinct_and_fit_the_contract():
    assert len(set(SOURCE_IDS.values())) == len(SOURCE_IDS)
    assert SOURCE_IDS["unknown"] == 0 and SOURCE_IDS["synthetic"] == 4
    assert max(SOURCE_IDS.values()) < 2**15


def make_documents():
    return [
        Document(id=f"{source}/{number}", source=source, text="x" * size)
        for source, count, size in (("python-docs", 5, 400), ("king-james-bible", 40, 50))
        for number in range(count)
    ]


def test_scoring_order_ignores_the_order_given():
    documents = make_documents()
    ordered = in_scoring_order(documents)
    assert in_scoring_order(reversed(documents)) == ordered
    assert sorted(ordered, key=lambda d: d.id) == sorted(documents, key=lambda d: d.id)


def test_every_prefix_holds_each_source_in_proportion():
    seen = {"python-docs": 0, "king-james-bible": 0}
    for document in in_scoring_order(make_documents()):
        seen[document.source] += len(document.text)
        # Both sources have 2,000 characters; they may differ by a document of each.
        assert abs(seen["python-docs"] - seen["king-james-bible"]) <= 450


def test_hash_depends_on_the_name_only():
    assert hash_of("a") != hash_of("b")
    assert 0 <= hash_of("a") < 2**64
