"""A frozen program finds its own tools, and one that is not frozen keeps the machine's."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.runtime import frozen

PROJECT = Path(__file__).parents[3]
VARIABLES = ("CC", "CUDA_PATH", "TORCHINDUCTOR_COMPILE_THREADS")


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle with TinyCC and the CUDA tools in it; the machine has a compiler of its own."""
    (tmp_path / "triton/runtime/tcc").mkdir(parents=True)
    (tmp_path / "triton/runtime/tcc/tcc.exe").touch()
    (tmp_path / "triton/backends/nvidia/bin").mkdir(parents=True)
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setenv("CUDA_PATH", "toolkit")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    return tmp_path


def freeze(monkeypatch, bundle: Path) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", str(bundle), raising=False)


def variables() -> list[str | None]:
    return [os.environ.get(name) for name in VARIABLES]


def test_a_frozen_program_takes_the_bundled_tools(bundle, monkeypatch):
    freeze(monkeypatch, bundle)
    frozen.prepare_frozen()
    compiler, cuda, threads = variables()
    assert Path(compiler or "").is_relative_to(bundle) and Path(compiler or "").is_file()
    assert Path(cuda or "", "bin").is_dir()
    assert threads == "1"


def test_what_the_bundle_lacks_stays_as_the_machine_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setenv("CUDA_PATH", "toolkit")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "4")
    freeze(monkeypatch, tmp_path)
    frozen.prepare_frozen()
    assert variables() == ["gcc", "toolkit", "1"]


def test_a_program_that_is_not_frozen_keeps_its_environment(bundle, monkeypatch):
    monkeypatch.setattr(sys, "_MEIPASS", str(bundle), raising=False)
    before = dict(os.environ)
    frozen.prepare_frozen()
    assert dict(os.environ) == before
    assert frozen.bundle_directory() is None


def test_a_character_outside_the_code_page_does_not_raise(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    with pytest.raises(UnicodeEncodeError):
        print("Σ", flush=True)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    frozen.prepare_frozen()
    print("Σ \udc80")
    assert raw.getvalue().replace(b"\r", b"") == "Σ ?\n".encode()


def test_a_stream_that_is_missing_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    frozen.use_utf8_output()


def test_it_runs_before_any_package_is_installed():
    code = "from training.runtime.frozen import prepare_frozen; prepare_frozen(); print('Σ')"
    run = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], cwd=PROJECT, capture_output=True, check=True
    )
    assert run.stdout.strip() == "Σ".encode()
