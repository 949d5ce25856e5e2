"""Tamper drills, the usage rules and the start-up checks."""

import json
import shutil
from types import SimpleNamespace

import pytest

from tests.integration.runs import tiny_flags
from training.config.cli import parse_args
from training.integrity_guards import (
    MANIFEST_NAME,
    IntegrityGuards,
    SourceGuard,
    TamperedSource,
    check_steps,
    fingerprint_files,
)
from training.runtime.environment import PROJECT_ROOT, config_hash
from training.runtime.needed_modules import PROGRAM
from training.runtime.startup_audit import check_symbols, loaded_modules

FILES = {
    "train_sigma.py": "x = 1\n",
    "model/a.py": "a = 1\n",
    "training/deep/b.py": "b = 1\n",
    "assets/corpus.bin": "text",
    "training/hidden_eval_manifest.json": "{}",
}


@pytest.fixture
def program(tmp_path):
    """A small program of its own, free to be tampered with."""
    root = tmp_path / "program"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def guard(tmp_path, program, *flags) -> SourceGuard:
    config = parse_args(tiny_flags(tmp_path / "run", *flags))
    (tmp_path / "run").mkdir(exist_ok=True)
    return SourceGuard(config, seeds={"run": config.run.seed}, root=program)


def record(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / MANIFEST_NAME).read_text(encoding="utf-8"))


def test_the_manifest_holds_what_the_run_stands_on(tmp_path, program):
    guard(tmp_path, program, "--seed", "77").write(step=0)
    found = record(tmp_path)
    assert set(found["files"]) == set(FILES)
    assert found["files"] == fingerprint_files(program)
    assert found["seeds"] == {"run": 77}
    assert found["config"]["run"]["seed"] == 77
    config = parse_args(tiny_flags(tmp_path / "run", "--seed", "77"))
    assert found["config_hash"] == config_hash(config)
    assert {"python", "torch"} <= set(found["versions"])
    assert found["verification"]["source_match"] is True


def test_the_real_program_is_tracked_as_a_whole():
    files = fingerprint_files()
    for folder in ("model", "training"):
        paths = {p.relative_to(PROJECT_ROOT).as_posix() for p in (PROJECT_ROOT / folder).rglob("*")}
        assert {path for path in paths if path.endswith(".py")} <= set(files)
    assert {"train_sigma.py", "assets/corpus.jsonl.xz", "training/hidden_eval_manifest.json"} <= (
        set(files)
    )
    assert not any("__pycache__" in path for path in files)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_fails_the_next_verification(tmp_path, program, name):
    sources = guard(tmp_path, program)
    sources.verify(8)
    expected = fingerprint_files(program)[name]
    content = bytearray((program / name).read_bytes())
    content[-1] ^= 1
    (program / name).write_bytes(content)
    with pytest.raises(TamperedSource) as failure:
        sources.verify(16)
    found = fingerprint_files(program)[name]
    assert all(part in str(failure.value) for part in (name, expected, found))
    assert "\n" not in str(failure.value)
    assert record(tmp_path)["verification"]["source_match"] is False
    assert record(tmp_path)["verification"]["step"] == 16


def test_a_new_and_a_missing_file_count_and_line_ends_do_not(tmp_path, program):
    sources = guard(tmp_path, program)
    (program / "model/a.py").write_bytes(b"a = 1\r\n")
    sources.verify(1)
    (program / "training/new.py").touch()
    with pytest.raises(TamperedSource, match=r"training/new.py .* none \(a new file\)"):
        sources.verify(2)
    (program / "training/new.py").unlink()
    (program / "model/a.py").unlink()
    with pytest.raises(TamperedSource, match=r"model/a.py .* no file"):
        sources.verify(3)


def test_without_the_strict_audit_a_change_is_recorded_only(tmp_path, program):
    sources = guard(tmp_path, program, "--no-strict-runtime-audit")
    sources.verify(1)
    assert sources.matches
    (program / "model/a.py").write_text("a = 2\n")
    sources.verify(2)
    assert not sources.matches
    assert "model/a.py" in record(tmp_path)["verification"]["changed"][0]


def test_a_resumed_run_is_held_to_the_files_it_began_with(tmp_path, program):
    guard(tmp_path, program).write(step=0)
    created = record(tmp_path)["created_utc"]
    same = guard(tmp_path, program)
    same.expect_beginning()
    same.write(step=0)
    assert same.matches and record(tmp_path)["created_utc"] == created
    (program / "model/a.py").write_text("a = 2\n")
    with pytest.raises(TamperedSource, match=r"model/a.py .* --no-resume"):
        guard(tmp_path, program).expect_beginning()
    accepted = guard(tmp_path, program, "--no-strict-runtime-audit")
    accepted.expect_beginning()
    accepted.write(step=0)
    accepted.verify(4)
    assert not accepted.matches
    assert record(tmp_path)["files"] != fingerprint_files(program)  # still the beginning's


def test_a_damaged_manifest_is_one_line_and_a_missing_one_begins_now(tmp_path, program):
    sources = guard(tmp_path, program)
    sources.expect_beginning()
    for content in ("", "{", "[]", '{"files": 3}', '{"files": {}}'):
        (tmp_path / "run" / MANIFEST_NAME).write_text(content)
        with pytest.raises(ValueError, match=r"cannot be read") as failure:
            sources.expect_beginning()
        assert "\n" not in str(failure.value)


def guards(tmp_path, *flags, sources=None):
    messages = []
    config = parse_args(tiny_flags(tmp_path / "run", *flags))
    return IntegrityGuards(config, sources=sources, hidden=None, message=messages.append), messages


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--proof-mode"], "proof mode: .*: ema, hydra_v21 "),
        (["--strict-feature-usage"], "strict feature usage: .*: ema, hydra_v21 "),
    ],
)
def test_an_idle_feature_is_an_error_where_it_is_asked_for(tmp_path, flags, says):
    judge, messages = guards(tmp_path, *flags)
    with pytest.raises(RuntimeError, match=says):
        judge.judge(["ema", "hydra_v21"])
    judge.judge([])
    assert messages == []


def test_an_idle_feature_is_a_finding_elsewhere(tmp_path):
    judge, messages = guards(tmp_path)
    judge.judge(["ema"])
    assert messages == ["finding: enabled features without a single effect: ema"]


def test_a_verification_that_cannot_be_written_does_not_end_the_run(tmp_path, program):
    sources = guard(tmp_path, program)
    judge, messages = guards(tmp_path, sources=sources)
    shutil.rmtree(tmp_path / "run")
    judge.verify(4)
    assert len(messages) == 1 and MANIFEST_NAME in messages[0]


def test_a_change_is_refused_where_it_cannot_be_written_down(tmp_path, program):
    sources = guard(tmp_path, program)
    judge, messages = guards(tmp_path, sources=sources)
    shutil.rmtree(tmp_path / "run")
    (program / "model/a.py").write_text("a = 2\n")
    with pytest.raises(TamperedSource, match=r"model/a\.py was changed"):
        judge.verify(4)
    assert not judge.metrics()["integrity_source_match"] and messages == []


def test_what_a_file_browser_leaves_is_no_change(tmp_path, program):
    sources = guard(tmp_path, program)
    for name in ("assets/.DS_Store", "assets/Thumbs.db", "model/._a.py"):
        (program / name).touch()
    sources.verify(1)
    (program / "assets/other.bin").touch()
    with pytest.raises(TamperedSource, match=r"assets/other\.bin"):
        sources.verify(2)


def test_columns_are_the_same_with_and_without_guards(tmp_path, program):
    without, _ = guards(tmp_path)
    sources = guard(tmp_path, program)
    with_guards, _ = guards(tmp_path, sources=sources)
    assert without.metrics().keys() == with_guards.metrics().keys()
    assert with_guards.metrics()["integrity_source_match"] == 1
    assert without.metrics()["integrity_guards_enabled"] == 0


def test_a_run_too_short_for_a_feature_names_it_the_steps_and_the_need():
    check_steps({"a": 1, "b": 20}, steps=20)
    check_steps({}, steps=1)
    with pytest.raises(RuntimeError) as failure:
        check_steps({"a": 1, "b": 21, "c": 400}, steps=20)
    text = str(failure.value)
    assert "--steps 20 is too small" in text and "b (needs 21), c (needs 400)" in text
    assert "--steps 400 or more" in text and "--no-strict-feature-usage" in text
    assert "a (" not in text and "\n" not in text


def test_every_symbol_is_there():
    check_symbols()


@pytest.mark.parametrize("needed", PROGRAM, ids=lambda needed: needed.module)
def test_a_missing_symbol_names_module_symbol_and_mend(needed):
    modules = {**loaded_modules(), needed.module: SimpleNamespace(__version__="0.1")}
    with pytest.raises(RuntimeError) as failure:
        check_symbols(modules)
    text = str(failure.value)
    assert f"{needed.module} 0.1 has no {needed.symbols[0].split('.')[0]}" in text
    assert "scripts/launch.py" in text and "\n" not in text
