"""The archive of a bug report has what is needed in it, and nothing that is secret or private."""

from __future__ import annotations

import io
import json
import random
import socket
import string
import zipfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest

import train_sigma
from tests.integration.runs import tiny_flags, train
from training.config.cli import parse_args
from training.modes import support
from training.runtime.crash_report import write_crash_report
from training.runtime.redact import Redactor

SECRETS = 200


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("support") / "run"
    train(tiny_flags(directory, "--steps", "2", "--save-interval", "1", "--eval-interval", "0"))
    return directory


def unpacked(directory: Path) -> dict[str, str]:
    config = parse_args(tiny_flags(directory, "--mode", "support"))
    archive = zipfile.ZipFile(io.BytesIO(support.pack(config)))
    assert archive.testzip() is None
    return {name: archive.read(name).decode("utf-8") for name in archive.namelist()}


def test_what_a_report_needs_is_in_it(run_dir: Path) -> None:
    write_crash_report(
        run_dir, step=2, error=ValueError("x"), last_metrics={}, feature_state={}, config_hash="h"
    )
    files = unpacked(run_dir)
    assert {"README.txt", "doctor.json", "checkpoints.json", "metrics.jsonl"} <= set(files)
    assert {"settings/config.json", "settings/resolved_args.txt"} <= set(files)
    assert [json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()] == [0, 1, 2]
    assert any(name.startswith("errors/crash_step_00000002") for name in files)
    names = [entry["name"] for entry in json.loads(files["checkpoints.json"])]
    assert names == ["checkpoint_step_00000001", "checkpoint_step_00000002"]
    assert not any("safetensors" in name or "samples" in name for name in files)


def test_no_planted_secret_leaves_the_machine(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    planted = ["hf_" + "".join(draw.choices(string.ascii_letters, k=34)) for _ in range(SECRETS)]
    monkeypatch.setenv("MY_API_KEY", planted[0])
    targets = ["config.json", "metrics.jsonl", "status_latest.json", "resolved_args.txt"]
    originals = {name: (run_dir / name).read_bytes() for name in targets}
    (run_dir / "errors").mkdir(exist_ok=True)
    for index, secret in enumerate(planted):
        text = draw.choice(["--hf-token {}", '{{"HF_TOKEN": "{}"}}', "x {} y", "https://u:{}@h/"])
        if index % 5 == 4:
            path = run_dir / "errors" / f"hang_{index}.txt"
        else:
            path = run_dir / targets[index % 5]
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{text.format(secret)}\n")
    found = "\n".join(unpacked(run_dir).values())
    for name, data in originals.items():
        (run_dir / name).write_bytes(data)
    for path in (run_dir / "errors").glob("hang_*"):
        path.unlink()
    assert not [secret for secret in planted if secret in found]
    assert found.count("[redacted]") >= SECRETS // 2


def test_home_and_host_are_not_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = run_dir.parent / "home" / "someone"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(socket, "gethostname", lambda: "the-machine-of-someone")
    line = f"{home}/data on the-machine-of-someone\n"
    (run_dir / "errors").mkdir(exist_ok=True)
    (run_dir / "errors" / "hang_x.txt").write_text(line, encoding="utf-8")
    text = unpacked(run_dir)["errors/hang_x.txt"]
    (run_dir / "errors" / "hang_x.txt").unlink()
    assert text == "[home]/data on [host]\n"


@pytest.mark.parametrize("escaped", range(4))
def test_a_windows_home_is_found_in_every_spelling(
    monkeypatch: pytest.MonkeyPatch, escaped: int
) -> None:
    """An OSError quotes the path it is about; reports are JSON, and so are rows that quote them."""
    home = PureWindowsPath("C:\\Homes\\Zoë O'Neil")
    monkeypatch.setattr(Path, "home", staticmethod(lambda: home))
    told = [
        str(PermissionError(13, "denied", str(home / "runs\\x.json"))),
        f"{home.as_posix()}/runs, {home}\\runs, c:\\HOMES\\zoë o'neil\\runs",
        ascii(str(home / "runs")),
    ]
    text = "\n".join(told)
    for _ in range(escaped):
        text = json.dumps(text)
    clean = support.TextCleaner(Redactor(values=())).clean(text)
    assert clean.count(support.HOME_MARK) == 5
    assert not [part for part in ("homes", "zo", "neil") if part in clean.lower()]


def test_a_secret_that_holds_the_name_of_the_machine_is_a_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "the-machine")
    cleaner = support.TextCleaner(Redactor(values=("pass-of-the-machine-77",)))
    assert cleaner.clean("x pass-of-the-machine-77 y") == "x [redacted] y"


def test_the_mode_writes_one_archive_and_says_where(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in run_dir.iterdir()}
    assert train_sigma.main([*tiny_flags(run_dir), "--mode", "support", "--json"]) == 0
    path = Path(json.loads(capsys.readouterr().out)["support"])
    new = {entry.name for entry in run_dir.iterdir()} - before
    assert new == {path.name} and zipfile.is_zipfile(path)
    path.unlink()


def test_a_directory_without_a_run_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_sigma.main([*tiny_flags(tmp_path / "no"), "--mode", "support"]) == 2
    assert "--output-dir" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_read_costs_the_archive_nothing_else(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on deletes old checkpoints meanwhile, and a broken disk is reported, too."""
    gone, listed = "checkpoint_step_00000001", Path.iterdir
    broken = run_dir / "errors" / "hang_broken.txt"
    broken.parent.mkdir(exist_ok=True)
    broken.symlink_to(run_dir / "nowhere")

    def list_if_there(path: Path) -> Iterator[Path]:
        if path.name == gone:
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", list_if_there)
    files = unpacked(run_dir)
    broken.unlink()
    sizes = {entry["name"]: entry["num_bytes"] for entry in json.loads(files["checkpoints.json"])}
    assert sizes[gone] is None and sizes["checkpoint_step_00000002"] > 0
    assert "could not be read" in files["errors/hang_broken.txt"] and "metrics.jsonl" in files


def test_a_long_text_is_cut_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step":{n}}}\n' for n in range(300_000)), encoding="utf-8")
    lines = support.read_tail(path).splitlines()
    assert json.loads(lines[0])["step"] + len(lines) == 300_000
    assert support.read_tail(tmp_path / "none").startswith("none could not be read")
