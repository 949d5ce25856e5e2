"""The grammar of args files: what people write is read as they mean it, and exactly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config.args_file import decode_value, encode_value, read_words
from training.config.fields import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def words_of(tmp_path: Path, content: str | bytes) -> list[tuple[str, str | None]]:
    path = tmp_path / "args.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(word.text, word.value) for word in read_words(path)]


@pytest.mark.parametrize(
    ("line", "flag", "value"),
    [
        ("--steps 500", "--steps", "500"),
        ("  --steps\t \t500  ", "--steps", "500"),
        ("--steps=500", "--steps", "500"),
        ("--steps 500 # short", "--steps", "500"),
        ("--require-cuda", "--require-cuda", None),
        ("--require-cuda   # always", "--require-cuda", None),
        (r"--output-dir runs\sigma_debug", "--output-dir", r"runs\sigma_debug"),
        (r"--output-dir C:\My Runs\new\test", "--output-dir", r"C:\My Runs\new\test"),
        (r'--output-dir "C:\My Runs\new"', "--output-dir", r"C:\My Runs\new"),
        ("--output-dir runs/c#5", "--output-dir", "runs/c#5"),
        ('--sample-prompt "# not a comment " # one', "--sample-prompt", "# not a comment "),
        ('--sample-prompt "a" # not "b"', "--sample-prompt", "a"),
        ("--sample-prompt it's 5 o'clock", "--sample-prompt", "it's 5 o'clock"),
        ('--sample-prompt ""', "--sample-prompt", ""),
        ("--sample-prompt=", "--sample-prompt", ""),
        ('--sample-prompt say "hi" twice', "--sample-prompt", 'say "hi" twice'),
        (r'--sample-prompt json:"a\nb" # two lines', "--sample-prompt", "a\nb"),
        ("--output-dir runs/größe", "--output-dir", "runs/größe"),
    ],
)
def test_a_line_is_a_flag_and_its_value(tmp_path, line, flag, value):
    assert words_of(tmp_path, line) == [(flag, value)]


def test_comments_and_blank_lines_say_nothing(tmp_path):
    assert words_of(tmp_path, "# a comment\n\n   \n\t# another --steps 5\n") == []


def test_a_value_may_stand_on_the_next_line(tmp_path):
    words = words_of(tmp_path, '--steps\n\n# which?\n500\n--prompt\n"--help"\n')
    assert words == [("--steps", None), ("500", None), ("--prompt", None), ("--help", None)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path, newline, mark):
    content = mark + newline.join(["--steps 5", "--lr 0.1", ""]).encode()
    assert words_of(tmp_path, content) == [("--steps", "5"), ("--lr", "0.1")]


def test_only_real_line_ends_end_a_line(tmp_path):
    separators = "a\x85b\u2028c\u2029d"
    assert words_of(tmp_path, f"--prompt {separators}") == [("--prompt", separators)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("--steps 5\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
        ("--steps 5\n".encode("utf-16-be").join([b"\xfe\xff", b""]), "UTF-16"),
        (b"--steps 5\n--prompt \xff\xfe\n", "byte 0xff in line 2"),
        (b"--steps 5\n\n\x00\x01PK", "byte 0x00 in line 3"),
        (b"#" * (2**20 + 1), "larger than 1 MiB"),
        (b'--prompt json:"abc', "JSON string"),
        (b'--prompt json:"abc" def', "text after the JSON string"),
    ],
)
def test_a_file_that_is_no_args_file_is_one_line(tmp_path, content, says):
    with pytest.raises(ConfigError) as failure:
        words_of(tmp_path, content)
    assert says in str(failure.value)
    assert "args.txt" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    for path in (tmp_path / "nope.txt", tmp_path):
        with pytest.raises(ConfigError, match=path.name):
            list(read_words(path))


@given(TEXT)
def test_every_value_survives_being_written(value):
    text = encode_value(value)
    assert "\n" not in text and "\r" not in text
    assert decode_value(text) == value


def test_plain_values_are_written_plainly():
    for value in ("runs/sigma", r"C:\a b\c", "0.15,0.40", "x#y", 'the "x"'):
        assert encode_value(value) == value
    assert encode_value("The ") == '"The "'
    assert encode_value("two\nlines") == r'json:"two\nlines"'


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        ("quikstart.txt", "; did you mean {folder}quickstart.txt?"),
        ("quickstart", "; did you mean {folder}quickstart.txt?"),
        ("aktivation.txt", "; did you mean {folder}profiles/activation.txt?"),
        ("zz", "; check the path"),
        ("profile", "; check the path"),
        ("no/zz.txt", ", nor a folder {folder}no; check the path"),
    ],
)
def test_a_missing_file_is_told_with_the_one_that_is_meant(tmp_path, given, mend):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "activation.txt").touch()
    (tmp_path / "quickstart.txt").touch()
    with pytest.raises(ConfigError) as told:
        list(read_words(tmp_path / given))
    mend = mend.replace("{folder}", f"{tmp_path}/").replace("/", os.sep)
    assert str(told.value) == f"there is no file {tmp_path / given}{mend}"
