"""The generator: a seed gives one evaluation, on every machine; without the seed nobody has it."""

import hashlib
from collections import Counter

import pytest

from scripts.build_hidden_eval import build_manifest, main
from scripts.hidden_items import FAMILIES, generate_items
from tests.training.hidden_models import true_choice
from training.hidden_eval import DEFAULT_MANIFEST, encode_manifest
from training.stream.contamination import ContaminationIndex

SEED = bytes(range(32))


def test_a_seed_gives_the_same_questions_for_ever():
    """A changed generator needs a new GENERATOR_VERSION: then this digest may change as well."""
    items = generate_items(SEED, 160)
    digest = hashlib.sha256(repr(items).encode()).hexdigest()
    assert digest == "f78cc3a83f7a012564befeb06ac06051513de9a396fd1c2060ca3fe6ce26cee8"
    assert generate_items(SEED, 80) == items[:80]
    assert generate_items(SEED[::-1], 80) != items[:80]


def test_each_family_asks_in_turn_and_hides_its_answer_evenly():
    items = generate_items(SEED, 2000)
    assert Counter(item.family for item in items) == dict.fromkeys(FAMILIES, 250)
    places = Counter(item.truth for item in items)
    assert all(abs(places[place] - 500) < 80 for place in range(4))  # 4 standard deviations
    assert all(len(set(item.choices)) == 4 for item in items)


def test_the_manifest_knows_the_true_answers_and_all_passages():
    items = generate_items(SEED, 200)
    manifest = build_manifest(SEED, num_questions=200)
    assert [true_choice(question) for question in manifest.questions] == [
        item.choices[item.truth] for item in items
    ]
    index = ContaminationIndex(passages=manifest.passages)
    for item in items[:40]:
        counts = {index.count_runs(item.prompt + choice) for choice in item.choices}
        assert min(counts) > 0
    assert manifest.seed_commitment == hashlib.sha256(SEED).hexdigest()


def test_the_file_is_checked_against_its_seed(tmp_path, capsys):
    seed, output = tmp_path / "seed.bin", tmp_path / "hidden.json"
    flags = ["--seed-file", str(seed), "--output", str(output)]
    assert main(flags) == 0
    assert len(seed.read_bytes()) == 32
    assert main([*flags, "--check"]) == 0
    seed.write_bytes(SEED)
    assert main([*flags, "--check"]) == 1
    assert "is NOT what the seed gives" in capsys.readouterr().out


def test_nobody_draws_the_shipped_evaluation_from_an_obvious_seed():
    shipped = DEFAULT_MANIFEST.read_text(encoding="utf-8")
    for guess in (bytes(32), SEED, b"0" * 32, b"sigma".ljust(32), hashlib.sha256(b"").digest()):
        assert encode_manifest(build_manifest(guess)) != shipped


def test_a_seed_of_another_length_is_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        build_manifest(b"short")
