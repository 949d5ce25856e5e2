"""A person and a model write one text in turns."""

import io
import json
import sys

import pytest
import torch

from model.sigma_llm import SigmaLLM
from tests.training.modes.test_evaluate_generate_report import SHAPE, STEP
from training.build_data import build_tokenizer
from training.config.cli import parse_args, write_resolved
from training.modes import chat
from training.runtime.checkpoint import CheckpointStore

SEQ_LEN = 16


@pytest.fixture(scope="module")
def run_flags(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("run")
    where = ["--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")]
    config = parse_args([*SHAPE, *where])
    store = CheckpointStore(directory / "checkpoints", max_checkpoints=2, fingerprint={"a": "b"})
    store.save(STEP, {"model": fresh_model(config)[0].state_dict()}, {}, block=True)
    store.close()
    write_resolved(config, directory)
    return ["--no-require-cuda", "--device", "cpu", *where, "--mode", "chat"]


def fresh_model(config):
    tokenizer = build_tokenizer(config)
    return SigmaLLM(config.model_config(tokenizer.vocab_size), seed=3).eval(), tokenizer


def greedy(model, ids: list[int], *, count: int, end_id: int) -> list[int]:
    """The likeliest continuation, by whole forwards over all that has been written."""
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == end_id:
            break
        new.append(token)
    return new


def talk(flags, lines: list[str], monkeypatch, capsys) -> list[dict]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert chat.run(parse_args([*flags, "--json"])) == 0
    return [json.loads(row) for row in capsys.readouterr().out.splitlines()]


def test_each_answer_goes_on_from_all_that_was_said(run_flags, monkeypatch, capsys):
    flags = [*run_flags, "--temperature", "0", "--max-new-tokens", "3"]
    model, tokenizer = fresh_model(parse_args(SHAPE))
    rows = talk(flags, ["The", "", " earth"], monkeypatch, capsys)
    written = [tokenizer.end_id]
    for typed, row in zip(["The", "", " earth"], rows, strict=True):
        written += tokenizer.encode(typed)
        new = greedy(model, written[-SEQ_LEN:], count=3, end_id=tokenizer.end_id)
        assert row == {
            "checkpoint_step": STEP,
            "typed": typed,
            "text": tokenizer.decode(new),
            "ended": False,
        }
        written += new


def test_a_new_text_forgets_the_one_before(run_flags, monkeypatch, capsys):
    flags = [*run_flags, "--temperature", "0", "--max-new-tokens", "4", "--prompt", "So "]
    said = talk(flags, ["light", "more", "/new", "light", "/quit", "never"], monkeypatch, capsys)
    assert [row["typed"] for row in said] == ["light", "more", "light"]
    assert said[0]["text"] == said[2]["text"] != said[1]["text"]


def test_the_model_reads_no_more_than_it_was_trained_with(run_flags, monkeypatch, capsys):
    widths = []
    real = chat.iter_generate

    def measure(model, input_ids, **rest):
        widths.append(input_ids.shape[1])
        return real(model, input_ids, **rest)

    monkeypatch.setattr(chat, "iter_generate", measure)
    talk([*run_flags, "--max-new-tokens", "9"], ["a", "b", "c", "d"], monkeypatch, capsys)
    assert widths[0] < SEQ_LEN and widths[-1] == SEQ_LEN


def test_a_text_that_the_model_ended_is_followed_by_a_new_one(run_flags, monkeypatch, capsys):
    contexts = []

    def two_tokens(model, input_ids, **rest):
        contexts.append(input_ids.tolist())
        return iter((70, 71))

    monkeypatch.setattr(chat, "iter_generate", two_tokens)
    rows = talk([*run_flags, "--max-new-tokens", "3"], ["x", "x"], monkeypatch, capsys)
    assert [row["ended"] for row in rows] == [True, True]
    assert contexts[0] == contexts[1]
    contexts.clear()
    rows = talk([*run_flags, "--max-new-tokens", "2"], ["x", "x"], monkeypatch, capsys)
    assert [row["ended"] for row in rows] == [False, False]
    assert contexts[1][0] == [*contexts[0][0], 70, 71, *contexts[0][0][1:]]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(run_flags, monkeypatch, capsys):
    contexts = []

    def interrupted(model, input_ids, **rest):
        contexts.append(input_ids.tolist()[0])
        yield 70
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "iter_generate", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\nx\n"))
    assert chat.run(parse_args(run_flags)) == 0
    _, tokenizer = fresh_model(parse_args(SHAPE))
    assert capsys.readouterr().out == f"{tokenizer.decode([70])}\n" * 2
    assert contexts[1] == [*contexts[0], 70, *contexts[0][1:]]


def test_a_person_at_a_terminal_is_told_how(run_flags, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("A\n/quit\n"))
    monkeypatch.setattr(sys, "stdout", screen)
    assert chat.run(parse_args([*run_flags, "--max-new-tokens", "2"])) == 0
    told, *rest = screen.getvalue().partition("> ")
    assert f"step {STEP}" in told and "/new" in told and "/quit" in told
    assert "".join(rest).endswith("\n> ")


def test_a_directory_without_a_run_is_named(run_flags, tmp_path):
    with pytest.raises(ValueError, match=r"--output-dir .*none"):
        chat.run(parse_args([*run_flags, "--output-dir", str(tmp_path / "none")]))
