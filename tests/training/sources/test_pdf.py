"""PDF folders: chunks, exact positions, damage counted, and a child that may die."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.training.sources.material import drain, make_pdf, make_texts
from training.sources.base import SourceError
from training.sources.pdf import PdfSource
from training.sources.pdf_text import clean_page, cut_place
from training.sources.pdf_worker import PdfWorker, serve_pdf

SENTENCES = [
    f"{text.encode('ascii', 'ignore').decode()} ends."
    for text in make_texts(3000, seed=5, longest=14)
]


def make_book(num_pages: int, *, first: int = 0) -> bytes:
    lines = SENTENCES[first : first + 40 * num_pages]
    return make_pdf([lines[at : at + 40] for at in range(0, len(lines), 40)])


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(make_book(12))
    (folder / "b.pdf").write_bytes(b"%PDF-1.4 this is no document")
    (folder / "c.pdf").write_bytes(make_book(4, first=1000))
    (folder / "d.pdf").write_bytes(make_pdf([[], SENTENCES[:30], []]))
    return folder


@pytest.fixture
def opened():
    """Sources that are closed when the test ends, whatever happens."""
    sources = []

    def open_source(*args, **options):
        sources.append(PdfSource(*args, **options))
        return sources[-1]

    yield open_source
    for source in sources:
        source.close()


def words(text: str) -> list[str]:
    return text.split()


def test_chunks_hold_all_the_text_in_order(shelf, opened):
    source = opened([shelf])
    found = drain(source)
    book = [d.text for d in found if d.id.startswith("shelf/a.pdf#")]
    assert words("".join(book)) == words(" ".join(SENTENCES[:480]))
    assert all(3000 <= len(text) <= 5001 and text.endswith("ends.\n") for text in book[:-1])
    assert source.rejected == {"bad_pdf": 1, "no_text": 2}
    assert len({d.id for d in found}) == len(found) and found[0].source == "pdf"


def test_a_position_is_exact_after_any_chunk(shelf, opened):
    source = opened([shelf], chunk_chars=(500, 900))
    states, found = [json.dumps(source.state_dict())], []
    for document in drain(opened([shelf], chunk_chars=(500, 900))):
        assert source.next_document() == document
        found.append(document)
        states.append(json.dumps(source.state_dict()))
    resumed = opened([shelf], chunk_chars=(500, 900))
    for place in random.Random(0).sample(range(len(found)), 12):
        resumed.load_state_dict(json.loads(states[place]))
        assert drain(resumed, 4) == found[place : place + 4]
    drain(source)
    resumed.load_state_dict(json.loads(states[3]))
    drain(resumed)
    assert resumed.rejected == source.rejected
    (shelf / "z.pdf").write_bytes(make_book(1))
    with pytest.raises(ValueError, match="other files"):
        opened([shelf], chunk_chars=(500, 900)).load_state_dict(json.loads(states[3]))


def test_resuming_costs_the_same_however_far_in(tmp_path, opened, monkeypatch):
    """Pages that are read before the next chunk is there: a few, wherever the position is."""
    (tmp_path / "long.pdf").write_bytes(make_book(60))
    source, read = opened([tmp_path], chunk_chars=(500, 900)), []
    states = [source.state_dict() for _ in iter(lambda: len(drain(source, 1)), 0)]
    original = PdfSource._read_page
    monkeypatch.setattr(
        PdfSource,
        "_read_page",
        lambda self, number, file: read.append(number) or original(self, number, file),
    )
    resumed = opened([tmp_path], chunk_chars=(500, 900))
    for place in (0, 10, len(states) // 2, len(states) - 3):
        resumed.load_state_dict(states[place])
        read.clear()
        resumed.next_document()
        assert 1 <= len(read) <= 3 < 60


def test_encrypted_vanished_and_changed_files_are_counted(shelf, opened):
    locked = make_book(1).replace(
        b"/Root 1 0 R",
        b"/Root 1 0 R /ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -44"
        b" /O <" + b"41" * 32 + b"> /U <" + b"42" * 32 + b"> >>",
    )
    (shelf / "e.pdf").write_bytes(locked)
    source = opened([shelf])
    (shelf / "a.pdf").unlink()
    (shelf / "c.pdf").write_bytes(make_book(1))
    drain(source)
    assert source.rejected == {
        "vanished": 1, "bad_pdf": 1, "changed": 1, "no_text": 2, "encrypted_pdf": 1,
    }  # fmt: skip


def serve_badly(connection, memory_bytes):
    """A child that dies, hangs or swallows memory on certain pages, and serves the others."""
    connection.send_bytes(json.dumps({"library": "fault injection"}).encode())
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if "open" in question:
            if "bomb" in question["open"]:
                os.abort()
            answer = {"pages": 30 if "cursed" in question["open"] else 9}
        else:
            number = question["page"]
            if number == 3 or number > 20:
                os._exit(3)
            if number == 5:
                time.sleep(3600)
            answer = {"text": f"Page {number} says something long enough. " * 30}
        connection.send_bytes(json.dumps(answer).encode())


def test_a_child_that_dies_or_hangs_costs_a_page(tmp_path, opened):
    for name in ("a.pdf", "b-bomb.pdf", "c-cursed.pdf"):
        (tmp_path / name).write_bytes(b"read by the double")

    def source():
        worker = PdfWorker(timeout_s=2, serve=serve_badly)
        return opened([tmp_path], chunk_chars=(1000, 1500), worker=worker)

    whole = source()
    found, states = [], []
    for _ in range(40):
        part = drain(whole, 1)
        if not part:
            break
        found += part
        states.append(json.dumps(whole.state_dict()))
    text = "".join(d.text for d in found if "/a.pdf" in d.id)
    assert [n for n in range(9) if f"Page {n} " in text] == [0, 1, 2, 4, 6, 7, 8]
    # The cursed file loses its rest at the third lost child: pages 3, 5 and 21.
    text = "".join(d.text for d in found if "/c-cursed.pdf" in d.id)
    assert "Page 19 " in text and "Page 22 " not in text
    assert whole.rejected == {"pdf_crash": 4, "pdf_timeout": 2}
    resumed = source()
    resumed.load_state_dict(json.loads(states[4]))
    assert drain(resumed) == found[5:] and resumed.rejected == whole.rejected


def refuse_to_start(connection, memory_bytes):
    os._exit(1)


def lack_the_library(connection, memory_bytes):
    connection.send_bytes(json.dumps({"reason": "no_library"}).encode())


def test_a_child_that_cannot_start_is_said_before_training(shelf):
    with pytest.raises(ValueError, match=r"--pdf-path.*did not start"):
        PdfSource([shelf], worker=PdfWorker(timeout_s=5, serve=refuse_to_start))
    with pytest.raises(ValueError, match="pip install pypdfium2"):
        PdfSource([shelf], worker=PdfWorker(timeout_s=5, serve=lack_the_library))


def test_a_child_that_cannot_be_replaced_is_trouble_of_the_machine(shelf):
    worker = PdfWorker(timeout_s=20)
    source = PdfSource([shelf], worker=worker)
    worker.close()
    worker._serve = refuse_to_start
    with pytest.raises(SourceError) as caught:
        source.next_document()
    assert caught.value.transient and not source.rejected
    worker._serve = serve_pdf
    assert source.next_document().id == "shelf/a.pdf#0"
    source.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_in_the_terminal_costs_no_page(shelf, opened, capfd):
    """It reaches every process there, and the run finishes its step."""
    worker = PdfWorker(timeout_s=20)
    source = opened([shelf], worker=worker)
    worker.ask({"open": str(shelf / "a.pdf")})
    os.kill(worker._process.pid, signal.SIGINT)
    assert source.next_document().id == "shelf/a.pdf#0"
    assert not source.rejected and worker.num_started == 1
    assert "KeyboardInterrupt" not in capfd.readouterr().err


def test_mistakes_are_one_clear_line_each(tmp_path):
    with pytest.raises(ValueError, match=r"--pdf-path .*holds no file"):
        PdfSource([tmp_path])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"suffix \.txt is not one"):
        PdfSource([tmp_path / "a.txt"])


def test_cleaning_mends_what_the_page_alone_shows():
    page = (
        "12 ON THE NATURE OF THINGS\r\nA \ufb01rst line that goes over the full width of the page "
        "and combina\ufffetions\r\nof words go on here in lower case until the sentence ends.\r\n"
        "Heading\r\n"
        "Contents . . . . . . . . . 7\r\n13"
    )
    text, reason = clean_page(page)
    assert reason is None
    assert text == (
        "A first line that goes over the full width of the page and combinations of words go on"
        " here in lower case until the sentence ends.\nHeading\nContents ... 7"
    )
    assert clean_page(" \r\n ") == ("", "no_text")
    assert clean_page("\ue000\ue001\ue002 abc") == ("", "unmapped_text")


def test_cuts_prefer_the_end_of_a_sentence():
    assert cut_place("short", least=10, most=20) == 5
    text = "One sentence. " * 100
    place = cut_place(text, least=300, most=500)
    assert 300 <= place <= 500 and text[:place].endswith(". ")
    assert cut_place("x" * 1000, least=300, most=500) == 500
    assert cut_place("word " * 200, least=300, most=500) == 500


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A damaged copy: bytes changed, a piece cut out, doubled or moved, the end missing."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        place, size = rng.randrange(len(data)), rng.randrange(1, 400)
        kind = rng.randrange(5)
        if kind == 0:
            data[place : place + 3] = rng.randbytes(3)
        elif kind == 1:
            del data[place : place + size]
        elif kind == 2:
            data[place:place] = data[place : place + size]
        elif kind == 3:
            data[place:] = b"" if place > 50 else data[place:]
        else:
            numbers = [at for at in range(len(data)) if 0x30 <= data[at] <= 0x39]
            if numbers:
                data[rng.choice(numbers)] = rng.choice(b"0123456789-")
        if not data:
            data = bytearray(b"%PDF")
    return bytes(data)


def faults_of_mutated(folder: Path, open_source, *, count: int, seed: int) -> list[str]:
    """Among `count` mutated files one in a hundred is good: what is wrong with how they came out.

    A crash or a hang of the reading program would not return.
    """
    rng = random.Random(seed)
    originals = [make_book(pages, first=100 * pages) for pages in (1, 2, 5)]
    originals.append(make_pdf([SENTENCES[:40]] * 3, pack=False))
    good = make_book(2)
    (folder / "0000-good.pdf").write_bytes(good)
    alone = [document.text for document in drain(open_source([folder]))]
    for number in range(count):
        (folder / f"{number:04}.pdf").write_bytes(mutate(rng.choice(originals), rng))
        if number % 100 == 0:
            (folder / f"{number:04}-good.pdf").write_bytes(good)
    texts: dict[str, list[str]] = {}
    for document in drain(open_source([folder])):
        if "-good" in document.id:
            texts.setdefault(document.id.partition("#")[0], []).append(document.text)
    wanted = -(-count // 100)
    found = [f"{name} came out otherwise" for name, parts in texts.items() if parts != alone]
    return found + ([] if len(texts) == wanted else [f"{len(texts)} of {wanted} good files"])


def test_mutated_files_neither_crash_nor_hang(tmp_path, opened):
    assert faults_of_mutated(tmp_path, opened, count=40, seed=1) == []


@pytest.mark.soak
def test_two_thousand_mutated_files_neither_crash_nor_hang(tmp_path, opened):
    """R17."""
    assert faults_of_mutated(tmp_path, opened, count=2000, seed=0) == []
