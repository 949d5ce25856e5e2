"""The shipped corpus: whole, clean, split by document, and the validation text not in training."""

import hashlib
import json
import lzma
import re

import numpy as np
import pytest

from scripts.baseline_compressors import compressed_bits_per_byte
from training.data import tokenize_corpus, validation_batches
from training.sources.base import ASSETS_DIRECTORY, SOURCE_IDS, split_of
from training.sources.embedded import CORPUS_FILE, EmbeddedCorpus, reference_bits_per_byte
from training.tokenizer import Tokenizer

SOURCES = {"python-docs", "postgresql-docs", "sqlite-docs", "king-james-bible"}


@pytest.fixture(scope="module")
def documents():
    return list(EmbeddedCorpus().documents())


@pytest.fixture(scope="module")
def corpus():
    return tokenize_corpus(EmbeddedCorpus(), Tokenizer.from_name("assets-4k"))


def test_manifest_matches_every_shipped_file(documents):
    manifest = json.loads((ASSETS_DIRECTORY / "MANIFEST.json").read_text(encoding="utf-8"))
    names = {path.name for path in ASSETS_DIRECTORY.iterdir() if path.is_file()}
    assert names - {".gitattributes"} == {*manifest["files"], "MANIFEST.json"}
    for name, facts in manifest["files"].items():
        content = (ASSETS_DIRECTORY / name).read_bytes()
        assert len(content) == facts["bytes"]
        assert hashlib.sha256(content).hexdigest() == facts["sha256"]
    for source, facts in manifest["sources"].items():
        own = [document for document in documents if document.source == source]
        held_out = [document for document in own if split_of(document.id) == "validation"]
        assert facts["documents"] == len(own)
        assert facts["validation_documents"] == len(held_out)
        assert facts["validation_bytes"] == sum(len(d.text.encode()) for d in held_out)
    packed = (ASSETS_DIRECTORY / CORPUS_FILE).read_bytes()
    content_hash = hashlib.sha256(lzma.decompress(packed)).hexdigest()
    assert manifest["corpus_text_sha256"] == content_hash


def test_reference_figure_is_what_the_compressor_makes_of_the_text():
    measured = compressed_bits_per_byte(EmbeddedCorpus().validation_text(), compressor="xz -9e")
    # Versions of liblzma may differ in a few bytes.
    assert reference_bits_per_byte()["xz_-9e"] == pytest.approx(measured, abs=2e-3)


def test_size_and_sources(documents):
    assert {document.source for document in documents} == SOURCES <= SOURCE_IDS.keys()
    assert len({document.id for document in documents}) == len(documents)
    assert 10e6 < sum(len(document.text.encode()) for document in documents) < 15e6
    assert (ASSETS_DIRECTORY / CORPUS_FILE).stat().st_size < 4e6


def test_every_source_is_held_out_in_part(documents):
    for source in SOURCES:
        sizes = {"train": 0, "validation": 0}
        for document in documents:
            if document.source == source:
                sizes[split_of(document.id)] += len(document.text)
        assert 0.02 < sizes["validation"] / sum(sizes.values()) < 0.07


def test_text_is_clean(documents):
    chrome = re.compile(
        r"</?(div|span|p|a|td|table)[ >]|&(nbsp|lt|gt|amp|quot);|¶|This page last modified"
        r"|Previous topic|Navigation header|[\u2018\u2019\u201c\u201d\u00a0\ufeff\r\x00]"
    )
    # Pages about mark-up show some; nobody else may.
    dirty = {d.id for d in documents if chrome.search(d.text)}
    assert len(dirty) < 0.01 * len(documents), sorted(dirty)
    for document in documents:
        assert document.text.strip() and document.text.endswith("\n")


def test_licences_cover_every_source():
    text = (ASSETS_DIRECTORY / "LICENCES.md").read_text(encoding="utf-8")
    for source in SOURCES:
        assert f"`{source}`" in text
    for words in (
        "PSF LICENSE AGREEMENT",
        "PostgreSQL Global Development Group",
        "SQLite is in the Public Domain",
        "public domain in the United States",
        "MIT License",
    ):
        assert words in text


def grams(text, size=13):
    words = re.findall(r"\w+", text.lower())
    return [hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)]


def test_validation_text_is_not_in_training_in_bulk(documents):
    held_out = [g for d in documents if split_of(d.id) == "validation" for g in grams(d.text)]
    wanted = set(held_out)
    found = set()
    for document in documents:
        if split_of(document.id) == "train":
            found |= wanted.intersection(grams(document.text))
    share = sum(gram in found for gram in held_out) / len(held_out)
    assert share < 0.02, (
        f"{share:.4f} of the validation 13-grams stand in training (0.0148 at birth)"
    )


def test_no_long_paragraph_stands_twice(documents):
    seen = set()
    for document in documents:
        for block in document.text.split("\n\n"):
            # Listings have blank lines inside, so only prose is cut right here.
            if len(block) >= 40 and block[0].isalpha():
                assert block not in seen, document.id
                seen.add(block)


def test_validation_text_is_the_published_one(documents):
    manifest = json.loads((ASSETS_DIRECTORY / "MANIFEST.json").read_text(encoding="utf-8"))
    text = EmbeddedCorpus().validation_text()
    assert hashlib.sha256(text).hexdigest() == manifest["validation_text_sha256"]
    held_out = [d for d in documents if split_of(d.id) == "validation"]
    assert sorted(text) == sorted("".join(d.text for d in held_out).encode())


def test_scored_bytes_are_those_of_the_validation_text(corpus):
    text = EmbeddedCorpus().validation_text()
    total = sum(b.num_bytes for b in validation_batches(corpus, seq_len=256, batch_size=32))
    assert total == len(text)
    large = Tokenizer.from_name("assets-32k")
    assert large.token_byte_lengths[large.encode(text)].sum() == len(text)


def test_early_evaluation_sees_every_source(corpus):
    counts = np.zeros(max(SOURCE_IDS.values()) + 1)
    batches = validation_batches(corpus, seq_len=256, batch_size=16, max_tokens=50_000)
    for batch in batches:
        counts += np.bincount(batch.source_ids.flatten().numpy(), minlength=len(counts))
    for source in SOURCES:
        assert counts[SOURCE_IDS[source]] > 0.04 * counts.sum()


def test_opening_does_not_unpack(monkeypatch):
    monkeypatch.setattr(lzma, "decompress", None)
    assert len(EmbeddedCorpus().fingerprint) == 64


def test_missing_and_damaged_files_are_named(tmp_path):
    path = tmp_path / CORPUS_FILE
    with pytest.raises(RuntimeError, match="embedded corpus"):
        EmbeddedCorpus(path)
    path.write_bytes((ASSETS_DIRECTORY / CORPUS_FILE).read_bytes()[:100_000])
    with pytest.raises(RuntimeError, match="damaged"):
        list(EmbeddedCorpus(path).documents())
