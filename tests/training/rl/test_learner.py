"""A tick of RL: what moves weights and what does not, which labels it may know, exact resume."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.training.rl.small_learner import (
    AllPass,
    AsciiFirst,
    OddBytes,
    seeds,
    small_learner,
    small_model,
    weights_of,
)
from training.rl.rollout import sample
from training.rl.votes import majority_vote


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def ticked(learner, count=1, **options):
    return [learner.tick(seed=seed, **options) for seed in seeds(count)]


MODES = ("cispo", "dispo", "gspo", "igrpo")


@pytest.mark.parametrize("mode", MODES)
def test_permuted_rewards_are_another_update(mode):
    """X4 end to end: the same completions, the same rewards, dealt out anew inside each group."""
    ends = []
    for placebo in ("none", "permuted"):
        learner = small_learner(mode=mode, update={"main": mode}, candidates={"placebo": placebo})
        result = ticked(learner)[0]
        assert result.metrics["sigma_rl_policy_grad_norm"] > 0.0
        ends.append((weights_of(learner), result.metrics["ttrl_reward_mean"]))
    assert not same(ends[0][0], ends[1][0])
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-6)
    again = small_learner(mode=mode, update={"main": mode})
    ticked(again)
    assert same(weights_of(again), ends[0][0])


@pytest.mark.parametrize("mode", [*MODES, "mix"])
def test_equal_rewards_move_nothing_and_count_nothing(mode):
    own = {"mode": "cispo", "mix_floor": 0.1} if mode == "mix" else {"mode": mode}
    learner = small_learner(
        verifier=AllPass(),
        update={"main": own["mode"], "kl_weight": 0.1, "entropy_weight": 0.1},
        **own,
    )
    before = weights_of(learner)
    for result in ticked(learner, 3):
        assert result.effects["sigma_rl"] == 0 and result.effects.get("rl_auto_mix", 0) == 0
        assert result.effects["verifier"] > 0
        assert result.metrics["sigma_rl_policy_grad_norm"] == 0.0
    assert same(weights_of(learner), before)


def test_a_group_without_variance_leaves_no_trace_in_the_others_update():
    """Two tasks, of which one has equal rewards: the update is that of the other task alone."""
    learner, alone = small_learner(), small_learner()
    made = learner.maker.make(
        [learner.sampler.draw() for _ in range(2)], pass_rate=1.0, seed=1, refine=False
    )
    made.rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    (batch,) = learner._batches(made, seed=0)
    assert batch.advantages.tolist() == pytest.approx([1.0, -1.0, -1.0, 1.0], abs=1e-5)
    learner.update.step([batch], blend={"cispo": 1.0}, weight=1.0)
    single = copy.copy(batch)
    single.rollout = made.rollout.select(range(4))
    alone.update.step([single], blend={"cispo": 1.0}, weight=1.0)
    assert same(weights_of(learner), weights_of(alone))


def test_rewards_alone_teach():
    """An ASCII sign at the beginning is rewarded; after 30 ticks most completions have one."""
    learner = small_learner(
        verifier=AsciiFirst(), tasks=8, candidates={"group_size": 8, "max_new_tokens": 2}
    )
    rates = [result.metrics["ttrl_raw_reward_mean"] for result in ticked(learner, 30)]
    assert sum(rates[:3]) / 3 < 0.7 and sum(rates[-5:]) / 5 > 0.85


def test_random_rewards_teach_nothing():
    learner = small_learner(
        verifier=AsciiFirst(),
        tasks=8,
        candidates={"group_size": 8, "max_new_tokens": 2, "placebo": "random"},
    )
    rates = [result.metrics["ttrl_raw_reward_mean"] for result in ticked(learner, 30)]
    assert sum(rates[-5:]) / 5 < 0.8


class Inverted(OddBytes):
    def passes(self, text):
        return not super().passes(text)


def test_majority_labels_do_not_look_at_verdicts(monkeypatch):
    """The opposite verdicts, the same weights; with verifier labels the weights differ."""
    monkeypatch.setattr(
        "training.rl.candidates.extract_answer", lambda text, task: str(sum(text.encode()) % 3)
    )
    for mode, equal in (("majority", True), ("verifier", False)):
        ends = []
        for verifier in (OddBytes(), Inverted()):
            learner = small_learner(
                verifier=verifier,
                mode="igrpo",
                mix_floor=0.1,
                update={"main": "igrpo"},
                candidates={
                    "label_mode": mode, "majority_min_share": 0.0, "asym": True,
                    "pool_multiplier": 3.0, "topk": 6, "refine_iters": 2,
                },
            )  # fmt: skip
            results = ticked(learner, 3)
            assert sum(result.effects["sigma_rl"] for result in results) > 0
            ends.append(weights_of(learner))
        assert same(*ends) == equal, mode


def test_the_group_of_a_pool_is_what_the_policy_learns_from():
    learner = small_learner(
        candidates={"asym": True, "pool_multiplier": 4.0, "topk": 8, "group_size": 4}
    )
    (result,) = ticked(learner)
    assert result.metrics["ttrl_asym_candidate_pool"] == 16.0
    assert result.metrics["ttrl_asym_verified_candidates"] == 8.0
    assert result.effects["asym_verify"] == 1 and result.effects["verifier"] == 32


def test_nothing_kept_out_counts_nothing():
    learner = small_learner(candidates={"asym": True, "pool_multiplier": 1.0, "topk": 8})
    assert ticked(learner)[0].effects["asym_verify"] == 0


def test_the_mix_counts_changes_that_an_update_used():
    learner = small_learner(
        mix_floor=0.1, eval_every=1, eval_tasks=4, update={"kl_weight": 0.01}, tasks=4
    )
    results = ticked(learner, 12)
    counted = [result.effects.get("rl_auto_mix", 0) for result in results]
    assert counted[0] == 1 and set(counted) <= {0, 1}
    weights = [[r.metrics[f"sigma_rl_mix_w_{mode}"] for mode in MODES] for r in results]
    assert all(min(row) >= 0.1 - 1e-9 and abs(sum(row) - 1.0) < 1e-9 for row in weights)
    assert len({tuple(row) for row in weights}) > 1
    for result in results:
        assert not math.isnan(result.metrics["sigma_rl_component_igrpo_loss"])


def test_the_looks_come_when_they_are_due():
    learner = small_learner(eval_every=3, eval_tasks=4)
    values = [result.metrics["task_val_pass"] for result in ticked(learner, 7)]
    assert [math.isnan(value) for value in values] == [True, True] + [False] * 5


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_learner_goes_on_to_the_bit(stop):
    options = {
        "mix_floor": 0.1, "eval_every": 2, "eval_tasks": 4, "budget_max": 4,
        "update": {"kl_weight": 0.02, "entropy_weight": 0.001},
        "candidates": {"asym": True, "pool_multiplier": 2.0, "topk": 6, "refine_iters": 1},
    }  # fmt: skip
    order = seeds(8)
    whole = small_learner(**options)
    for seed in order:
        expected = whole.tick(seed=seed, weight=0.5)
    first = small_learner(**options)
    for seed in order[:stop]:
        first.tick(seed=seed, weight=0.5)
    model = small_model(seed=9)
    model.load_state_dict(first.update.model.state_dict())
    resumed = small_learner(model, **options)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in order[stop:]:
        found = resumed.tick(seed=seed, weight=0.5)
    assert same(weights_of(whole), weights_of(resumed))
    assert repr(found) == repr(expected)


def test_no_global_randomness_and_no_mode_is_changed():
    learner = small_learner(mix_floor=0.1, eval_every=1, eval_tasks=4)
    learner.update.model.train()
    before = torch.get_rng_state()
    ticked(learner)
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in learner.update.model.modules())
    assert all(param.grad is None for param in learner.update.model.parameters())


def test_completions_are_sampled_by_the_model_as_it_is():
    """Old log-probabilities are those of the weights before the update: ratios start at 1."""
    learner = small_learner()
    (result,) = ticked(learner)
    assert result.metrics["sigma_rl_ratio"] == pytest.approx(1.0, abs=1e-4)
    again = learner.tick(seed=1)
    assert again.metrics["sigma_rl_ratio"] == pytest.approx(1.0, abs=1e-4)


def test_repeats_move_the_ratio():
    learner = small_learner(budget_min=4, budget_max=4, update={"lr": 3e-3})
    results = ticked(learner, 2)
    assert all(
        result.effects["sigma_rl"] == result.metrics["sigma_rl_updates"] for result in results
    )
    assert results[0].metrics["sigma_rl_updates"] > 1
    assert abs(results[0].metrics["sigma_rl_ratio"] - 1.0) > 1e-3


def test_no_memory_makes_the_tick_again_with_smaller_forwards(monkeypatch):
    whole, short = small_learner(), small_learner()
    expected = ticked(whole)[0]
    score = type(short.update).score

    def scarce(self, model, rollout):
        if len(rollout) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return score(self, model, rollout)

    monkeypatch.setattr(type(short.update), "score", scarce)
    found = ticked(short)[0]
    assert short.update.rows == 2
    assert found.metrics["ttrl_reward_mean"] == expected.metrics["ttrl_reward_mean"]
    for one, other in zip(weights_of(whole), weights_of(short)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert short.sampler.state_dict() == whole.sampler.state_dict()


def test_one_completion_too_many_is_said(monkeypatch):
    learner = small_learner()

    def never(self, model, rollout):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(type(learner.update), "score", never)
    before = weights_of(learner)
    with pytest.raises(torch.OutOfMemoryError):
        ticked(learner)
    assert same(before, weights_of(learner))


def test_a_gradient_that_is_not_finite_moves_nothing(monkeypatch):
    learner = small_learner()
    monkeypatch.setattr("training.rl.policy_update.nn.utils.clip_grad_norm_", lambda *a: math.nan)
    before = weights_of(learner)
    assert ticked(learner)[0].effects["sigma_rl"] == 0
    assert same(before, weights_of(learner))


def test_the_reference_is_copied_every_64_ticks():
    learner = small_learner(update={"kl_weight": 0.1})
    reference = learner.update.reference
    start = [param.clone() for param in reference.parameters()]
    ticked(learner, 3)
    assert same(start, list(reference.parameters()))
    assert not same(start, weights_of(learner))
    learner.update.num_ticks = 64
    moved = weights_of(learner)
    ticked(learner)
    assert same(moved, list(reference.parameters()))


def test_the_penalty_holds_the_policy_back():
    ends = []
    for weight in (0.0, 5.0):
        learner = small_learner(tasks=4, update={"kl_weight": weight, "lr": 3e-3})
        start = weights_of(learner)
        rollout = sample_of(learner)
        before = learner.update.score(learner.update.model, rollout)[0].detach()
        ticked(learner, 12)
        after = learner.update.score(learner.update.model, rollout)[0].detach()
        assert not same(start, weights_of(learner))
        ends.append(float((after - before).abs().mean()))
    assert ends[1] < 0.7 * ends[0]


def sample_of(learner):
    return sample(
        learner.update.model,
        [learner.maker.prompt_of(learner.sampler.draw()) for _ in range(8)],
        max_new_tokens=4,
        temperature=1.0,
        top_k=0,
        generator=torch.Generator().manual_seed(0),
        stop_ids=(),
        pad_id=0,
    )


def test_a_tick_of_votes_steps_as_far_as_its_clear_ones_reach(monkeypatch):
    """Two of four votes are clear: half a step."""
    turns = itertools.count()

    def vote(answers, *, min_share):
        found = majority_vote(["1", "1", "1"], min_share=min_share)
        return found if next(turns) % 2 else replace(found, label=None)

    monkeypatch.setattr("training.rl.candidates.majority_vote", vote)
    monkeypatch.setattr(
        "training.rl.candidates.extract_answer", lambda text, task: str(sum(text.encode()) % 2)
    )
    learner = small_learner(candidates={"label_mode": "majority"})
    result = learner.tick(seed=1, weight=0.5)
    assert result.effects["sigma_rl"] == 1 and result.metrics["ttrl_abstain_rate"] == 0.5
    (group,) = learner.update.optimizer.param_groups
    assert group["lr"] == pytest.approx(learner.update.settings.lr * 0.5 * 0.5)
