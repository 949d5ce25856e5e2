"""`--grpo-backend trl` in whole runs: its steps and evidence, exact resume, what refuses it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.runs import (
    WALL_CLOCK,
    differences,
    metrics_rows,
    stop_after,
    tiny_flags,
    train,
)
from tests.training.features.test_sigma_rl import RL, make_easy
from tests.training.rl.small_learner import OddBytes
from training.features import FEATURES

TRL = (
    *RL, "--grpo-backend", "trl", "--grpo-num-generations", "4", "--steps", "4",
    "--save-interval", "2", "--verifier-eval-every", "2",
    "--no-ttrl-asym-verify-enabled", "--no-sigma-rl-auto-mix-enabled",
)  # fmt: skip
WITHOUT_UNSLOTH = "--no-require-unsloth-trl-patch"


class OddBytesAndLines(OddBytes):
    """Passes whole lines too, as solutions are: the start-up check of the reward must hold."""

    def passes(self, text: str) -> bool:
        return text.endswith("\n") or super().passes(text)


@pytest.fixture(autouse=True)
def easy_verifier(monkeypatch):
    make_easy(monkeypatch)
    monkeypatch.setattr("training.build_rl.Verifier", OddBytesAndLines)


def trl_run(directory: Path, *more: str, features=FEATURES):
    train(tiny_flags(directory, *TRL, *more), features=features)
    return metrics_rows(directory)


def rows_of(directory: Path) -> list[dict]:
    left_out = (*WALL_CLOCK, "unsloth_preloaded_", "stop_after")
    return [
        {name: v for name, v in row.items() if not any(part in name for part in left_out)}
        for row in metrics_rows(directory)
        if row["step"] > 0
    ]


def test_a_run_takes_steps_and_resumes_to_the_bit(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    last = trl_run(whole, WITHOUT_UNSLOTH)[-1]
    assert 1 <= last["grpo_steps"] and last["grpo_steps"] + last["grpo_dropped_steps"] == 2
    assert -1.0 <= last["grpo_reward_mean"] <= 2.0 and last["grpo_entropy"] > 0.0
    assert last["feature_verifier_effective_calls"] == 2 * 2 * 4  # no other completion was judged
    assert last["feature_sigma_rl_effective_calls"] == last["grpo_steps"]
    assert not last["feature_verifier_cascade_enabled"] and "sigma_rl_ratio" not in last
    assert last["unsloth_trl_patch_active"] == last["unsloth_trl_patch_hits"] == 0.0
    trl_run(parted, WITHOUT_UNSLOTH, features=(*FEATURES, stop_after(3, parted)))
    trl_run(parted, WITHOUT_UNSLOTH)
    # Which libraries this process had loaded before it built a run is no part of the run.
    assert [name for name in differences(whole, parted) if not name.startswith("row ")] == []
    assert rows_of(whole) == rows_of(parted)


def test_without_trl_the_run_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    for name in ("trl", "unsloth"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError) as raised:
        trl_run(tmp_path / "run", WITHOUT_UNSLOTH)
    assert str(raised.value).startswith(
        "GRPO backend is set to 'trl' but TRL GRPO classes are unavailable."
    )
    assert not (tmp_path / "run").exists()


def test_a_required_patch_of_unsloth_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("transformers", "peft"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(RuntimeError, match="--require-unsloth-trl-patch and not active"):
        trl_run(tmp_path / "run")
