"""Test-time training: scored first, learned afterwards, gone at the end."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.sigma_llm import SigmaLLM
from tests.tiny_model import VOCAB, tiny_config
from tests.trainable import patched
from training.evaluation import evaluate_bpb
from training.stream.batch import to_batch
from training.ttt import (
    ChunkLearner,
    TTTSettings,
    cut_chunks,
    evaluate_with_ttt,
    joined,
    trained_parameters,
)

CPU = torch.device("cpu")
FAST = TTTSettings(chunk_tokens=64, epochs=2, lr=0.05, scope="all")


def make_model(**changes):
    return patched(SigmaLLM(tiny_config(**changes), seed=1)).eval()


def batch_of(tokens):
    """(2, 16) tokens, each the label of the one before."""
    inputs = tokens.reshape(2, 16)
    lengths = np.ones(VOCAB, dtype=np.int32)
    return to_batch(
        inputs, np.roll(inputs, -1, 1), np.zeros((2, 16), np.int16), end_id=0, byte_lengths=lengths
    )


def text(num_batches=8, *, seed=0, period=5):
    """A sequence that repeats itself, so that there is something to learn."""
    phrase = np.random.default_rng(seed).integers(1, VOCAB, period)
    tokens = np.resize(phrase, num_batches * 32).astype(np.int64)
    return [batch_of(part) for part in np.split(tokens, num_batches)]


def digest(model):
    content = b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


class Watched(ChunkLearner):
    """Notes the weights with which every chunk after the first will be scored."""

    seen: list[str]

    def train(self, chunk, *, rate):
        moved = super().train(chunk, rate=rate)
        self.seen.append(digest(self._model))
        return moved


def run(monkeypatch, batches, *, settings=FAST, **changes):
    """Result, and digests of the weights before each score but the first."""
    seen = []
    monkeypatch.setattr("training.ttt.ChunkLearner", type("W", (Watched,), {"seen": seen}))
    model = make_model(**changes)
    return evaluate_with_ttt(model, batches, settings=settings, device=CPU), seen


@pytest.mark.parametrize("scope", ["vectors", "all"])
@pytest.mark.parametrize("quant_mode", ["none", "bitnet_1_58"])
def test_the_weights_are_what_they_were(scope, quant_mode):
    model = make_model(quant_mode=quant_mode)
    before, modes = digest(model), [module.training for module in model.modules()]
    settings = replace(FAST, scope=scope)
    result = evaluate_with_ttt(model, text(), settings=settings, device=CPU)
    assert result.ttt_chunks == 4 and result.ttt_trained_chunks == 3
    assert result.ttt_delta_norm > 0.0
    assert digest(model) == before
    assert [module.training for module in model.modules()] == modes
    assert all(param.grad is None for param in model.parameters())
    plain = evaluate_bpb(model, text(), device=CPU)
    assert result.score.bpb < plain.bpb and result.score.num_tokens == plain.num_tokens


def test_no_score_depends_on_its_own_chunk_or_a_later_one(monkeypatch):
    whole = text()
    other = [*whole[:4], *text(4, seed=9)]  # chunks 2 and 3 are another text
    _, seen = run(monkeypatch, whole)
    _, seen_other = run(monkeypatch, other)
    assert len(seen) == 3
    assert seen[:2] == seen_other[:2]  # the weights that score chunks 1 and 2
    assert seen[2] != seen_other[2]  # those of chunk 3 have learned from chunk 2


def test_the_last_chunk_is_scored_only_and_one_chunk_is_the_plain_score(monkeypatch):
    model = make_model()
    result, seen = run(monkeypatch, text(), settings=replace(FAST, chunk_tokens=10**6))
    assert seen == [] and (result.ttt_chunks, result.ttt_trained_chunks) == (1, 0)
    assert result.ttt_delta_norm == 0.0 and result.ttt_grad_clipped_fraction == 0.0
    assert result.score == evaluate_bpb(model, text(), device=CPU)


def test_ternary_codes_stand_while_vectors_learn():
    model = make_model(quant_mode="bitnet_1_58")
    params = trained_parameters(model, "vectors")
    matrices = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}
    learner = ChunkLearner(
        model, params, settings=replace(FAST, scope="vectors"), autocast=torch.enable_grad
    )
    assert learner.train(text(2), rate=1.0)
    assert all(torch.equal(matrices[n], p) for n, p in model.named_parameters() if n in matrices)


def test_momentum_lives_on_rates_fall_and_gradients_are_clipped(monkeypatch):
    rates, norms = [], []
    step = torch.optim.SGD.step

    def noted(self, *args, **kwargs):
        (group,) = self.param_groups
        rates.append(group["lr"])
        norms.append(float(torch.stack([p.grad.norm() for p in group["params"]
                                        if p.grad is not None]).norm()))  # fmt: skip
        noted.states.append(len(self.state))
        return step(self, *args, **kwargs)

    noted.states = []
    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    settings = replace(FAST, grad_clip=0.01)
    result = evaluate_with_ttt(make_model(), text(), settings=settings, device=CPU)
    wanted = [0.05 * 0.5 * (1 + math.cos(math.pi * n / 3)) for n in range(3) for _ in range(4)]
    assert rates == pytest.approx(wanted)
    assert max(norms) <= 0.01 * 1.001 and result.ttt_grad_clipped_fraction == 1.0
    assert noted.states[0] == 0 and all(noted.states[1:])  # one optimizer for the whole text
    loose = evaluate_with_ttt(
        make_model(), text(), settings=replace(FAST, grad_clip=1e9), device=CPU
    )
    assert loose.ttt_grad_clipped_fraction == 0.0


def test_it_gains_on_a_text_that_repeats_and_not_on_noise():
    """What it learns is the text: random tokens teach nothing about the next ones."""
    noise = np.random.default_rng(3).integers(1, VOCAB, 256).astype(np.int64)
    gains = []
    for batches in (text(), [batch_of(part) for part in np.split(noise, 8)]):
        model = make_model()
        learned = evaluate_with_ttt(model, batches, settings=FAST, device=CPU).score
        gains.append(evaluate_bpb(model, batches, device=CPU).bpb - learned.bpb)
    assert gains[0] > 0.5 and gains[1] < 0.2 * gains[0]


def test_chunks_and_scores_add_up():
    batches = text(7)
    chunks = cut_chunks(batches, num_tokens=64)
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
    assert [batch for chunk in chunks for batch in chunk] == batches
    model = make_model()
    parts = [evaluate_bpb(model, chunk, device=CPU) for chunk in chunks]
    whole = evaluate_bpb(model, batches, device=CPU)
    assert joined(parts).bpb == pytest.approx(whole.bpb, rel=1e-12)
    assert joined(parts).num_bytes == whole.num_bytes


def test_an_end_without_a_byte_belongs_to_the_chunk_before():
    batches = text(5)
    batches[-1] = replace(batches[-1], num_bytes=0)
    assert [len(chunk) for chunk in cut_chunks(batches, num_tokens=64)] == [2, 3]
    assert [len(chunk) for chunk in cut_chunks(batches[-1:], num_tokens=64)] == [1]
    result = evaluate_with_ttt(make_model(), batches, settings=FAST, device=CPU)
    assert (result.ttt_chunks, result.ttt_trained_chunks) == (2, 1)


def test_a_failure_leaves_the_weights_as_well(monkeypatch):
    model, calls = make_model(), []
    before = digest(model)

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return evaluate_bpb(*args, **kwargs)

    monkeypatch.setattr("training.ttt.evaluate_bpb", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        evaluate_with_ttt(model, text(), settings=FAST, device=CPU)
    assert digest(model) == before


def test_a_rate_that_diverges_is_refused_and_leaves_the_weights():
    model = make_model()
    before = digest(model)
    with pytest.raises(ValueError, match="lower --ttt-lr"):
        evaluate_with_ttt(model, text(), settings=replace(FAST, lr=1e38), device=CPU)
    assert digest(model) == before


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="--ttt-scope"):
        trained_parameters(make_model(), "some")
