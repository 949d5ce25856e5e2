"""One tick of reinforcement learning: tasks, candidates, rewards, updates, and a look at task-val.

The tick is a function of its seed, of the weights and of this object's state, and of nothing else:
no clock, no global random state, no reported evaluation. So a resumed run ticks as the whole run
would have. A group in which all rewards are equal says nothing about the policy: it is left out of
the update, penalties included, and a tick of such groups moves no weight and counts nothing.

TTRL 2504.16084 (majority labels); the objectives' sources are named in objectives.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from training.rl.auto_mix import AutoMix
from training.rl.budget import RepeatBudget
from training.rl.candidates import CandidateMaker, Candidates
from training.rl.objectives import group_advantages
from training.rl.passed import Passed, passed_completions
from training.rl.policy_update import PolicyBatch, PolicyUpdate, UpdateReport
from training.rl.rollout import Rollout
from training.rl.tasks import TaskSampler
from training.rl.tick_metrics import diversity, tick_metrics
from training.runtime.memory_guard import clear_caches, is_out_of_memory

PASS_RATE_DECAY = 0.9
MIXED_MODES = ("igrpo", "dispo", "gspo", "cispo")


@dataclass(slots=True, kw_only=True, frozen=True)
class LearnerSettings:
    """tasks: per tick. eval_every: ticks between looks at `eval_tasks` validation tasks, 0 = never.
    mode: main objective; mix_floor: least weight in the mix of all four, None = the main one alone.
    """

    mode: str = "cispo"
    tasks: int = 1
    normalise: bool = True
    budget_min: int = 1
    budget_max: int = 4
    eval_every: int = 1
    eval_tasks: int = 16
    mix_floor: float | None = None


@dataclass(slots=True, kw_only=True)
class TickResult:
    """metrics: columns of the row. effects: what counts for each feature. passed:
    the completions that did."""

    metrics: dict[str, float] = field(default_factory=dict)
    effects: dict[str, int] = field(default_factory=dict)
    passed: list[Passed] = field(default_factory=list)


class Learner:
    """Teaches a model by what its completions earn. `sampler` draws training tasks, `val_sampler`
    the tasks that steer levels, the mix and the cascade, and that are never trained on."""

    def __init__(
        self,
        settings: LearnerSettings,
        *,
        maker: CandidateMaker,
        update: PolicyUpdate,
        sampler: TaskSampler,
        val_sampler: TaskSampler,
        refine: bool = True,
    ) -> None:
        self.settings = settings
        self.maker = maker
        self.update = update
        self.sampler = sampler
        self.val_sampler = val_sampler
        self.budget = RepeatBudget(lowest=settings.budget_min, highest=settings.budget_max)
        self.mix: AutoMix | None = None
        if settings.mix_floor is not None:
            self.mix = AutoMix(MIXED_MODES, main=settings.mode, floor=settings.mix_floor)
        self.num_ticks = 0
        self.pass_rate = 0.0
        self.task_val_pass = math.nan
        self._tokens = 0  # sampled since the last look at task-val
        self._stepped = False
        self._weights_used: dict[str, float] = {}
        self._refine = refine and "igrpo" in self._modes

    @property
    def _modes(self) -> tuple[str, ...]:
        return (self.settings.mode,) if self.mix is None else MIXED_MODES

    def tick(self, *, seed: int, weight: float = 1.0, budget_factor: float = 1.0) -> TickResult:
        """One tick whose steps are `weight` times as long as --sigma-rl-lr, and `budget_factor`
        times as many, within the budget's bounds.

        A tick that finds no memory before it has moved a weight is made again with half the
        completions per forward of the update.
        """
        before = (self.sampler.state_dict(), self.update.num_ticks)
        while True:
            try:
                return self._tick(seed=seed, weight=weight, budget_factor=budget_factor)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._stepped or not self._halve():
                    raise
            # Only here are the failed attempt's tensors free: the traceback held them.
            self.update.forget_gradients()
            clear_caches()
            self.sampler.load_state_dict(before[0])
            self.update.num_ticks = before[1]

    def _tick(self, *, seed: int, weight: float, budget_factor: float) -> TickResult:
        self._stepped = False
        rng = random.Random(seed)
        self.update.begin_tick()
        tasks = [self.sampler.draw() for _ in range(self.settings.tasks)]
        made = self.maker.make(
            tasks, pass_rate=self.pass_rate, seed=rng.getrandbits(62), refine=self._refine
        )
        mean_reward = float(made.rewards.mean())
        batches = self._batches(made, seed=rng.getrandbits(62))
        self._tokens += made.num_tokens
        blend, arm = self._blend(made, rng)
        repeats = self.budget.repeats(mean_reward, factor=budget_factor) if batches else 0
        if self._is_majority:
            # Adam gives a step its full length from one clear vote as from a tick full of them.
            weight *= sum(not group.vote.abstained for group in made.groups) / len(made.groups)
        reports: list[UpdateReport] = []
        for _ in range(repeats):
            reports.append(self.update.step(batches, blend=blend, weight=weight))
            self._stepped = self._stepped or reports[-1].applied
        self.budget.observe(mean_reward)
        result = TickResult(
            effects=self._effects(made, reports),
            passed=passed_completions(made, decode=self.maker.tokenizer.decode),
        )
        result.metrics = tick_metrics(made, reports, majority=self._is_majority)
        result.metrics["sigma_rl_updates"] = float(repeats)
        self._follow(made)
        self.finish_tick(result, rng=rng, arm=arm)
        return result

    def finish_tick(
        self, result: TickResult, *, rng: random.Random, arm: str | None = None
    ) -> None:
        """Count a tick, look at task-val where it is time to, and add the learner's own columns."""
        self.num_ticks += 1
        if self.settings.eval_every and self.num_ticks % self.settings.eval_every == 0:
            self._look(seed=rng.getrandbits(62), arm=arm)
        result.metrics |= self._own_metrics()

    @property
    def _is_majority(self) -> bool:
        return self.maker.settings.label_mode == "majority"

    def _batches(self, made: Candidates, *, seed: int) -> list[PolicyBatch]:
        """What is learned from: the groups with differing rewards, of both stages for igrpo."""
        found = []
        plain = tuple(mode for mode in self._modes if mode != "igrpo")
        if plain:
            found.append(self._live(made.rollout, made.rewards, plain))
        if "igrpo" in self._modes:
            rollout, rewards = self.maker.second_stage(made, pass_rate=self.pass_rate, seed=seed)
            found.append(self._live(rollout, rewards, ("igrpo",)))
        return [batch for batch in found if batch is not None]

    def _live(
        self, rollout: Rollout, rewards: Tensor, modes: tuple[str, ...]
    ) -> PolicyBatch | None:
        advantages = group_advantages(rewards, normalise=self.settings.normalise)
        live = (advantages != 0).any(1)
        if not bool(live.any()):
            return None
        rows = live.repeat_interleave(rewards.shape[1]).nonzero().flatten()
        return PolicyBatch(
            rollout=rollout.select(rows),
            advantages=advantages[live].flatten().to(rollout.completion_ids.device),
            modes=modes,
        )

    def _blend(self, made: Candidates, rng: random.Random) -> tuple[dict[str, float], str | None]:
        """Weight of each objective in this tick, and the drawn arm of the mix."""
        if self.mix is None:
            return {self.settings.mode: 1.0}, None
        rewards = made.rewards.clamp(0.0, 1.0)
        self.mix.start(
            mean_reward=float(rewards.mean()),
            variance=float(rewards.var(1, correction=0).mean()),
            diversity=diversity(made),
        )
        arm = self.mix.draw(rng)
        return self.mix.blend(arm), arm

    def _look(self, *, seed: int, arm: str | None) -> None:
        """Measure the pass rate on validation tasks and tell those that steer by it."""
        previous = self.task_val_pass
        families = self.sampler.families
        tasks = []
        for number in range(self.settings.eval_tasks):
            family = families[number % len(families)]
            tasks.append(self.val_sampler.draw(family=family, level=self.sampler.level(family)))
        judged = self.maker.examine(tasks, seed=seed)
        for family in families:
            verdicts = [j.passed for t, j in zip(tasks, judged) if t.family == family]
            self.sampler.observe_val(family, verdicts)
        self.task_val_pass = sum(j.passed for j in judged) / len(judged)
        if arm is not None and self.mix is not None and not math.isnan(previous):
            gain = self.task_val_pass - previous
            self.mix.observe(1000.0 * gain / max(1, self._tokens))
        self._tokens = 0

    def _follow(self, made: Candidates) -> None:
        judged = [j.passed for group in made.groups for j in group.judgements]
        rate = sum(judged) / len(judged)
        self.pass_rate = PASS_RATE_DECAY * self.pass_rate + (1.0 - PASS_RATE_DECAY) * rate

    def _effects(self, made: Candidates, reports: Sequence[UpdateReport]) -> dict[str, int]:
        """Effective calls of this tick by feature."""
        steps = sum(report.applied for report in reports)
        found = {
            "sigma_rl": steps,
            "verifier": sum(group.verified for group in made.groups) + made.num_refined,
            "asym_verify": int(any(group.kept_out for group in made.groups)),
            "verifier_cascade": int(made.decided_early > 0),
        }
        if self.mix is not None:
            weights = self.mix.weights()
            moved = sum(abs(w - self._weights_used.get(m, 0.0)) for m, w in weights.items())
            if moved > 1e-6 and any(report.applied and report.mixed for report in reports):
                found["rl_auto_mix"] = 1
                self._weights_used = weights
        return found

    def _own_metrics(self) -> dict[str, float]:
        cascade = self.maker.cascade
        row = self.maker.verifier.take_metrics() | {
            **({} if cascade is None else cascade.take_metrics()),
            "verifier_task_level": self.sampler.mean_level(),
            "task_val_pass": self.task_val_pass,
            "ttrl_budget": float(self.budget.value),
        }
        return row if self.mix is None else row | self.mix.metrics()

    def _halve(self) -> bool:
        """Half the completions per forward; False when there is but one."""
        rows = self.update.rows or self.settings.tasks * self.maker.settings.group_size
        if rows == 1:
            return False
        self.update.rows = max(1, rows // 2)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later ticks, besides the weights and the next seeds."""
        cascade = self.maker.cascade
        return {
            "update": self.update.state_dict(),
            "sampler": self.sampler.state_dict(),
            "val_sampler": self.val_sampler.state_dict(),
            "budget": self.budget.state_dict(),
            "mix": {} if self.mix is None else self.mix.state_dict(),
            "cascade": {} if cascade is None else cascade.state_dict(),
            "num_ticks": self.num_ticks,
            "rates": [self.pass_rate, self.task_val_pass],
            "tokens": self._tokens,
            "weights_used": dict(self._weights_used),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was off when the state was written starts fresh."""
        self.update.load_state_dict(state["update"])
        self.sampler.load_state_dict(state["sampler"])
        self.val_sampler.load_state_dict(state["val_sampler"])
        self.budget.load_state_dict(state["budget"])
        if self.mix is not None and state["mix"]:
            self.mix.load_state_dict(state["mix"])
        if self.maker.cascade is not None and state["cascade"]:
            self.maker.cascade.load_state_dict(state["cascade"])
        self.num_ticks = state["num_ticks"]
        self.pass_rate, self.task_val_pass = state["rates"]
        self._tokens = state["tokens"]
        self._weights_used = dict(state["weights_used"])

    def close(self) -> None:
        """End the verifier's processes; called once, also after a failure."""
        self.maker.verifier.close()
