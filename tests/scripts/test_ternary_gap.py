"""The gap of ternary weights: paired by seed, its interval, and one real pair of tiny runs."""

import json

import pytest

from scripts.ternary_gap import compare, main

TINY = (
    "--d-model=16", "--n-heads=2", "--n-layers=1", "--kv-latent-dim=8", "--rope-dim=4",
    "--mamba-head-dim=8", "--mamba-d-state=4", "--mamba-chunk-len=8", "--d-ff=24", "--seq-len=16",
    "--batch-size=2", "--no-engram-enabled", "--eval-tokens=64", "--log-interval=1",
    "--no-strict-feature-usage", "--no-diff-attention-enabled", "--device=cpu",
)  # fmt: skip


def test_the_gap_is_the_mean_of_paired_differences():
    """Of 0.01, 0.02, 0.06: mean 0.03, deviation 0.02646, half width 4.303 times it / sqrt 3."""
    values = {("bitnet_1_58", 1): 1.51, ("none", 1): 1.50, ("bitnet_1_58", 2): 1.72,
              ("none", 2): 1.70, ("bitnet_1_58", 3): 1.66, ("none", 3): 1.60}  # fmt: skip
    found = compare([1, 2, 3], lambda mode, seed: values[mode, seed])
    assert found["gap_bpb"]["each"] == [0.01, 0.02, 0.06]
    assert found["gap_bpb"]["mean"] == 0.03
    low, high = found["gap_bpb"]["interval_95_t"]
    assert low == pytest.approx(0.03 - 0.06573, abs=1e-4)
    assert high == pytest.approx(0.03 + 0.06573, abs=1e-4)
    assert found["ternary"] == [1.51, 1.72, 1.66]


def test_one_seed_has_no_interval(tmp_path, capsys):
    assert main(["--folder", str(tmp_path), "--seeds", "1"]) == 2
    assert "--seeds" in capsys.readouterr().err


@pytest.mark.soak
def test_real_runs_differ_by_mode_and_are_resumed(tmp_path, capsys):
    output = tmp_path / "gap.json"
    arguments = ["--folder", str(tmp_path / "runs"), "--json", str(output), "--seeds", "1,2"]
    arguments += ["--steps", "3", "--", *TINY]
    assert main(arguments) == 0
    first = json.loads(output.read_text(encoding="utf-8"))
    assert all(a != b for a, b in zip(first["ternary"], first["full_precision"], strict=True))
    assert main(arguments) == 0  # finished runs are measured again
    assert json.loads(output.read_text(encoding="utf-8"))["gap_bpb"] == first["gap_bpb"]
    assert '"gap_bpb"' in capsys.readouterr().out
