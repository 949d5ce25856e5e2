"""The compressors' figure against the container that the xz program itself reads."""

from __future__ import annotations

import json
import lzma
import random
import shutil
import subprocess

import pytest

from scripts.baseline_compressors import COMPRESSORS, compressed_bits_per_byte, main

TEXT = b"In the beginning God created the heaven and the earth. " * 40


@pytest.mark.skipif(shutil.which("xz") is None, reason="the xz program is not installed")
def test_xz_equals_the_program_at_9_extreme():
    program = subprocess.run(["xz", "-9e", "-c"], input=TEXT, capture_output=True, check=True)
    ours = compressed_bits_per_byte(TEXT, compressor="xz -9e") * len(TEXT) / 8
    # Same stream; liblzma versions may differ in a few bytes.
    assert ours == pytest.approx(len(program.stdout), abs=16)


def test_random_bytes_do_not_shrink_and_repeated_text_does():
    noise = random.Random(1).randbytes(20_000)
    for name in COMPRESSORS:
        assert compressed_bits_per_byte(noise, compressor=name) > 7.99
        assert compressed_bits_per_byte(TEXT, compressor=name) < 1.0


def test_xz_form_decompresses_to_the_text():
    assert lzma.decompress(COMPRESSORS["xz -9e"](TEXT)) == TEXT


def test_command_prints_and_appends_one_row_per_compressor(tmp_path, capsys):
    source, output = tmp_path / "text", tmp_path / "rows.jsonl"
    source.write_bytes(TEXT)
    assert main(["--file", str(source), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["baseline"] for row in rows] == list(COMPRESSORS)
    assert all(row["num_bytes"] == len(TEXT) for row in rows)
    assert output.read_text() == capsys.readouterr().out


def test_empty_and_missing_files_are_refused(tmp_path, capsys):
    (tmp_path / "empty").touch()
    assert main(["--file", str(tmp_path / "empty")]) == 2
    assert "empty" in capsys.readouterr().err
    assert main(["--file", str(tmp_path / "none")]) == 2
