"""Generation: equal to recomputation, greedy, top-k, stop token, reproducible sampling."""

from __future__ import annotations

import pytest
import torch

from model.generation import generate, iter_generate, sample_token
from model.sigma_llm import SigmaLLM
from tests.tiny_model import tiny_config


def make_model(**changes) -> SigmaLLM:
    return SigmaLLM(tiny_config(**changes), seed=3)


def prompt(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 53, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["standard", "two-stream"])
def test_greedy_generation_equals_recomputation_from_scratch(layout):
    model = make_model(residual_layout=layout)
    tokens = generate(model, prompt(), max_new_tokens=24, temperature=0.0)
    expected = prompt()
    model.eval()
    with torch.no_grad():
        for _ in range(24):
            following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
    assert torch.equal(tokens, expected)


def test_each_new_token_costs_one_forward_of_one_token():
    model = make_model()
    lengths = []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, prompt(), max_new_tokens=5)
    assert lengths == [6, 1, 1, 1, 1]


def test_sampling_is_fixed_by_the_generator():
    model = make_model()
    runs = [
        generate(model, prompt(), max_new_tokens=12, generator=torch.Generator().manual_seed(seed))
        for seed in (4, 4, 5)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_sampled_tokens_follow_the_distribution_and_top_k_cuts_it():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2)):
        tokens = sample_token(logits, temperature=temperature, top_k=top_k, generator=generator)
        scaled = logits[0] / temperature
        if top_k:
            scaled = scaled.masked_fill(torch.arange(4) < 2, -torch.inf)
        share = torch.bincount(tokens, minlength=4) / 20000
        torch.testing.assert_close(share, scaled.softmax(0), atol=0.02, rtol=0)


def test_stop_token_ends_a_row_and_the_generation():
    model = make_model()
    free = generate(model, prompt(), max_new_tokens=20, temperature=0.0)
    stop = int(free[0, 9])
    stopped = generate(model, prompt(), max_new_tokens=20, temperature=0.0, stop_id=stop)
    for row, reference in zip(stopped, free):
        new = row[6:].tolist()
        wanted = reference[6:].tolist()
        cut = wanted.index(stop) if stop in wanted else len(wanted)
        assert new[:cut] == wanted[: min(cut, len(new))]
        assert set(new[cut:]) <= {stop}
    single = list(iter_generate(model, prompt(1), max_new_tokens=20, temperature=0.0, stop_id=stop))
    row = generate(model, prompt(1), max_new_tokens=20, temperature=0.0, stop_id=stop)[0, 6:]
    assert single == [int(t) for t in row if int(t) != stop]


def test_mode_and_gradients_are_as_before():
    model = make_model().train()
    iterator = iter_generate(model, prompt(1), max_new_tokens=5)
    next(iterator)
    assert model.training and torch.is_grad_enabled()
    iterator.close()
    tokens = generate(model, prompt(), max_new_tokens=2)
    assert model.training and not tokens.requires_grad
    assert all(buffer.sum() == 0 for name, buffer in model.named_buffers() if "load_" in name)


def test_wrong_settings_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="--temperature"):
        generate(model, prompt(), max_new_tokens=1, temperature=-1.0)
    with pytest.raises(ValueError, match="--top-k"):
        generate(model, prompt(), max_new_tokens=1, top_k=-1)
    with pytest.raises(ValueError, match="one row"):
        list(iter_generate(model, prompt(), max_new_tokens=1))
