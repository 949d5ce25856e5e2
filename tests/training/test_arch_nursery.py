"""Real networks of a search: trials that repeat, growth that keeps the loss, state that returns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_sigma
from evolution.genome import Genome, Letter, Mutation
from model.engram import canonical_token_map
from model.sigma_llm import SigmaLLM
from tests.training.small_corpus import TOKENIZER, SmallCorpus
from training.arch_nursery import ModelNursery, NurserySettings, packed_bytes
from training.config.cli import parse_args
from training.config.sections import OptimConfig
from training.data import TokenStream, tokenize_corpus
from training.modes import arch_search
from training.probe import Probe, hold_out, probe_batches
from training.runtime.checkpoint import CheckpointError, IncompatibleCheckpoint
from training.runtime.locks import RunLock
from training.runtime.state_tree import join_state, split_state

CPU = torch.device("cpu")
GENOME = Genome(scales=(Letter(kind="mamba"),))
TINY = (
    "--fractal-arch-search --no-require-cuda --device cpu --no-torch-compile --instant-mode off "
    "--tokenizer-name assets-4k --d-model 16 --n-heads 1 --mamba-ratio 1 --attention-ratio 1 "
    "--d-ff 24 --n-routed-experts 2 --moe-top-k 2 --rope-dim 4 --kv-latent-dim 8 "
    "--mamba-d-state 4 --mamba-head-dim 16 --mamba-chunk-len 8 --mimo-rank 1 --seq-len 16 "
    "--batch-size 2 --optimizer muon --lr 0.02 --adam-lr 0.02 --warmup-steps 2 "
    "--probe-batch-size 2 --probe-batches 1 --ema-enabled --ema-decay 0.5 --steps 24"
).split()
CORPUS = tokenize_corpus(SmallCorpus(num_documents=120), TOKENIZER)


def make_nursery(*more: str, **changes) -> ModelNursery:
    config = parse_args([*TINY, *more, *(f"--{name}={value}" for name, value in changes.items())])
    rest, held_out = hold_out(CORPUS, num_tokens=64)
    batches = probe_batches(held_out, CORPUS, batch_size=2, num_batches=2, seq_len=16)
    settings = NurserySettings(
        base=config.model_config(TOKENIZER.vocab_size),
        optim=OptimConfig(optimizer=config.optim.optimizer, lr=0.02, adam_lr=0.02, warmup_steps=2),
        seed=1,
        seq_len=16,
        batch_size=2,
        grad_accum_steps=1,
        average_decay=0.5,
        pieces=TOKENIZER.pieces(),
    )
    stream = TokenStream(rest, seed=1, batch_size=2, seq_len=16)
    return ModelNursery(settings, stream=stream, probe=Probe(batches, device=CPU), device=CPU)


def steps_of(nursery: ModelNursery, count: int, genome: Genome = GENOME) -> float:
    return 3.0 * nursery.cost(genome).flops * 2 * 16 * count


def test_a_share_is_turned_into_whole_steps_and_training_lowers_the_loss():
    nursery = make_nursery()
    nursery.found(0, GENOME)
    first, spent = nursery.train(0, flops=1.0)
    assert spent == steps_of(nursery, 1)
    last, spent = nursery.train(0, flops=steps_of(nursery, 12.4))
    assert spent == steps_of(nursery, 12) and last < first


@pytest.mark.parametrize("what", ["width", "heads", "rank", "experts", "scale", "none"])
def test_a_child_begins_with_its_parents_loss_and_average(what):
    nursery = make_nursery()
    nursery.found(0, GENOME)
    loss, _ = nursery.train(0, flops=steps_of(nursery, 6))
    mutation = Mutation(what=what, scale=1 if what == "scale" else 0, kind="attention")
    nursery.grow(1, 0, GENOME, mutation)
    assert nursery._judge(nursery._load(nursery._specimens[1])) == pytest.approx(loss, abs=1e-4)
    assert nursery.average_loss(1) == pytest.approx(nursery.average_loss(0), abs=1e-4)
    genome = GENOME.mutated(mutation)
    after, _ = nursery.train(1, flops=steps_of(nursery, 4, genome))
    assert after < loss
    assert nursery.train(0, flops=0.0)[0] != loss  # the parent goes on by itself


def test_an_unchanged_child_trains_as_its_parent_would_have():
    nursery = make_nursery()
    nursery.found(0, GENOME)
    nursery.train(0, flops=steps_of(nursery, 3))
    nursery.grow(1, 0, GENOME, Mutation(what="none"))
    losses = {nursery.train(number, flops=steps_of(nursery, 5))[0] for number in (0, 1)}
    assert len(losses) == 1


def test_trials_go_on_from_a_saved_state_to_the_bit():
    nursery, later = make_nursery(), make_nursery()
    nursery.found(0, GENOME)
    nursery.train(0, flops=steps_of(nursery, 3))
    tensors, plain = split_state(nursery.state_dict())
    later.load_state_dict(join_state(tensors, json.loads(json.dumps(plain))))
    losses = [each.train(0, flops=steps_of(each, 4))[0] for each in (nursery, later)]
    assert losses[0] == losses[1]
    nursery.forget(0)
    with pytest.raises(KeyError):
        nursery.weights(0)


def test_dropout_depends_on_the_trial_and_not_on_what_was_drawn_before_it():
    losses = []
    for num_drawn in (0, 7):
        nursery = make_nursery(dropout=0.5)
        nursery.found(0, GENOME)
        nursery.train(0, flops=steps_of(nursery, 2))
        torch.rand(num_drawn)
        losses.append(nursery.train(0, flops=steps_of(nursery, 2))[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "change", ["--grad-clip=0.5", "--ema-decay=0.9", "--no-amp", "--weight-decay=0.3"]
)
def test_a_search_goes_on_with_its_own_settings_alone(tmp_path, change):
    flags = [*TINY, f"--checkpoint-dir={tmp_path}"]
    nursery = make_nursery()
    arch_search.save(arch_search.open_store(parse_args(flags), nursery), _NoSearch(), nursery)
    assert arch_search.open_store(parse_args(flags), nursery).load_newest() is not None
    with pytest.raises(IncompatibleCheckpoint, match=change.partition("=")[0]):
        arch_search.open_store(parse_args([*flags, change]), nursery).load_newest()


class _NoSearch:
    trials = 0

    def state_dict(self):
        return {}


def test_candidates_read_the_same_n_grams_as_the_run_will():
    nursery = make_nursery("--engram-enabled", "--engram-canonical", "--engram-buckets=31")
    genome = Genome(scales=(Letter(kind="mamba"), Letter(kind="attention")))
    nursery.found(0, genome)
    ids = nursery.state_dict()["0"]["weights"]["blocks.0.engram.canonical_ids"]
    assert torch.equal(ids, canonical_token_map(TOKENIZER.pieces()))
    assert not torch.equal(ids, torch.arange(TOKENIZER.vocab_size))


def test_packed_bytes_are_those_of_the_weights():
    nursery = make_nursery()
    model = SigmaLLM(GENOME.network(nursery.base))
    ternary = model.ternary_weights()
    names = {name if name in model.state_dict() else f"{name}.weight" for name in ternary}
    rest = sum(p.numel() for name, p in model.named_parameters() if name not in names)
    rows = sum(w.numel() // w.shape[-1] for w, _ in ternary.values())
    codes = sum(-(-w.numel() // 5) for w, _ in ternary.values())
    assert packed_bytes(model) == codes + 2 * rows + 2 * rest


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--optimizer=c3o", "cannot carry the credit"),
        ("--torch-compile", "--no-torch-compile"),
        ("--data-backend=local", "--fractal-arch-search needs probe text"),
    ],
)
def test_what_cannot_be_searched_is_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        parse_args([*TINY, argument])


class Stopped(Exception):
    """The machine goes away."""


def search_in(directory, monkeypatch, *, stop_after: int | None = None) -> dict:
    """One life of the command; its report if it came to the end."""
    monkeypatch.setattr(arch_search, "build_corpus", lambda config, tokenizer: CORPUS)
    monkeypatch.setattr(arch_search, "build_tokenizer", lambda config: TOKENIZER)
    trials, advance, settings = 0, arch_search.advance, arch_search.search_settings

    def counted(*args, **kwargs):
        nonlocal trials
        if trials == stop_after:
            raise Stopped
        trials += 1
        advance(*args, **kwargs)

    def short(*args):
        return replace(settings(*args), generations=2, cohort=4)

    with monkeypatch.context() as patch:
        patch.setattr(arch_search, "advance", counted)
        patch.setattr(arch_search, "search_settings", short)
        places = [f"--output-dir={directory / 'out'}", f"--checkpoint-dir={directory / 'kept'}"]
        assert arch_search.run(parse_args([*TINY, *places])) == 0
    folder = directory / "out" / arch_search.FOLDER
    return json.loads((folder / "report.json").read_text())


def test_the_command_searches_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    settings = tmp_path / "whole" / "out" / "config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text("of a finished run", encoding="utf-8")
    whole = search_in(tmp_path / "whole", monkeypatch)
    assert settings.read_text(encoding="utf-8") == "of a finished run"
    assert (settings.parent / arch_search.FOLDER / "config.json").exists()
    for stop_after in (2, 6):
        with pytest.raises(Stopped):
            search_in(tmp_path / "parts", monkeypatch, stop_after=stop_after)
    parts = search_in(tmp_path / "parts", monkeypatch)
    assert parts.pop("latency_us").keys() == whole.pop("latency_us").keys()
    assert parts == whole
    assert whole["generations"][-1]["fractal_arch_generation"] == 2
    assert whole["generations"][-1]["fractal_arch_pareto_size"] == len(whole["pareto_front"])
    assert "best of" in capsys.readouterr().out
    best = tmp_path / "whole" / "out" / arch_search.FOLDER / "best"
    weights = (best / "model.safetensors").read_bytes()
    assert (
        weights
        == (
            tmp_path / "parts" / "out" / arch_search.FOLDER / "best" / "model.safetensors"
        ).read_bytes()
    )
    trains_the_same_network(best)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), CheckpointError("full")])
def test_a_search_that_fails_ends_like_a_training_run(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(arch_search, "build_corpus", lambda config, tokenizer: CORPUS)
    monkeypatch.setattr(arch_search, "build_tokenizer", lambda config: TOKENIZER)
    out, advance = tmp_path / "out", arch_search.advance
    flags = [*TINY, f"--output-dir={out}", f"--checkpoint-dir={tmp_path / 'kept'}"]

    def failing(search, *args, **kwargs):
        if search.trials == 2:
            arch_search.save(args[1], search, args[0])
            raise error
        advance(search, *args, **kwargs)
        with pytest.raises(RuntimeError, match="in use by"):
            RunLock(out).check_free()

    monkeypatch.setattr(arch_search, "advance", failing)
    for _ in range(2):  # the second one goes on where the first has failed: nothing is locked
        assert train_sigma.main(flags) == 1
    reports = sorted((out / "errors").glob("crash_step_00000002_*.json"))
    assert len(reports) == 2 and str(reports[1]) in capsys.readouterr().err
    assert str(error) in json.loads(reports[0].read_text())["error"]["message"]
    assert train_sigma.main([*flags, "--lr=0.03"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--lr was 0.02, is now 0.03" in said
    assert len(list((out / "errors").iterdir())) == 2


def trains_the_same_network(best):
    """The args file beside a network found: the ordinary training of one with the same tensors."""
    config = parse_args([f"@{best / 'args.txt'}", "--steps", "2", "--no-strict-feature-usage"])
    assert not config.fractal.arch_search
    network = config.model_config(TOKENIZER.vocab_size)
    assert network.to_dict() == json.loads((best / "model.json").read_text())
    found = load_file(best / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in SigmaLLM(network).state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
