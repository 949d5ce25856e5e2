"""Token files are read whole and exact, or not at all."""

import numpy as np
import pytest

from training.stream.token_cache import read_token_file, write_token_file

ARRAYS = {
    "tokens": np.arange(5000, dtype=np.uint16),
    "starts": np.array([0, 10, 5000], dtype=np.int64),
    "source_ids": np.array([5, 8], dtype=np.int16),
}


def test_round_trip_keeps_values_and_types(tmp_path):
    path = tmp_path / "deep" / "a.tokens"
    write_token_file(path, ARRAYS)
    loaded = read_token_file(path)
    assert loaded is not None and loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.tokens"]


def test_absent_file_is_none_without_a_word(tmp_path, caplog):
    assert read_token_file(tmp_path / "absent.tokens") is None
    assert not caplog.records


def test_every_damaged_byte_and_every_truncation_is_noticed(tmp_path, caplog):
    path = tmp_path / "a.tokens"
    write_token_file(path, {"tokens": np.arange(20, dtype=np.uint16)})
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.choice(len(whole), size=150, replace=False):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        assert read_token_file(path) is None
    for length in (0, 5, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read_token_file(path) is None
    path.write_bytes(whole + b"x")
    assert read_token_file(path) is None
    assert len(caplog.records) == 156


def test_a_refusing_disk_is_logged_and_leaves_nothing(tmp_path, caplog):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    write_token_file(blocker / "a.tokens", ARRAYS)
    assert "could not be written" in caplog.text
    assert blocker.read_text() == "in the way"


def test_an_unreadable_path_is_logged(tmp_path, caplog):
    directory = tmp_path / "a.tokens"
    directory.mkdir()
    assert read_token_file(directory) is None
    assert "could not be read" in caplog.text


@pytest.mark.parametrize("leftover", [b"", b"half"])
def test_an_earlier_file_is_replaced(tmp_path, leftover):
    path = tmp_path / "a.tokens"
    path.write_bytes(leftover)
    write_token_file(path, ARRAYS)
    loaded = read_token_file(path)
    assert loaded is not None
    np.testing.assert_array_equal(loaded["tokens"], ARRAYS["tokens"])
