"""A start that cannot be is refused in one line with exit code 2, and leaves nothing behind."""

from pathlib import Path

import pytest

import train_sigma
from tests.training.small_run import small_flags


def listing(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.fixture
def trained(tmp_path):
    """The flags of a run of one step, with its checkpoint."""
    flags = small_flags(tmp_path / "run", "--steps", "1")
    assert train_sigma.main(flags) == 0
    return flags


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seq-len", "8"], "--seq-len was 16, is now 8."),
        (["--d-model", "32"], "--d-model was 16, is now 32."),
    ],
)
def test_other_settings_than_the_checkpoints_are_named(trained, tmp_path, capsys, more, says):
    before = listing(tmp_path)
    capsys.readouterr()
    assert train_sigma.main([*trained, *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and says in said
    assert "another --checkpoint-dir, or --no-resume" in said
    assert listing(tmp_path) == before
    assert train_sigma.main([*trained, *more, "--no-resume"]) == 0
