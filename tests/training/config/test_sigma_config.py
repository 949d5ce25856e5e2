"""Defaults and profiles against the table in flags_table.tsv, and the rules between settings."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from model.config import SigmaModelConfig
from training.config.cli import parse_args
from training.config.fields import ConfigError, Flag, iter_flags
from training.config.sections import ModelConfig
from training.config.sigma_config import SigmaConfig

PROJECT = Path(__file__).parents[3]
PROFILES = [PROJECT / "train_sigma_args.txt", *sorted((PROJECT / "profiles").glob("*.txt"))]
FLAGS = {flag.name: flag for flag in iter_flags(SigmaConfig)}
with (Path(__file__).parent / "flags_table.tsv").open(encoding="utf-8") as table:
    ROWS = list(csv.DictReader(table, delimiter="\t"))

# (flag, column) -> (value here, why it is not the table's)
DEVIATIONS = {
    ("--optimizer", "type"): (
        "{adamw,muon,normuon,adamuon,soap,lion,galore-lion,gnprox,c3o}",
        "adamw, lion, galore-lion and soap are compared with it",
    ),
    ("--optimizer", "default"): ("muon", "until c3o is measured to be better"),
    ("--optimizer", "exe"): ("muon", "until c3o is measured to be better"),
    ("--c3o-base", "default"): ("muon", "the table leaves it to measurement"),
    ("--c3o-state-dtype", "type"): ("{auto,fp32,bf16}", "fp16 underflows second moments"),
    ("--c3o-credit-enabled", "default"): ("off", "its ablation found no gain"),
    ("--c3o-credit-enabled", "exe"): ("off", "its ablation found no gain"),
    ("--self-evolve-interval", "default"): ("0", "off until a gain is measured"),
    ("--self-evolve-interval", "exe"): ("0", "no probe text in the hybrid stream"),
    ("--self-improver-enabled", "default"): ("off", "off until a gain is measured"),
    ("--self-improver-enabled", "exe"): ("off", "no probe text in the hybrid stream"),
    **{
        ("--self-improver-mutation-sigma", column): ("0.25", "a smaller one hides in the noise")
        for column in ("default", "exe")
    },
    ("--torch-compile", "default"): ("off", "compiling takes minutes and no gain is measured"),
    ("--quant-mode", "type"): ("{bitnet_1_58,none}", "the high-precision twin is measured too"),
    ("--residual-layout", "default"): ("two-stream", "the table leaves it to measurement"),
    ("--data-backend", "type"): (
        "{embedded,local,hf,commoncrawl,hybrid}",
        "the shipped text and own files are backends too",
    ),
    **{
        (name, column): ("0", "the launcher knows the device and the shape")
        for name in ("--mamba-block-t", "--mamba-block-n")
        for column in ("default", "exe")
    },
    ("--fractal-interval-steps", "default"): ("0", "off until a gain is measured"),
    ("--fractal-interval-steps", "exe"): ("0", "off until a gain is measured"),
    ("--ttrl-interval", "default"): ("0", "RL only where it is asked for"),
    ("--ttrl-interval", "exe"): ("0", "RL only where it is asked for"),
    ("--sigma-rl-auto-mix-enabled", "default"): ("off", "single objectives did better"),
    ("--sigma-rl-auto-mix-enabled", "exe"): ("off", "single objectives did better"),
    ("--ttrl-asym-verify-enabled", "default"): ("off", "a random shortlist solved more per second"),
    ("--ttrl-asym-verify-enabled", "exe"): ("off", "a random shortlist solved more per second"),
    ("--causal-replay-enabled", "default"): ("off", "no gain is measured"),
    ("--causal-replay-enabled", "exe"): ("off", "no probe text in the hybrid stream"),
    ("--hydra-enable", "exe"): ("off", "its gain is measured on a small model only"),
    ("--uroboros-enabled", "default"): ("off", "no gain is measured yet"),
    ("--uroboros-enabled", "exe"): ("off", "no gain is measured yet"),
    ("--rib-router-enabled", "default"): ("off", "near-even routing costs a constant, no gain"),
    ("--grpo-backend", "type"): ("{internal,trl}", "the default first"),
    ("--grpo-backend", "default"): ("internal", "trl would fail wherever it is not installed"),
    ("--grpo-backend", "exe"): ("internal", "the frozen program goes without trl"),
    ("--data-backend", "default"): ("embedded", "no network use that nobody asked for"),
}
# Flags that the table does not name, each with its effect in this program.
ADDED = {
    "--json", "--grad-accum-steps", "--tie-embeddings", "--mamba-expand", "--mamba-head-dim",
    "--mamba-d-state", "--mamba-chunk-len", "--engram-enabled", "--engram-orders",
    "--engram-heads", "--engram-buckets", "--engram-dim", "--engram-layers", "--adam-lr",
    "--warmup-steps", "--warmdown-fraction", "--lr-final-ratio", "--eval-interval",
    "--eval-tokens", "--sample-interval", "--sample-prompt", "--sample-tokens", "--ema-enabled",
    "--ema-decay", "--ema-start-fraction", "--curriculum-enabled", "--curriculum-phases",
    "--memory-soft-limit", "--memory-hard-limit", "--hang-timeout-sec", "--supervised",
    "--aux-adaptive-shuffled", "--contamination-check", "--eval-file", "--hidden",
    "--kernel-backend", "--language-model", "--languages", "--local-path", "--local-ratio",
    "--max-new-tokens", "--mix-strategy", "--near-dedup-window", "--pdf-path", "--preview-batches",
    "--prompt", "--quality-filter", "--self-check", "--source-list", "--source-max-epochs",
    "--spool-max-mb", "--temperature", "--top-k", "--weights",
    "--muon-iteration", "--soap-refresh", "--lion-beta1", "--lion-beta2", "--lion-state-dtype",
    "--galore-rank", "--galore-refresh", "--c3o-credit-draws", "--c3o-credit-shuffled",
    "--probe-held-out", "--ttrl-tasks", "--sigma-rl-lr", "--sigma-rl-placebo",
    "--verifier-eval-tasks", "--ttrl-task-families", "--verifier-symbolic-engine",
    "--fractal-genome", "--self-evolve-shuffled", "--self-improver-shuffled", "--uroboros-placebo",
    "--causal-replay-shuffled", "--hydra-tasks", "--hydra-placebo", "--cuda-graphs",
    "--ttt-enabled", "--ttt-chunk-tokens", "--ttt-epochs", "--ttt-lr", "--ttt-momentum",
    "--ttt-grad-clip", "--ttt-scope", "--engram-canonical",
}  # fmt: skip


def expected(row: dict[str, str], column: str) -> str:
    return DEVIATIONS.get((row["flag"], column), (row[column], ""))[0]


def parsed(flag: Flag, text: str):
    return {"on": True, "off": False}[text] if flag.kind == "bool" else flag.parse(text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["flag"])
def test_type_and_default_are_those_of_the_table(row):
    flag = FLAGS[row["flag"]]
    kind = expected(row, "type")
    if kind.startswith("{"):
        assert sorted(flag.rule.choices) == sorted(kind.strip("{}").split(","))
    else:
        assert flag.kind == kind
    assert flag.default == parsed(flag, expected(row, "default"))


def test_the_table_covers_every_flag():
    in_table = {row["flag"] for row in ROWS}
    assert in_table | ADDED == set(FLAGS)
    assert not in_table & ADDED
    for (name, column), (value, _) in DEVIATIONS.items():
        row = next(row for row in ROWS if row["flag"] == name)
        assert row[column] != value, f"{name} no longer deviates in {column}"


def test_the_exe_profile_has_the_values_of_the_table():
    config = parse_args([f"@{PROFILES[0]}"])
    for row in ROWS:
        flag, text = FLAGS[row["flag"]], expected(row, "exe")
        value = getattr(getattr(config, flag.section), flag.field)
        assert value == (flag.default if text == "=" else parsed(flag, text)), flag.name


def test_the_exe_profile_names_the_flags_of_the_table_in_the_order_of_help():
    lines = [line.split()[0] for line in PROFILES[0].read_text().splitlines() if line[:2] == "--"]
    switched_off = {flag.off_name: flag.name for flag in FLAGS.values() if flag.off_name}
    lines = [switched_off.get(name, name) for name in lines]
    named = set(lines)
    assert named == {row["flag"] for row in ROWS if row["exe"] != "="}
    sections = [FLAGS[name].section for name in lines]
    order = list(dict.fromkeys(flag.section for flag in FLAGS.values()))
    assert sections == sorted(sections, key=order.index)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.name)
def test_every_shipped_profile_is_valid(profile):
    assert parse_args([f"@{profile}"]).run.mode == "train"


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.name)
def test_a_profile_leaves_the_mode_to_the_command_line(profile):
    """Later settings win: `--mode plan @profile` must not train."""
    assert parse_args(["--mode", "plan", f"@{profile}"]).run.mode == "plan"


def test_the_quickstart_asks_for_nothing_a_plain_machine_lacks():
    config = parse_args([f"@{PROJECT / 'profiles' / 'quickstart.txt'}"])
    assert not config.run.require_cuda
    assert config.run.device == "auto"
    assert not config.precision.torch_compile
    assert config.precision.precision == "auto"
    assert config.data.tokenizer_name.startswith("assets")


def test_no_flag_is_declared_twice_and_none_without_help():
    names = [name for f in iter_flags(SigmaConfig) for name in (f.name, f.off_name) if name]
    assert len(names) == len(set(names))
    for flag in iter_flags(SigmaConfig):
        assert flag.rule.help.endswith(".") and "\n" not in flag.rule.help
        assert flag.check(flag.default) == flag.default
        assert type(flag.check(flag.default)) is type(flag.default)


def test_model_flags_are_the_fields_of_the_model_with_its_defaults():
    own = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(SigmaModelConfig)}
    assert own == {name: theirs[name] for name in own}
    assert SigmaConfig().model_config(vocab_size=999) == SigmaModelConfig(vocab_size=999)


def test_model_config_carries_every_model_flag():
    config = parse_args(["--d-model", "384", "--engram-layers", "0,2", "--no-tie-embeddings"])
    shape = config.model_config(vocab_size=4096)
    assert (shape.vocab_size, shape.d_model, shape.engram_layers) == (4096, 384, (0, 2))
    assert not shape.tie_embeddings


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
        (["--device", "cuda:x"], "--device must be"),
        (["--output-dir", " "], "--output-dir must name a directory"),
        (["--checkpoint-dir="], "--checkpoint-dir must name a directory"),
        (["--tokenizer-name="], "--tokenizer-name must not be empty"),
        (["--n-heads", "7"], "--n-heads must divide --d-model, 768, as 6 and 8 do"),
        (["--moe-top-k", "9"], "--moe-top-k must lie between 1 and --n-routed-experts"),
        (["--d-ff", "3073"], "--d-ff must be a multiple of"),
        (["--mamba-ratio", "0", "--attention-ratio", "0"], "--mamba-ratio"),
        (["--diff-attention-lambda-init", "2"], "--diff-attention-lambda-init must lie"),
        (["--engram-enabled", "--engram-layers", "99"], "--engram-layers must name blocks"),
        (["--curriculum-enabled", "--curriculum-phases", "0.4,0.1"], "--curriculum-phases takes"),
        (["--curriculum-enabled", "--curriculum-phases", "a"], "--curriculum-phases takes"),
        (["--optimizer", "gnprox", "--gn-damping", "1e-5"], "--gn-damping 1e-05 must lie between"),
        (["--optimizer", "gnprox", "--gn-damping-min", "0.1"], "--gn-damping 0.0001 must lie"),
        (["--curriculum-enabled", "--seq-len", "510"], "--seq-len must be a multiple of 4"),
    ],
)
def test_a_broken_rule_is_one_line_naming_the_flag(argv, message):
    with pytest.raises(ConfigError) as failure:
        parse_args(argv)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_curriculum_boundaries_are_increasing_fractions():
    assert SigmaConfig().curriculum.boundaries() == (0.15, 0.40)
    parse_args(["--curriculum-enabled", "--seq-len", "512"])
    parse_args(["--no-curriculum-enabled", "--curriculum-phases", "nonsense"])


def test_instant_and_the_compiler_exclude_each_other():
    for mode in ("reversible", "compress"):
        with pytest.raises(ConfigError, match=r"--instant-mode.*--no-torch-compile"):
            parse_args(["--instant-mode", mode, "--torch-compile"])
        assert parse_args(["--instant-mode", mode, "--no-torch-compile"]).instant_mode() == mode
    assert parse_args(["--torch-compile"]).instant_mode() == "off"
    assert parse_args(["--no-torch-compile"]).instant_mode() == "auto"


def test_instant_settings_that_contradict_each_other():
    for flags, match in (
        (("--residual-layout", "standard"), "--residual-layout two-stream"),
        (("--instant-byte-budget-mb", "5"), "--instant-mode compress"),
    ):
        with pytest.raises(ConfigError, match=match):
            parse_args(["--no-torch-compile", "--instant-mode", "reversible", *flags])


def test_tiles_of_the_scan_are_the_kernels_alone():
    config = parse_args(["--kernel-backend=triton", "--mamba-block-t=32", "--mamba-block-n=128"])
    assert config.precision.scan_blocks() == (32, 128)
    with pytest.raises(ConfigError, match=r"--mamba-block-t needs --kernel-backend triton"):
        parse_args(["--mamba-block-t=32"])
    for size in ("8", "48"):
        with pytest.raises(ConfigError, match=r"--mamba-block-n must be 16, 32, 64, 128 or 0"):
            parse_args(["--kernel-backend=triton", f"--mamba-block-n={size}"])


def test_a_genome_stands_in_place_of_the_ratios():
    config = parse_args(["--fractal-genome", "mamba width x2 | attention", "--n-layers", "9"])
    network = config.model_config(4096)
    assert network.layer_kinds() == ["mamba", "mamba", "attention"] and network.n_layers == 3
    assert network.at_layer(0).d_ff == 2 * network.at_layer(2).d_ff
    for genome, more, says in (
        ("mamba x2", (), "no genome"),
        ("mamba", ("--fractal-arch-search",), "--fractal-genome gives one"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse_args(["--fractal-genome", genome, *more])
