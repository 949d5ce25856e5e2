"""Probe text is held out whole, is never trained on, and looking at it changes nothing."""

import numpy as np
import pytest
import torch

from tests.training.credit_models import backward, chain_batch, small_model
from tests.training.small_corpus import TOKENIZER, SmallCorpus
from training.data import TokenStream, tokenize_corpus
from training.probe import Probe, document_hash, hold_out, probe_batches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus():
    return tokenize_corpus(SmallCorpus(num_documents=120), TOKENIZER)


def documents(split):
    return [
        tuple(split.tokens[split.starts[n] : split.starts[n + 1]].tolist())
        for n in range(split.num_documents)
    ]


def test_documents_are_on_one_side_and_none_is_lost(corpus):
    rest, probe = hold_out(corpus, num_tokens=600)
    kept, held = documents(rest.splits["train"]), documents(probe)
    assert sorted(kept + held) == sorted(documents(corpus.splits["train"]))
    assert not set(kept) & set(held)
    assert 600 <= len(probe.tokens) < 600 + max(map(len, held))
    assert rest.splits["validation"] is corpus.splits["validation"]


def test_probe_documents_are_never_in_a_training_batch(corpus):
    """Two epochs of batches against the probe's 8-grams, which the kept text does not share."""
    rest, probe = hold_out(corpus, num_tokens=600)

    def grams(tokens):
        return {tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)}

    kept = set().union(*(grams(doc) for doc in documents(rest.splits["train"])))
    secret = set().union(*(grams(doc) for doc in documents(probe))) - kept
    assert len(secret) > 100
    stream = TokenStream(rest, seed=1, batch_size=4, seq_len=32)
    plain = TokenStream(corpus, seed=1, batch_size=4, seq_len=32)

    def seen(source):
        found = set()
        while source.epoch < 2:
            for row in source.next_batch().input_ids.tolist():
                found |= grams(row)
        return found

    assert not seen(stream) & secret
    assert seen(plain) & secret  # the control: without holding out they are trained on


def test_the_choice_depends_on_content_alone(corpus):
    _, probe = hold_out(corpus, num_tokens=600)
    split = corpus.splits["train"]
    limit = max(document_hash(probe, n) for n in range(probe.num_documents))
    below = [n for n in range(split.num_documents) if document_hash(split, n) <= limit]
    assert documents(probe) == [documents(split)[n] for n in below]


def test_another_probe_is_another_corpus(corpus):
    first, _ = hold_out(corpus, num_tokens=600)
    second, _ = hold_out(corpus, num_tokens=900)
    assert len({first.fingerprint, second.fingerprint, corpus.fingerprint}) == 3
    saved = TokenStream(first, seed=0, batch_size=2, seq_len=32).state_dict()
    with pytest.raises(ValueError, match="corpus"):
        TokenStream(second, seed=0, batch_size=2, seq_len=32).load_state_dict(saved)


def test_too_much_is_refused(corpus):
    tokens = len(corpus.splits["train"].tokens)
    with pytest.raises(ValueError, match="--probe-batches"):
        hold_out(corpus, num_tokens=tokens // 4)


def test_batches_have_the_asked_shape(corpus):
    _, probe = hold_out(corpus, num_tokens=2 * 5 * 32)
    batches = probe_batches(probe, corpus, batch_size=2, num_batches=5, seq_len=32)
    assert [batch.input_ids.shape for batch in batches] == [(2, 32)] * 5
    served = np.concatenate([batch.input_ids.flatten().numpy() for batch in batches])
    assert (served == probe.tokens[: 2 * 5 * 32]).all()


def test_looking_changes_nothing():
    model = small_model()
    backward(model, chain_batch(torch.Generator().manual_seed(0), rows=4))
    model.blocks[0].eval()  # a part that is frozen stays so
    modes = [module.training for module in model.modules()]
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random = torch.get_rng_state()
    batch = chain_batch(torch.Generator().manual_seed(1), rows=4)
    probe = Probe([batch], device=CPU)
    before = probe.loss(model, probe.batch(5))
    loss, gradients = probe.gradient(model, batch)
    assert float(loss) == pytest.approx(float(before), abs=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert set(gradients) == set(model.parameters())
    assert all(bool(grad.isfinite().all()) for grad in gradients.values())


def test_gradients_return_after_a_failure():
    model = small_model()
    batch = chain_batch(torch.Generator().manual_seed(0), rows=4)
    backward(model, batch)
    kept = [param.grad for param in model.parameters()]

    def fail(_):
        raise RuntimeError("out of memory")

    handle = model.final_norm.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Probe([batch], device=CPU).gradient(model, batch)
    handle.remove()
    assert all(param.grad is grad for param, grad in zip(model.parameters(), kept))
    assert model.training


def test_a_probe_without_batches_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Probe([], device=CPU)
