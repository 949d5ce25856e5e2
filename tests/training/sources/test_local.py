"""Local files: every format gives the same texts, positions are exact, damage is counted."""

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.sources.material import drain, make_texts, to_lines, write_formats, zstd
from training.sources import file_readers
from training.sources.base import SourceError, SourceExhausted
from training.sources.byte_stream import ByteStream
from training.sources.local import LocalSource

TEXTS = make_texts(300, seed=0)


@pytest.fixture
def formats(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_formats(folder, TEXTS)
    return folder


def test_every_format_gives_the_same_texts(formats):
    source = LocalSource([formats])
    found = drain(source)
    by_file: dict[str, list[str]] = {}
    for document in found:
        by_file.setdefault(document.id.split("#")[0], []).append(document.text)
    assert len(by_file) == 9 and all(texts == TEXTS for texts in by_file.values())
    assert len({document.id for document in found}) == len(found)
    assert not source.rejected
    assert found[0].id == "corpus/a.jsonl#0" and found[0].source == "local"


def test_a_position_is_exact_after_any_document(formats):
    (formats / "j.txt").write_text("\n\n".join(TEXTS))
    options = {"max_document_bytes": 4000}
    source = LocalSource([formats], **options)
    found, states = [], [json.dumps(source.state_dict())]
    for document in drain(LocalSource([formats], **options)):
        assert source.next_document() == document
        found.append(document)
        states.append(json.dumps(source.state_dict()))
    rng = random.Random(1)
    for place in [0, len(found), *rng.sample(range(len(found)), 60)]:
        resumed = LocalSource([formats], **options)
        resumed.load_state_dict(json.loads(states[place]))
        assert drain(resumed, 12) == found[place : place + 12]
    assert max(map(len, states)) < 400


def test_resuming_costs_the_same_however_far_in(tmp_path, monkeypatch):
    """Decoded bytes are counted: a frame at most, wherever the position is."""
    lines = to_lines(make_texts(4000, seed=2))
    frames = b"".join(zstd(lines[at : at + 50_000]) for at in range(0, len(lines), 50_000))
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "b.jsonl").write_bytes(lines)
    source = LocalSource([tmp_path])
    states = []
    for _ in range(8000):
        source.next_document()
        states.append(source.state_dict())
    decoded = Counter()
    original = ByteStream.read_chunk

    def counted(stream):
        chunk = original(stream)
        decoded["bytes"] += len(chunk)
        return chunk

    monkeypatch.setattr(ByteStream, "read_chunk", counted)
    resumed = LocalSource([tmp_path])
    for place in (10, 1000, 3900, 4010, 5000, 7900):
        resumed.load_state_dict(states[place])
        decoded.clear()
        resumed.next_document()
        assert decoded["bytes"] < 150_000 < len(lines)


def test_another_list_of_files_refuses_the_position(formats):
    source = LocalSource([formats])
    drain(source, 5)
    state = source.state_dict()
    (formats / "z.txt").write_text("one more file")
    other = LocalSource([formats])
    assert other.identity() != source.identity()
    with pytest.raises(ValueError, match="names or sizes have changed"):
        other.load_state_dict(state)


def test_epochs_repeat_and_moving_the_folder_changes_nothing(formats, tmp_path):
    source = LocalSource([formats])
    first = drain(source)
    with pytest.raises(SourceExhausted):
        source.next_document()
    source.rewind(epoch=1)
    assert drain(source) == first
    (tmp_path / "elsewhere").mkdir()
    moved = formats.rename(tmp_path / "elsewhere" / "corpus")
    assert drain(LocalSource([moved])) == first
    assert LocalSource([moved]).identity() == source.identity()


def test_long_texts_are_cut_without_loss(tmp_path):
    paragraphs = make_texts(200, seed=3, longest=60)
    text = "\n\n".join(paragraphs) + "\n"
    (tmp_path / "book.txt").write_bytes(text.encode())
    (tmp_path / "chinese.txt").write_bytes(("\u4e2d" * 5000).encode())
    found = drain(LocalSource([tmp_path], max_document_bytes=3000))
    book = [document.text for document in found if "book" in document.id]
    assert "".join(book) == text
    assert all(len(piece.encode()) <= 3000 and piece.endswith("\n\n") for piece in book[:-1])
    assert "".join(d.text for d in found if "chinese" in d.id) == "\u4e2d" * 5000


def test_line_ends_and_byte_order_marks_vanish(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "b.txt").write_bytes("one\r\ntwo\rthree\n".encode("utf-16"))
    assert [d.text for d in drain(LocalSource([tmp_path]))] == ["one\ntwo\nthree\n"] * 2


def test_damage_is_counted_and_the_rest_is_read(tmp_path):
    good = {"text": "good words"}
    rows = [
        json.dumps(good),
        "{broken",
        "[1, 2]",
        json.dumps({"body": "no text"}),
        json.dumps({"text": 5}),
        json.dumps({"text": "  \n"}),
        json.dumps({"text": "a\0b"}),
        json.dumps({"text": "x" * 5000}),
        json.dumps({"text": "y" * 50_000}),
        '{"text": "half a pair \\ud800"}',
        "[" * 5000,
        "",
        json.dumps({"text": "last", "id": "its-own-name"}),
    ]
    content = "\n".join(rows).encode() + b'\n{"text": "bad \xff utf8"}\n\0\0\0\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    packed = gzip.compress(to_lines(TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "c.jsonl.gz").write_bytes(packed + b"what follows is no member")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    (tmp_path / "e.py").write_bytes(b"\x7fELF\0\0\xff")
    (tmp_path / "f.md").write_bytes(b"")
    (tmp_path / "g.jsonl.zst").write_bytes(b"this is no zstd frame")
    (tmp_path / "h.parquet").write_bytes(b"PAR1 this is none PAR1")
    (tmp_path / "i.txt").write_text("the end")
    (tmp_path / "j.png").write_bytes(b"x")
    source = LocalSource([tmp_path], max_document_bytes=4000)
    found = drain(source)
    own = [d for d in found if d.id.split("#")[0].endswith("a.jsonl") or "#" not in d.id]
    assert [(d.text, d.id.split("/")[-1]) for d in own] == [
        ("good words", "a.jsonl#0"),
        ("last", "its-own-name"),
    ]
    assert found[-1].text == "the end"
    halves = [d.text for d in found if "b.jsonl.gz" in d.id]
    assert halves == TEXTS[: len(halves)] and len(halves) > 50
    assert source.rejected == {
        "bad_json": 6, "missing_field": 1, "wrong_type": 1, "empty": 2, "binary": 2,
        "too_long": 2, "truncated_gzip": 1, "bad_gzip": 1, "bad_utf8": 1, "bad_zstd": 1,
        "bad_parquet": 1, "unknown_suffix": 1,
    }  # fmt: skip


def test_counts_survive_a_resume(tmp_path):
    rows = [b'{"text": "good"}' if n % 3 else b"{bad" for n in range(90)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    whole = LocalSource([tmp_path])
    drain(whole)
    half = LocalSource([tmp_path])
    drain(half, 31)
    resumed = LocalSource([tmp_path])
    resumed.load_state_dict(half.state_dict())
    drain(resumed)
    assert resumed.rejected == whole.rejected == {"bad_json": 30}


def test_files_that_change_while_they_are_read(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.parquet", "e.txt"):
        (tmp_path / name).write_bytes(to_lines(TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "d.parquet")
    source = LocalSource([tmp_path])
    (tmp_path / "a.jsonl").unlink()
    with (tmp_path / "b.jsonl").open("ab") as file:  # what is appended is not read
        file.write(to_lines(["appended"]))
    (tmp_path / "c.jsonl").write_bytes(to_lines(TEXTS[:10]))
    pq.write_table(pa.table({"text": TEXTS[:10]}), tmp_path / "d.parquet")
    found = drain(source)
    counts = Counter(Path(document.id.split("#")[0]).name for document in found)
    assert counts == {"b.jsonl": 300, "c.jsonl": 10, "e.txt": 1}
    assert source.rejected == {"vanished": 1, "shrunk": 1, "changed": 1}


@pytest.mark.skipif(os.name == "nt", reason="symbolic links and pipes of POSIX")
def test_links_and_special_files_end(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "x.txt").write_text("words")
    (inner / "loop").symlink_to(tmp_path)
    (inner / "self.txt").symlink_to(inner / "self.txt")
    (inner / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    os.mkfifo(inner / "pipe.txt")
    (tmp_path / ".hidden.txt").write_text("not read")
    source = LocalSource([tmp_path])
    assert [document.text for document in drain(source)] == ["words"]
    assert source.rejected == {"symlink_loop": 1, "vanished": 2, "not_a_file": 1}


@pytest.mark.skipif(os.name == "nt", reason="names that are no text exist on POSIX only")
def test_a_name_that_is_no_utf8_can_be_hashed(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("words")
    except OSError:
        pytest.skip("this file system refuses such names")
    (document,) = drain(LocalSource([tmp_path]))
    assert document.id.encode() and "caf\\xe9.txt" in document.id


def test_a_failing_machine_is_no_damaged_file(formats, monkeypatch):
    clean = drain(LocalSource([formats]))
    source = LocalSource([formats])
    failures = random.Random(4)
    original = ByteStream.read_chunk

    def failing(stream):
        if failures.random() < 0.05:
            raise OSError(5, "Input/output error")
        return original(stream)

    monkeypatch.setattr(ByteStream, "read_chunk", failing)
    found, errors = [], 0
    while len(found) < len(clean):
        try:
            found.append(source.next_document())
        except SourceError as error:
            assert error.transient and error.reason == "io_error"
            errors += 1
    assert found == clean and errors > 3 and not source.rejected


def one_line(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_one_clear_line_each(tmp_path):
    (tmp_path / "corpus").mkdir()
    assert "holds no file" in one_line(lambda: LocalSource([tmp_path / "corpus"]))
    line = one_line(lambda: LocalSource([tmp_path / "corpsu"]))
    assert "--local-path" in line and "is corpus meant?" in line
    (tmp_path / "corpus" / "x.xyz").write_text("?")
    assert "1 x .xyz" in one_line(lambda: LocalSource([tmp_path / "corpus"]))
    assert ".xyz is not one" in one_line(lambda: LocalSource([tmp_path / "corpus" / "x.xyz"]))
    assert "no path" in one_line(lambda: LocalSource([]))
    assert "unknown kind" in one_line(lambda: LocalSource([tmp_path], kinds=["movie"]))
    (tmp_path / "corpus" / "x.jsonl").write_text('{"body": "a", "title": "b"}\n' * 3)
    line = one_line(lambda: LocalSource([tmp_path / "corpus"]))
    assert "'text'" in line and "body, title" in line
    pq.write_table(pa.table({"body": ["a"], "text": [1]}), tmp_path / "t.parquet")
    assert "body, text" in one_line(lambda: LocalSource([tmp_path / "t.parquet"]))
    named = LocalSource([tmp_path / "t.parquet"], text_field="body")
    assert drain(named)[0].text == "a"


def test_a_position_counts_the_bytes_before_it(tmp_path, monkeypatch):
    """Negative control: with positions that forget their place, the resume test above fails."""
    (tmp_path / "a.jsonl").write_bytes(to_lines(TEXTS))
    monkeypatch.setattr(file_readers.JsonReader, "position", property(lambda self: {}))
    source = LocalSource([tmp_path])
    drain(source, 10)
    resumed = LocalSource([tmp_path])
    resumed.load_state_dict(source.state_dict())
    assert resumed.next_document().text != TEXTS[10]
