"""The tokenizer script learns from the training side only and writes what the program loads."""

import json

import pytest

from scripts import train_tokenizer
from training.sources.base import split_of
from training.sources.local import LocalSource
from training.tokenizer import Tokenizer


@pytest.fixture
def corpus(tmp_path):
    """Held-out documents hold a word that training documents do not."""
    rows = []
    for number in range(400):
        name = f"doc/{number}"
        word = "zyzzyva" if split_of(name) == "validation" else "harbour"
        rows.append({"id": name, "text": f"the {word} of the town number {number} " * 10})
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_only_the_training_side_is_learned(corpus, tmp_path, capsys):
    output = tmp_path / "tokenizer.json"
    assert train_tokenizer.main([str(corpus), "--vocab-size", "400", "--output", str(output)]) == 0
    tokenizer = Tokenizer.from_name(str(output))
    text = "harbour zyzzyva \u4e2d\u6587\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" harbour")) == 1 < len(tokenizer.encode(" zyzzyva"))
    shown = capsys.readouterr().out
    assert tokenizer.sha256 in shown and "assets-4k" in shown


def test_no_more_text_is_used_than_asked_for(corpus):
    held_out: list[str] = []
    texts = list(
        train_tokenizer.read_split(LocalSource([corpus]), max_bytes=10_000, held_out=held_out)
    )
    assert 10_000 <= sum(map(len, texts)) < 10_500
    assert all("harbour" in text for text in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--output", "t.json"], "no such file"),
        (["{corpus}", "--output", "t.json", "--vocab-size", "100"], "at least 257"),
        (["{corpus}", "--output", "nowhere/t.json"], "no such folder"),
        (["{corpus}", "--output", "t.json", "--text-field", "body"], "'body'"),
    ],
)
def test_mistakes_are_one_clear_line(corpus, arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        train_tokenizer.main([part.format(corpus=corpus) for part in arguments])
    assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
