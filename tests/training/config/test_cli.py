"""From words to a configuration and back, and every way to mistype it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.config.cli import from_json, parse_args, to_args, to_json, write_resolved
from training.config.fields import ConfigError, iter_flags
from training.config.sigma_config import SigmaConfig

PROJECT = Path(__file__).parents[3]


def failure_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as failure:
        parse_args(argv)
    assert "\n" not in str(failure.value)
    return str(failure.value)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_args_text_and_back_is_the_identity(data, config_strategy, exactly, tmp_path_factory):
    config = data.draw(config_strategy)
    path = tmp_path_factory.getbasetemp() / "identity.txt"
    path.write_text(to_args(config), encoding="utf-8", newline="")
    assert exactly(parse_args([f"@{path}"])) == exactly(config)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_json_and_back_is_the_identity(data, config_strategy, exactly):
    config = data.draw(config_strategy)
    assert exactly(from_json(to_json(config))) == exactly(config)


@pytest.mark.parametrize("flag", iter_flags(SigmaConfig), ids=lambda flag: flag.name)
def test_every_flag_is_taken_from_the_command_line(flag):
    default = SigmaConfig()
    if flag.kind == "bool":
        argv = [flag.off_name if flag.default and flag.off_name else flag.name]
        if flag.name == "--c3o-credit-enabled":
            argv += ["--optimizer", "c3o"]
        expected = not flag.default
    elif flag.rule.choices:
        expected = next(item for item in flag.rule.choices if item != flag.default)
        argv = [flag.name, expected]
        if flag.name == "--cuda-graphs":  # experts need kernels then
            argv += ["--kernel-backend", "triton"]
    else:
        special = {
            "--device": "cpu",
            "--d-model": 1536,
            "--n-heads": 6,
            "--d-ff": 1536,
            "--rope-dim": 64,
            "--mamba-d-state": 64,
            "--mamba-head-dim": 128,
            "--moe-top-k": 1,
            "--n-shared-experts": 2,
            "--engram-orders": (2, 5),
            "--engram-layers": (0, 3),
            "--curriculum-phases": "0.5",
            "--commoncrawl-parallel-files": 8,
            "--gn-damping-min": 5e-5,
            "--sigma-rl-dispo-clip": "0.1,0.4,0.3,0.2",
            "--ttrl-task-families": "symbolic,gym:gcd",
            "--hydra-domains": "text,math",
            "--fractal-genome": "mamba width x2 | attention",
            "--mamba-block-t": 32,
            "--mamba-block-n": 32,
        }
        fallback = f"{flag.default}x" if flag.kind == "str" else flag.default
        if flag.kind == "int":
            fallback = flag.default + 1
        if flag.kind == "float":
            fallback = flag.default * 0.97 + 0.001
        expected = special.get(flag.name, fallback)
        argv = [flag.name, flag.format(expected)]
        if flag.name.startswith("--mamba-block"):
            argv += ["--kernel-backend", "triton"]
    section = getattr(parse_args(argv), flag.section)
    assert getattr(section, flag.field) == expected
    assert getattr(getattr(default, flag.section), flag.field) == flag.default


def test_the_later_one_wins_on_the_line_and_between_files(tmp_path):
    (tmp_path / "inner.txt").write_text("--steps 2\n--lr 0.5\n")
    (tmp_path / "outer.txt").write_text("--steps 1\n@inner.txt\n--batch-size 7\n")
    outer = f"@{tmp_path / 'outer.txt'}"
    config = parse_args(["--lr", "0.1", outer, "--batch-size", "9"])
    assert (config.run.steps, config.optim.lr, config.data.batch_size) == (2, 0.5, 9)
    assert parse_args([outer, "--steps", "8"]).run.steps == 8
    assert parse_args(["--no-require-cuda", "--require-cuda"]).run.require_cuda


def test_a_json_preset_mixes_with_flags_in_order(tmp_path):
    (tmp_path / "preset.json").write_text('{"run": {"steps": 3}, "model": {"engram_orders": [2]}}')
    preset = f"@{tmp_path / 'preset.json'}"
    config = parse_args(["--steps", "1", preset, "--seed", "4"])
    assert (config.run.steps, config.run.seed, config.model.engram_orders) == (3, 4, (2,))
    assert parse_args([preset, "--steps", "5"]).run.steps == 5


def test_values_keep_what_a_shell_parser_would_eat(tmp_path):
    (tmp_path / "a.txt").write_text("--output-dir runs\\sigma_debug\n--prompt\n@everyone\n")
    config = parse_args([f"@{tmp_path / 'a.txt'}"])
    assert config.run.output_dir == "runs\\sigma_debug"
    assert config.generate.prompt == "@everyone"
    assert parse_args(["--prompt", "@everyone"]).generate.prompt == "@everyone"
    assert parse_args(["--prompt=--steps"]).generate.prompt == "--steps"
    assert parse_args(["--prompt", "-5"]).generate.prompt == "-5"
    assert parse_args(["--prompt", "a=b c"]).generate.prompt == "a=b c"


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_a_profile_edited_on_windows_is_read_unchanged(tmp_path, newline, mark, exactly):
    """The EXE's profile and the flags of a proof run, as Notepad would save them."""
    shipped = PROJECT / "train_sigma_args.txt"
    proof = [
        r"--output-dir runs\sigma_debug",
        r"--checkpoint-dir C:\My Runs\new\table\0\ckpt # \n, \t and \0 are no escapes",
        r'--tokenizer-name "D:\tokens\my tokenizer.json"',
        "--proof-mode",
    ]
    lines = [*shipped.read_text(encoding="utf-8").splitlines(), *proof, ""]
    path = tmp_path / "args.txt"
    path.write_bytes((mark + newline.join(lines)).encode())
    config = parse_args([f"@{path}", "--steps", "30"])
    assert config.run.output_dir == "runs\\sigma_debug"
    assert config.run.checkpoint_dir == r"C:\My Runs\new\table\0\ckpt"
    assert config.data.tokenizer_name == r"D:\tokens\my tokenizer.json"
    expected = parse_args([f"@{shipped}", "--proof-mode", "--steps", "30"])
    expected.run.output_dir = config.run.output_dir
    expected.run.checkpoint_dir = config.run.checkpoint_dir
    expected.data.tokenizer_name = config.data.tokenizer_name
    assert exactly(config) == exactly(expected)
    path.write_text(to_args(config), encoding="utf-8")
    assert exactly(parse_args([f"@{path}"])) == exactly(config)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stpes", "5"], "unknown flag --stpes; did you mean --steps?"),
        (["--step", "5"], "unknown flag --step; did you mean --steps?"),
        (["--d_model", "64"], "unknown flag --d_model; did you mean --d-model?"),
        (["--Steps", "64"], "unknown flag --Steps; did you mean --steps?"),
        (["-steps", "64"], "unknown flag -steps; did you mean --steps?"),
        (["\u2013steps", "64"], "unknown flag \u2013steps; did you mean --steps?"),
        (["--no-requirecuda"], "unknown flag --no-requirecuda; did you mean --no-require-cuda?"),
        (["--muon-max", "9"], "--muon-max; did you mean --muon-max-orthogonalized-dim?"),
        (["--qqqqqq"], "unknown flag --qqqqqq"),
        (["--steps", "ten"], "--steps takes a whole number, not 'ten'"),
        (["--steps", "1e3"], "--steps takes a whole number, not '1e3'"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--steps", "9" * 5000], "--steps takes a whole number, not"),
        (["--lr", "nan"], "--lr must be a finite number, not nan"),
        (["--lr", "-1"], "--lr must be greater than 0, not -1.0"),
        (["--dropout", "1"], "--dropout must be less than 1, not 1.0"),
        (["--engram-orders", "2,x"], "--engram-orders takes whole numbers separated by commas"),
        (["--mode", "trian"], "--mode must be one of train, plan"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--seed", "3"], "--steps needs a value"),
        (["--require-cuda", "true"], "--require-cuda takes no value, not 'true'"),
        (["--no-resume=1"], "--no-resume takes no value, not '1'"),
        (["--no-no-resume"], "unknown flag --no-no-resume; did you mean --no-resume?"),
        (["steps=5"], "unexpected argument 'steps=5': flags start with --"),
        (["@"], "@ must be followed by the name of an args file"),
        (["@does/not/exist.txt"], f", nor a folder {Path('does/not')}; check the path"),
        (["--output-dir", "a\nb"], "--output-dir must be a path on one line"),
        (["--output-dir", "caf\udce9"], "--output-dir holds bytes that are not UTF-8"),
    ],
)
def test_a_mistake_is_one_line_naming_flag_and_mend(argv, message):
    assert message in failure_of(*argv)


def test_a_mistake_in_a_file_names_its_line(tmp_path):
    inner, outer = tmp_path / "inner.txt", tmp_path / "outer.txt"
    inner.write_text("# comment\n\n--stpes 5\n")
    outer.write_text("--seed 1\n@inner.txt\n")
    message = failure_of(f"@{outer}")
    assert message == f"unknown flag --stpes; did you mean --steps? ({inner} line 3)"
    outer.write_text("@missing.txt\n")
    assert f"missing.txt; check the path ({outer} line 1)" in failure_of(f"@{outer}")
    outer.write_text("--lr 1\n--steps\n# no value\n--seed 2\n")
    assert f"({outer} line 2)" in failure_of(f"@{outer}")


def test_args_files_that_include_each_other_end(tmp_path):
    (tmp_path / "a.txt").write_text("@b.txt\n")
    (tmp_path / "b.txt").write_text("@sub/../a.txt\n")
    assert "a.txt -> b.txt -> a.txt" in failure_of(f"@{tmp_path / 'a.txt'}")
    (tmp_path / "wide.txt").write_text("@leaf.txt\n" * 200)
    (tmp_path / "leaf.txt").write_text("--steps 1\n")
    assert "more than 100 args files" in failure_of(f"@{tmp_path / 'wide.txt'}")


def test_a_file_may_be_read_twice_in_a_row(tmp_path):
    (tmp_path / "a.txt").write_text("--steps 4\n")
    include = f"@{tmp_path / 'a.txt'}"
    assert parse_args([include, "--steps", "5", include]).run.steps == 4


def test_resolved_files_reproduce_the_run(tmp_path, exactly):
    config = parse_args(["--steps", "12", "--no-require-cuda", "--sample-prompt", "a\n b "])
    write_resolved(config, tmp_path / "new" / "run")
    for name in ("resolved_args.txt", "config.json"):
        again = parse_args([f"@{tmp_path / 'new' / 'run' / name}"])
        assert exactly(again) == exactly(config)
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [
        "config.json",
        "resolved_args.txt",
    ]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_resolved(parse_args(["--steps", "1"]), tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.runtime.atomic_io.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_resolved(parse_args(["--steps", "2"]), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_help_shows_every_flag_by_section_without_torch():
    code = (
        "import sys\n"
        "from training.config.cli import parse_args\n"
        "try:\n    parse_args(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    for flag in iter_flags(SigmaConfig):
        assert flag.name in result.stdout
    assert "Optimizer and schedule:" in result.stdout
    assert result.stdout.index("Model:") < result.stdout.index("--d-model N")
