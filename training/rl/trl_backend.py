"""GRPO updates by TRL's GRPOTrainer, one optimizer step at a time: `--grpo-backend trl`.

TRL writes the completions, scores them with our verifier, forms group advantages and the clipped
loss, and steps; `training.rl.objectives` is not involved. What stays ours: the weights (a
SigmaPolicy shares them), the optimizer and its state, the tasks, the verdicts, and the random
numbers, which come from a seed per update and leave every global generator as it was. So a resumed
run repeats an update exactly.

Differences from the internal objectives that follow from TRL: log-probabilities are taken at the
sampling temperature, and every update writes fresh completions. A step whose gradient is exactly
zero (every group has one reward and there is no KL term), or is not finite, is not taken: the
optimizer's momentum alone would move the weights otherwise.

Works with trl 0.24 and newer, and with any causal model of transformers. DeepSeekMath (GRPO),
2402.03300.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from training.rl.trl_classes import prepare_reference, trl_classes
from training.runtime.rng_state import capture_rng_state, restore_rng_state

# TRL's names of what it logged, and the columns they become.
LOGGED = {
    "reward": "grpo_reward_mean",
    "reward_std": "grpo_reward_std",
    "loss": "grpo_loss",
    "entropy": "grpo_entropy",
    "kl": "grpo_kl",
    "clip_ratio/region_mean": "grpo_clip_fraction",
    "grad_norm": "grpo_grad_norm",
    "frac_reward_zero_std": "grpo_zero_variance_fraction",
    "completions/mean_length": "grpo_completion_tokens",
}


class Verdict(Protocol):
    """The part of a verifier's judgement that becomes a reward."""

    @property
    def passed(self) -> bool: ...


class Verify(Protocol):
    """The strict verifier or its cascade."""

    def __call__(
        self, tasks: Sequence[Any], completions: Sequence[str], *, rng: random.Random
    ) -> Sequence[Verdict]: ...


@dataclass(slots=True, kw_only=True, frozen=True)
class TrlSettings:
    """Dials of the updates. kl_weight > 0 needs `use_reference` before the first update.

    prompts_per_update tasks with num_generations completions each make one optimizer step; the
    gradient is formed for one task at a time. Rewards are of a verdict; normalise: divide a group's
    advantages by their standard deviation.
    """

    num_generations: int = 8
    prompts_per_update: int = 1
    max_new_tokens: int = 24
    temperature: float = 0.8
    top_k: int = 40
    reward_success: float = 2.0
    reward_fail: float = -1.0
    clip_eps: float = 0.2
    kl_weight: float = 0.0
    grad_clip: float = 1.0
    normalise: bool = True
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ValueError(
                "--grpo-num-generations must be at least 2: a group of one has no advantage"
            )
        if self.reward_success <= self.reward_fail:
            raise ValueError("--grpo-reward-success must be above --grpo-reward-fail")
        if self.temperature <= 0.0:
            raise ValueError("--ttrl-temperature must be positive for --grpo-backend trl")


@dataclass(slots=True, kw_only=True, frozen=True)
class Sample:
    """One completion of the last update and what it was worth."""

    task: Any
    completion: str
    passed: bool
    reward: float


class VerifierReward:
    """A reward function in TRL's sense: verdicts on the completions of the tasks of one update."""

    __name__ = "verifier"

    def __init__(
        self,
        verify: Verify,
        settings: TrlSettings,
        *,
        read: Callable[[Sequence[Any], Sequence[Sequence[int]]], list[str]],
    ) -> None:
        self._verify = verify
        self._settings = settings
        self._read = read
        self._tasks: Sequence[Any] = ()
        self._rng = random.Random(0)
        self.samples: list[Sample] = []

    def begin(self, tasks: Sequence[Any], *, seed: int) -> None:
        """Start an update: its tasks, and the random stream of the verdicts' hidden inputs."""
        self._tasks, self._rng, self.samples = tasks, random.Random(seed), []

    def __call__(
        self,
        *,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        task: Sequence[int],
        **_: Any,
    ) -> list[float]:
        tasks = [self._tasks[number] for number in task]
        return self.judge(tasks, self._read(completions, completion_ids))

    def judge(self, tasks: Sequence[Any], texts: Sequence[str]) -> list[float]:
        """The rewards of completions, which are kept as samples."""
        verdicts = self._verify(tasks, texts, rng=self._rng)
        own, rewards = self._settings, []
        for task, text, verdict in zip(tasks, texts, verdicts, strict=True):
            reward = own.reward_success if verdict.passed else own.reward_fail
            rewards.append(reward)
            self.samples.append(
                Sample(task=task, completion=text, passed=verdict.passed, reward=reward)
            )
        return rewards


class TrlBackend:
    """One GRPOTrainer for a whole run; `update` is one of its optimizer steps."""

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        *,
        optimizer: torch.optim.Optimizer,
        verify: Verify,
        settings: TrlSettings,
        output_dir: Path,
        prompt_of: Callable[[Any], str] = lambda task: task.prompt,
        read: Callable[[Sequence[Any], Sequence[Sequence[int]]], list[str]] | None = None,
    ) -> None:
        """policy, tokenizer: a causal model of transformers and its tokenizer. The learning rate is
        that of the optimizer's groups. read: completions (and their ids) as the verifier's text.

        RuntimeError if TRL cannot be used; TRL makes `output_dir` and leaves it empty.
        """
        self.settings = settings
        self.steps_taken = 0
        self.steps_dropped = 0
        self._optimizer = optimizer
        self._prompt_of = prompt_of
        self._reward = VerifierReward(verify, settings, read=read or _as_written)
        config, trainer, printer = trl_classes()
        device = next(policy.parameters()).device
        if device.type == "cuda" and device.index:
            raise RuntimeError(
                f"--grpo-backend trl trains on the first GPU, but the model is on {device}: "
                "use --device cuda:0, and CUDA_VISIBLE_DEVICES to say which GPU that is"
            )
        with isolated_randomness(0):
            self._trainer = trainer(
                model=policy,
                reward_funcs=self._reward,
                args=_arguments(config, settings, device=device, output_dir=output_dir),
                train_dataset=_rows([""] * settings.prompts_per_update),
                processing_class=tokenizer,
                optimizers=(optimizer, KeepRate(optimizer)),
            )
        self._trainer.remove_callback(printer)

    @property
    def samples(self) -> list[Sample]:
        """What the last update judged."""
        return self._reward.samples

    def use_reference(self, policy: Any) -> None:
        """The model that the KL term measures from; it is neither trained nor copied."""
        prepare_reference(policy, temperature=self.settings.temperature)
        self._trainer.ref_model = policy.eval()

    def update(self, tasks: Sequence[Any], *, seed: int) -> dict[str, float]:
        """One optimizer step on `prompts_per_update` tasks; returns its metrics.

        The step clears the gradients it finds. Global random generators are left as they were.
        """
        if len(tasks) != self.settings.prompts_per_update:
            raise ValueError(
                f"an update takes {self.settings.prompts_per_update} tasks, not {len(tasks)}"
            )
        if self.settings.kl_weight > 0.0:
            if self._trainer.ref_model is None:
                raise ValueError("kl_weight needs a reference: call use_reference first")
            # Given to the trainer's constructor, it would look for the model's files by name.
            self._trainer.beta = self.settings.kl_weight
        self._reward.begin(tasks, seed=seed)
        self._trainer.train_dataset = _rows([self._prompt_of(task) for task in tasks])
        hook = self._optimizer.register_step_pre_hook(self._drop_empty_step)
        try:
            with isolated_randomness(seed):
                self._trainer.train()
        finally:
            hook.remove()
        return self._metrics()

    def check_reward(self, task: Any) -> None:
        """RuntimeError unless the task's solution earns the reward of success, silence the other.

        Shows before training that the verdicts arrive (on some systems a library's own reward is
        silently zero).
        """
        self._reward.begin([task], seed=0)
        found = self._reward.judge([task, task], [task.solution, ""])
        expected = [self.settings.reward_success, self.settings.reward_fail]
        if found != expected:
            raise RuntimeError(
                f"--grpo-backend trl: the reward of a solved and of an empty {task.family} task "
                f"must be {expected}, not {found}; the verifier does not work here"
            )

    def state_dict(self) -> dict[str, Any]:
        """Counters; the optimizer's state is kept by whoever made the optimizer."""
        return {"steps_taken": self.steps_taken, "steps_dropped": self.steps_dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_taken = int(state["steps_taken"])
        self.steps_dropped = int(state["steps_dropped"])

    def _drop_empty_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Take the gradients away from a step that has nothing to say."""
        del args, kwargs
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        largest = [gradient.abs().max().float() for gradient in gradients if gradient.numel()]
        size = float(torch.stack(largest).max()) if largest else 0.0
        if 0.0 < size < float("inf"):  # false for NaN
            self.steps_taken += 1
            return
        self.steps_dropped += 1
        optimizer.zero_grad(set_to_none=True)

    def _metrics(self) -> dict[str, float]:
        logged = next(row for row in self._trainer.state.log_history if "reward" in row)
        metrics = {ours: float(logged[name]) for name, ours in LOGGED.items() if name in logged}
        passed = [sample.passed for sample in self.samples]
        metrics["grpo_pass_rate"] = sum(passed) / len(passed)
        metrics["grpo_steps"] = float(self.steps_taken)
        metrics["grpo_dropped_steps"] = float(self.steps_dropped)
        return metrics


class KeepRate(LRScheduler):
    """A schedule that leaves the learning rates to whoever set them."""

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]


@contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Global generators seeded by `seed` inside the block, and as they were after it."""
    before = capture_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        restore_rng_state(before)


def _arguments(
    config: Any, settings: TrlSettings, *, device: torch.device, output_dir: Path
) -> Any:
    """GRPOConfig of one silent optimizer step that saves and reports nothing."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 1,
        "per_device_train_batch_size": settings.num_generations,
        "gradient_accumulation_steps": settings.prompts_per_update,
        "num_generations": settings.num_generations,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "epsilon": settings.clip_eps,
        "beta": 0.0,
        "loss_type": "grpo",
        "scale_rewards": "group" if settings.normalise else "none",
        "max_grad_norm": settings.grad_clip,
        "bf16": settings.bf16,
        "use_cpu": device.type == "cpu",
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    known = {field.name for field in fields(config)}
    if "max_prompt_length" in known:  # of 0.24, which would cut prompts
        options["max_prompt_length"] = None
    arguments = config(**options)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or transformers would spread the model over all of them
    return arguments


def _rows(prompts: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": prompts, "task": list(range(len(prompts)))})


def _as_written(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[str]:
    """The text that TRL decoded, of plain prompts or of conversations."""
    del completion_ids
    return [one if isinstance(one, str) else one[-1]["content"] for one in completions]
