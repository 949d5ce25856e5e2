"""GRPO steps through the real TRL: they are the defined gradient, they learn, they leave no trace.

Skipped where trl is not installed (it is in the CUDA lockfile; CI's lockfile does without it).
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from model.config import SigmaModelConfig
from model.hf_policy import SigmaPolicy
from model.sigma_llm import SigmaLLM
from scripts.prove_trl_steps import attempt, grpo_step, sft_step
from tests.trainable import patched
from training.rl.trl_backend import TrlBackend, TrlSettings
from training.rl.trl_sigma import SigmaTrlBackend, transformers_tokenizer
from training.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_name("assets-4k")


@dataclass
class Ask:
    prompt: str
    family: str = "add"
    solution: str = "22"


@dataclass
class Said:
    passed: bool


TASKS = [Ask("17+5="), Ask("3+104=")]
SETTINGS = TrlSettings(
    num_generations=4, prompts_per_update=2, max_new_tokens=3, temperature=1.0, top_k=0
)


def make_model(**changes) -> SigmaLLM:
    values = {
        "vocab_size": TOKENIZER.vocab_size,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "mamba_ratio": 1,
        "d_ff": 48,
        "n_routed_experts": 2,
        "mamba_head_dim": 16,
        "mamba_d_state": 16,
        "mimo_rank": 2,
        "kv_latent_dim": 16,
        "rope_dim": 8,
        "quant_mode": "none",
    }
    return patched(SigmaLLM(SigmaModelConfig(**(values | changes)).validate(), seed=3)).train()


def by_chance(tasks, completions, *, rng):
    """Verdicts that differ inside a group and follow from the generator alone."""
    return [Said(rng.random() < 0.5) for _ in completions]


def always(passed):
    return lambda tasks, completions, *, rng: [Said(passed) for _ in completions]


def make_backend(model, optimizer, tmp_path, *, verify=by_chance, settings=SETTINGS):
    return SigmaTrlBackend(
        model,
        TOKENIZER,
        optimizer=optimizer,
        verify=verify,
        settings=settings,
        output_dir=tmp_path / "trl",
    )


def adamw(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_step_is_the_gradient_of_the_defined_loss(tmp_path):
    """-mean_i mean_t A_i log pi(y_it), A = (r - mean) / (std + 1e-4), at the current weights."""
    model = make_model()
    seen: dict[str, list] = {"ids": [], "passed": []}

    def read(completions, completion_ids):
        seen["ids"] = [list(ids) for ids in completion_ids]
        return [""] * len(completion_ids)

    def verify(tasks, completions, *, rng):
        seen["passed"] = [rng.random() < 0.5 for _ in completions]
        return [Said(passed) for passed in seen["passed"]]

    end, lr = TOKENIZER.end_id, 0.5
    policy = SigmaPolicy.sharing(model, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    backend = TrlBackend(
        policy,
        transformers_tokenizer(TOKENIZER, stop_id=end),
        optimizer=torch.optim.SGD(policy.parameters(), lr=lr),
        verify=verify,
        settings=TrlSettings(
            num_generations=4, prompts_per_update=2, max_new_tokens=3, temperature=1.0, top_k=0,
            grad_clip=1e9,
        ),
        output_dir=tmp_path,
        read=read,
    )  # fmt: skip
    twin = copy.deepcopy(model).eval()
    before = weights(model)
    metrics = backend.update(TASKS, seed=5)
    rewards = torch.tensor([2.0 if passed else -1.0 for passed in seen["passed"]]).view(2, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    losses = []
    for number, ids in enumerate(seen["ids"]):
        prompt = [*TOKENIZER.encode(TASKS[number // 4].prompt)]
        logits = twin(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        losses.append(-advantages.flatten()[number] * log_probs.mean())
    torch.stack(losses).mean().backward()
    assert metrics["grpo_reward_mean"] == pytest.approx(float(rewards.mean()))
    for name, parameter in twin.named_parameters():
        moved = (before[name] - model.get_parameter(name)) / lr
        torch.testing.assert_close(moved, parameter.grad, atol=2e-5, rtol=1e-3, msg=name)


def test_it_learns_which_token_is_rewarded(tmp_path):
    model = make_model(n_routed_experts=0)
    with torch.no_grad():
        ids = torch.tensor([[TOKENIZER.end_id, *TOKENIZER.encode("17+5=")]])
        wanted = TOKENIZER.decode([int(model.eval()(ids).logits[0, -1].topk(4).indices[2])])
    settings = TrlSettings(num_generations=8, max_new_tokens=1, temperature=1.0, top_k=4)

    def verify(tasks, completions, *, rng):
        return [Said(text == wanted) for text in completions]

    optimizer = adamw(model, lr=3e-2)
    backend = make_backend(model, optimizer, tmp_path, verify=verify, settings=settings)
    rates = [backend.update([TASKS[0]], seed=seed)["grpo_pass_rate"] for seed in range(10)]
    assert rates[0] < 0.7 and sum(rates[-3:]) / 3 > 0.9
    assert backend.samples[0].completion == wanted and backend.samples[0].reward == 2.0


def test_an_update_leaves_nothing_but_the_step(tmp_path):
    model = make_model(quant_mode="bitnet_1_58", router_jitter_noise=0.3)
    backend = make_backend(model, adamw(model), tmp_path)
    model.embed.weight.grad = torch.full_like(model.embed.weight, 1e3)  # of the step before
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    before = weights(model)
    metrics = backend.update(TASKS, seed=7)
    assert not same(before, weights(model)) and metrics["grpo_steps"] == 1.0
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert metrics["grpo_grad_norm"] < 1e3


def test_a_run_that_is_continued_takes_the_same_steps(tmp_path):
    def start():
        model = make_model()
        optimizer = adamw(model)
        return model, optimizer, make_backend(model, optimizer, tmp_path)

    model, optimizer, backend = start()
    for seed in (1, 2):
        backend.update(TASKS, seed=seed)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), backend.state_dict()))
    backend.update(TASKS, seed=3)
    other, again, resumed = start()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    torch.manual_seed(99)
    assert resumed.update(TASKS, seed=3)["grpo_steps"] == 3.0
    assert same(weights(model), weights(other))


def test_equal_rewards_move_no_weight_whatever_the_momentum(tmp_path):
    model = make_model()
    optimizer = adamw(model)
    make_backend(model, optimizer, tmp_path).update(TASKS, seed=1)
    for passed in (True, False):
        before = weights(model)
        backend = make_backend(model, optimizer, tmp_path, verify=always(passed))
        metrics = backend.update(TASKS, seed=2)
        assert same(before, weights(model))
        assert metrics["grpo_steps"] == 0.0 and metrics["grpo_dropped_steps"] == 1.0
        assert metrics["grpo_reward_mean"] == (2.0 if passed else -1.0)


def test_a_gradient_that_is_not_finite_is_not_taken(tmp_path):
    model = make_model()
    backend = make_backend(model, adamw(model), tmp_path)
    before = weights(model)
    handle = model.final_norm.weight.register_hook(lambda grad: grad * float("nan"))
    assert backend.update(TASKS, seed=1)["grpo_dropped_steps"] == 1.0
    handle.remove()
    assert same(before, weights(model))
    assert backend.update(TASKS, seed=2)["grpo_steps"] == 1.0


def test_the_penalty_draws_back_to_the_reference(tmp_path):
    model = make_model()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0].get_parameter(next(iter(dict(model.blocks[0].named_parameters())))).mul_(
            3.0
        )
        model.embed.weight.add_(0.05 * torch.randn(model.embed.weight.shape))
    settings = TrlSettings(num_generations=4, max_new_tokens=3, kl_weight=1.0, top_k=0)
    backend = make_backend(
        model, adamw(model, lr=3e-3), tmp_path, verify=always(True), settings=settings
    )
    with pytest.raises(ValueError, match="use_reference"):
        backend.update(TASKS[:1], seed=1)
    kept = weights(reference)
    found = [backend.update(TASKS[:1], seed=1, reference=reference)["grpo_kl"] for _ in range(6)]
    assert found[0] > 0.0 and found[-1] < 0.7 * found[0]
    assert same(kept, weights(reference))


def test_a_reward_that_does_not_arrive_is_refused(tmp_path):
    model = make_model()

    def verify(tasks, completions, *, rng):
        return [Said(text == "22") for text in completions]

    make_backend(model, adamw(model), tmp_path, verify=verify).check_reward(TASKS[0])
    for passed in (True, False):
        broken = make_backend(model, adamw(model), tmp_path, verify=always(passed))
        with pytest.raises(RuntimeError, match="the verifier does not work"):
            broken.check_reward(TASKS[0])


def test_wrong_sizes_and_settings_are_refused(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="2 tasks"):
        make_backend(model, adamw(model), tmp_path).update(TASKS[:1], seed=0)
    for wrong in ({"num_generations": 1}, {"reward_fail": 2.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="--"):
            TrlSettings(**wrong)  # pyright: ignore[reportArgumentType]


def test_the_tokenizer_writes_and_reads_the_same_tokens():
    fast = transformers_tokenizer(TOKENIZER, stop_id=TOKENIZER.encode("\n")[0])
    text = "def f(x):\n    return x*3 <|unknown|> 17+5="
    assert fast(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text)
    assert fast("<|endoftext|>a")["input_ids"] == [TOKENIZER.end_id, *TOKENIZER.encode("a")]
    assert fast.eos_token_id == TOKENIZER.encode("\n")[0] and fast.pad_token_id == TOKENIZER.end_id


@pytest.mark.parametrize("step", [sft_step, grpo_step])
def test_a_model_of_transformers_kind_takes_a_step_of_either_trainer(step, tmp_path):
    found = attempt(step, device=torch.device("cpu"), folder=tmp_path)
    assert found["moved_weights"], found
    assert found["grad_norm"] > 0.0
