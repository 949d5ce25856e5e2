"""The INSTANT feature in whole runs: evidence, columns, exact resume, off as if absent."""

from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from training.features import FEATURES
from training.features.instant import InstantFeature

QUIET = ("--no-ema-enabled", "--no-curriculum-enabled", "--eval-interval", "0", "--steps", "10")
# Wide enough for the least size of a compressed tensor.
WIDE = ("--seq-len", "64", "--d-model", "64", "--kv-latent-dim", "32", "--mamba-head-dim", "32")
COLUMNS = {
    "instant_reconstruction_error", "instant_error_bit_width", "instant_compression_ratio",
    "instant_bytes_saved", "instant_inversion_iters", "instant_inversion_rel_residual",
    "instant_patched_mamba", "instant_patched_mla", "instant_reversible_rel_error",
}  # fmt: skip


def losses(directory):
    return [row["train_loss"] for row in metrics_rows(directory)[1:]]


def test_every_step_counts_and_logs_what_it_saved(tmp_path):
    train(tiny_flags(tmp_path / "run", *QUIET, *WIDE, "--proof-mode"), features=(InstantFeature,))
    rows = metrics_rows(tmp_path / "run")
    last = rows[-1]
    assert last["feature_instant_enabled"] == 1
    assert last["feature_instant_effective_calls"] == len(rows) - 1 == 10
    assert set(last) >= COLUMNS
    assert last["instant_bytes_saved"] > 0 and last["instant_compression_ratio"] > 2
    assert 0 < last["instant_reconstruction_error"] < 0.02
    assert 4 < last["instant_error_bit_width"] < 9
    assert last["instant_inversion_iters"] in (1, 2)
    assert last["instant_inversion_rel_residual"] == last["instant_reversible_rel_error"] == 0
    assert (last["instant_patched_mamba"], last["instant_patched_mla"]) == (1, 1)


def test_off_is_a_run_without_the_feature_to_the_bit(tmp_path):
    train(tiny_flags(tmp_path / "off", *QUIET, "--instant-mode", "off"), features=(InstantFeature,))
    train(tiny_flags(tmp_path / "without", *QUIET), features=())
    assert losses(tmp_path / "off") == losses(tmp_path / "without")
    found = differences(tmp_path / "off", tmp_path / "without")
    assert [name for name in found if not name.startswith(("row", "features"))] == []


def test_reversal_changes_no_loss_and_no_statistic(tmp_path):
    """Gradients are the same to the bit but for the embedding's order of addition."""
    train(
        tiny_flags(tmp_path / "on", *QUIET, "--instant-mode", "reversible"),
        features=(InstantFeature,),
    )
    train(tiny_flags(tmp_path / "off", *QUIET), features=())
    one, other = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert one[0] == other[0]
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 0.01


def test_a_stopped_run_continues_to_the_bit(tmp_path):
    """Probes fall into both halves; slots, draws and plans are in the checkpoint."""
    more = (*WIDE, "--steps", "24", "--save-interval", "7", "--instant-mode", "compress")
    more += ("--eval-interval", "0", "--no-curriculum-enabled", "--instant-error-threshold", "0.1")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(tiny_flags(whole, *more))
    stopper = stop_after(11, halves)
    train(tiny_flags(halves, *more), features=(*FEATURES, stopper))
    train(tiny_flags(halves, *more))
    assert differences(whole, halves) == []
    assert losses(whole) == losses(halves)
