"""Reading a finished run: what eval, generate and report say, and what they say of mistakes."""

from __future__ import annotations

import codecs
import io
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.sigma_llm import SigmaLLM
from training.build_data import build_tokenizer
from training.config.cli import parse_args, write_resolved
from training.config.sigma_config import ConfigError
from training.data import TokenCorpus, TokenSplit
from training.modes import evaluate, generate, report
from training.modes.generate import stream_text
from training.runtime.checkpoint import CheckpointStore

TEXT = (
    "In the beginning God created the heaven and the earth. Und Gott sprach: Es werde Licht! 光\n"
)
SHAPE = (
    "--no-require-cuda --device cpu --no-torch-compile --tokenizer-name assets-4k --d-model 32 "
    "--n-heads 2 --n-layers 2 --mamba-ratio 1 --d-ff 48 --rope-dim 8 --kv-latent-dim 16 "
    "--mamba-d-state 8 --mamba-head-dim 16 --mimo-rank 1 --mamba-chunk-len 8 --seq-len 16"
).split()
STEP = 7


@pytest.fixture(scope="module")
def run_flags(tmp_path_factory) -> list[str]:
    """A run directory with one checkpoint of a small model with random weights."""
    directory = tmp_path_factory.mktemp("run")
    where = ["--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")]
    config = parse_args([*SHAPE, *where])
    tokenizer = build_tokenizer(config)
    model = SigmaLLM(config.model_config(tokenizer.vocab_size), seed=3)
    store = CheckpointStore(directory / "checkpoints", max_checkpoints=2, fingerprint={"a": "b"})
    store.save(STEP, {"model": model.state_dict()}, {}, block=True)
    store.close()
    write_resolved(config, directory)
    return ["--no-require-cuda", "--device", "cpu", *where]


@pytest.fixture(scope="module")
def saved_model(run_flags):
    """The model in that checkpoint, made again from its seed."""
    config = parse_args([*SHAPE, *run_flags])
    tokenizer = build_tokenizer(config)
    return SigmaLLM(config.model_config(tokenizer.vocab_size), seed=3).eval(), tokenizer


def bits_by_hand(model, tokens: list[int], *, seq_len: int) -> float:
    """Bits of tokens[1:], each predicted from the tokens before it in its window."""
    total = 0.0
    for first in range(0, len(tokens) - 1, seq_len):
        window = torch.tensor(tokens[first : first + seq_len + 1])
        with torch.no_grad():
            logits = model(window[:-1].unsqueeze(0)).logits[0]
        nats = F.cross_entropy(logits.double(), window[1:], reduction="sum")
        total += float(nats) / math.log(2)
    return total


def test_eval_with_test_time_training_says_both_figures(run_flags, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("One line, again and again.\n" * 60, encoding="utf-8")
    asked = [*run_flags, "--mode", "eval", "--eval-file", str(path)]
    learning = [
        "--ttt-enabled",
        "--ttt-chunk-tokens",
        "64",
        "--ttt-lr",
        "0.1",
        "--ttt-scope",
        "all",
    ]
    assert evaluate.run(parse_args([*asked, "--json"])) == 0
    plain = json.loads(capsys.readouterr().out)
    assert evaluate.run(parse_args([*asked, *learning, "--json"])) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["bpb"] == pytest.approx(plain["bpb"], rel=1e-6) and row["ttt_bpb"] < plain["bpb"]
    assert row["ttt_trained_chunks"] == row["ttt_chunks"] - 1 > 0
    assert "ttt_bpb" not in plain
    assert evaluate.run(parse_args([*asked, *learning])) == 0
    assert "bits per byte with test-time training" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--ttt-enabled.*--hidden"):
        evaluate.run(parse_args([*run_flags, "--mode", "eval", "--hidden", *learning]))


def test_test_time_training_asks_for_a_second_chunk(run_flags, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("One line, again and again.\n" * 60, encoding="utf-8")
    asked = [*run_flags, "--mode", "eval", "--json", "--ttt-enabled", "--eval-file", str(path)]
    with pytest.raises(ConfigError, match=r"--ttt-enabled.*one chunk") as refused:
        evaluate.run(parse_args(asked))
    assert capsys.readouterr().out == ""
    most = str(refused.value).split()[-3]
    assert evaluate.run(parse_args([*asked, "--ttt-chunk-tokens", most])) == 0
    assert json.loads(capsys.readouterr().out)["ttt_trained_chunks"] > 0
    path.write_text("short", encoding="utf-8")
    with pytest.raises(ConfigError, match="give more text"):
        evaluate.run(parse_args([*asked, "--ttt-chunk-tokens", "1"]))


def test_eval_file_equals_the_hand_computation(run_flags, saved_model, tmp_path, capsys):
    model, tokenizer = saved_model
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode() + b"\xff\x00")  # also bytes that are no UTF-8
    content = path.read_bytes()
    arguments = [*run_flags, "--mode", "eval", "--eval-file", str(path), "--json"]
    assert evaluate.run(parse_args(arguments)) == 0
    row = json.loads(capsys.readouterr().out)
    tokens = [tokenizer.end_id, *tokenizer.encode(content), tokenizer.end_id]
    bits = bits_by_hand(model, tokens, seq_len=16)
    assert row["num_bytes"] == len(content) and row["num_tokens"] == len(tokens) - 1
    assert row["bpb"] == pytest.approx(bits / len(content), rel=1e-5)
    assert row["checkpoint_step"] == STEP and row["text"] == str(path)


def test_eval_without_json_is_two_readable_lines(run_flags, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    evaluate.run(parse_args([*run_flags, "--mode", "eval", "--eval-file", str(path)]))
    first, second = capsys.readouterr().out.splitlines()
    assert "bits per byte on" in first and f"{len(TEXT.encode()):,} bytes" in first
    assert f"checkpoint of step {STEP}" in second


def test_eval_without_a_file_measures_the_validation_split(
    run_flags, saved_model, monkeypatch, capsys
):
    model, tokenizer = saved_model
    document = [tokenizer.end_id, *tokenizer.encode(TEXT)]
    split = TokenSplit(
        tokens=np.array(document * 3, dtype=np.uint16),
        starts=np.arange(4) * len(document),
        source_ids=np.zeros(3, dtype=np.int16),
    )
    corpus = TokenCorpus(
        splits={"train": split, "validation": split},
        fingerprint="f",
        tokenizer_sha256=tokenizer.sha256,
        end_id=tokenizer.end_id,
        byte_lengths=tokenizer.token_byte_lengths,
    )
    monkeypatch.setattr(evaluate, "build_corpus", lambda config, tokenizer: corpus)
    rows = []
    for limit in ("0", "32"):
        evaluate.run(parse_args([*run_flags, "--mode", "eval", "--eval-tokens", limit, "--json"]))
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0]["text"] == "validation split"
    assert rows[0]["num_tokens"] == 3 * len(document)
    assert rows[0]["num_bytes"] == 3 * len(TEXT.encode())
    assert rows[1]["num_tokens"] == 32
    bits = bits_by_hand(model, document[:33], seq_len=16)
    assert rows[1]["bpb"] == pytest.approx(bits / rows[1]["num_bytes"], rel=1e-5)


def test_todays_shape_flags_do_not_disturb_a_saved_model(run_flags, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    base = [*run_flags, "--mode", "eval", "--eval-file", str(path), "--json"]
    results = []
    for more in ([], ["--d-model", "96", "--seq-len", "64", "--tokenizer-name", "assets-32k"]):
        evaluate.run(parse_args([*base, *more]))
        results.append(json.loads(capsys.readouterr().out)["bpb"])
    assert results[0] == results[1]


def test_generate_streams_the_models_greedy_text(run_flags, saved_model, capsys):
    model, tokenizer = saved_model
    ids = [tokenizer.end_id, *tokenizer.encode("The earth")]
    start = len(ids)
    with torch.no_grad():
        for _ in range(9):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    flags = ["--mode", "generate", "--prompt", "The earth", "--temperature", "0"]
    assert generate.run(parse_args([*run_flags, *flags, "--max-new-tokens", "9"])) == 0
    expected = tokenizer.decode(ids[start:]).split("<|endoftext|>")[0]
    assert capsys.readouterr().out == f"The earth{expected}\n"


def test_generate_repeats_with_its_seed_and_reports_json(run_flags, capsys):
    flags = [*run_flags, "--mode", "generate", "--prompt", "A", "--max-new-tokens", "12", "--json"]
    rows = []
    for seed in ("5", "5", "6"):
        generate.run(parse_args([*flags, "--seed", seed]))
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0]["text"] == rows[1]["text"] != rows[2]["text"]
    assert rows[0]["prompt"] == "A" and rows[0]["checkpoint_step"] == STEP
    assert 0 < rows[0]["num_tokens"] <= 12 and rows[0]["tokens_per_s"] > 0


def test_an_empty_prompt_starts_a_document(run_flags, capsys):
    generate.run(parse_args([*run_flags, "--mode", "generate", "--max-new-tokens", "3"]))
    assert capsys.readouterr().out.endswith("\n")


def test_no_written_piece_breaks_a_character(run_flags, saved_model):
    _, tokenizer = saved_model
    text = "naïve 光 🙂 done"
    tokens = [token for byte in text.encode() for token in tokenizer.encode(bytes([byte]))]
    assert len(tokens) == len(text.encode())  # every byte is a token of its own
    pieces = list(stream_text(tokens, tokenizer=tokenizer))
    assert pieces == list(text)
    assert "".join(stream_text(tokens[:-6], tokenizer=tokenizer)).endswith("\ufffd")


def test_any_bytes_stream_to_what_decoding_at_once_gives(saved_model):
    _, tokenizer = saved_model
    for seed in range(50):
        content = random.Random(seed).randbytes(40)
        tokens = [token for byte in content for token in tokenizer.encode(bytes([byte]))]
        streamed = "".join(stream_text(tokens, tokenizer=tokenizer))
        assert streamed == codecs.decode(content, "utf-8", "replace")


def test_a_terminal_gets_no_control_characters(run_flags, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    flags = ["--mode", "generate", "--prompt", "a\x1b[31mb", "--max-new-tokens", "1"]
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", screen)
        generate.run(parse_args([*run_flags, *flags]))
        assert ("\x1b" in screen.getvalue()) == (not screen.isatty())


@pytest.mark.parametrize("mode", ["eval", "generate"])
def test_a_directory_without_a_run_or_checkpoint_is_named(mode, run_flags, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("x", encoding="utf-8")
    module = {"eval": evaluate, "generate": generate}[mode]
    flags = [*run_flags, "--mode", mode, "--eval-file", str(text)]
    with pytest.raises(ValueError, match=r"--output-dir .*none"):
        module.run(parse_args([*flags, "--output-dir", str(tmp_path / "none")]))
    with pytest.raises(ValueError, match=r"--checkpoint-dir .*none"):
        module.run(parse_args([*flags, "--checkpoint-dir", str(tmp_path / "none")]))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == [text]


def test_missing_and_empty_files_are_named(run_flags, tmp_path):
    (tmp_path / "empty.txt").touch()
    for name, words in (("gone.txt", "No such file"), ("empty.txt", "is empty"), (".", "irectory")):
        flags = [*run_flags, "--mode", "eval", "--eval-file", str(tmp_path / name)]
        with pytest.raises(ValueError, match=f"--eval-file .*{words}") as error:
            evaluate.run(parse_args(flags))
        assert "\n" not in str(error.value)


def test_report_is_rebuilt_and_its_place_told(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.5}\n', encoding="utf-8")
    flags = ["--mode", "report", "--output-dir", str(tmp_path)]
    assert report.run(parse_args(flags)) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    report.run(parse_args([*flags, "--json"]))
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "report.html")}
    with pytest.raises(ValueError, match=r"--output-dir .*no metrics\.jsonl"):
        report.run(parse_args(["--mode", "report", "--output-dir", str(tmp_path / "none")]))


def test_a_hidden_evaluation_watches_the_trainer_that_started_it(run_flags, monkeypatch):
    begun = []
    monkeypatch.setattr(evaluate, "end_with_trainer", lambda: begun.append("watch"))
    monkeypatch.setattr(evaluate, "load_for_inference", lambda config: begun.append("load"))
    with pytest.raises(AttributeError):  # there is no model to ask
        evaluate.run(parse_args([*run_flags, "--mode", "eval", "--hidden"]))
    assert begun == ["watch", "load"]
