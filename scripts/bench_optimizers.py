"""Steps and seconds of every optimizer to one validation loss, each with its own learning rate.

    python scripts/bench_optimizers.py --preset small --out bench/results/optimizers_small_cpu.json
    python scripts/bench_optimizers.py --preset quickstart --seeds 1,2,3,4,5 --out FILE
    python scripts/bench_optimizers.py --preset quickstart --updates-only --out FILE

Every optimizer first runs its grid of learning rates with the first seed; a best value at the edge
of the grid extends it. What muon, soap and their like leave to AdamW moves at the rate found for
adamw, which therefore comes first. The best rate is then run with every seed. All runs of a seed
see the same weights and batches, the same schedule and length. The target is what `--target`
(default adamw) ends at with the same seed; another optimizer reaches it earlier, or never. Steps
are interpolated between evaluations. Seconds are of the process (CPU time), since the machine may
be shared. Finished runs stand in the output file and are not repeated: a stopped bench goes on.
Where an arm uses credit its probe text is held out of every arm's training text, and the time of
its probes counts as part of its update.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from model.sigma_llm import SigmaLLM
from scripts.bench_common import load_average
from scripts.update_peers import peer_optimizers, peer_versions
from training.build import build_evaluator, build_optimizer, build_probe
from training.build_data import build_corpus, build_tokenizer
from training.config.cli import parse_args
from training.config.sigma_config import SigmaConfig
from training.data import TokenCorpus, TokenStream
from training.instant import apply_instant
from training.optimizer import projection_names, takes_muon
from training.probe import Probe
from training.runtime.environment import keep_freed_memory
from training.schedule import step_factors

PROJECT = Path(__file__).resolve().parent.parent
COMMON = "--no-require-cuda --device cpu --no-torch-compile"
PRESETS = {
    "small": (
        f"{COMMON} --tokenizer-name assets-4k --d-model 48 --n-heads 3 --n-layers 2 "
        "--mamba-ratio 1 --attention-ratio 1 --kv-latent-dim 24 --rope-dim 8 --mamba-head-dim 32 "
        "--mamba-d-state 16 --mamba-chunk-len 32 --mimo-rank 1 --d-ff 144 --n-routed-experts 0 "
        "--seq-len 64 --batch-size 8 --steps 120 --warmup-steps 8 --warmdown-fraction 0.6 "
        "--eval-interval 15 --eval-tokens 4096 --galore-rank 12 --galore-refresh 50"
    ),
    "quickstart": f"@{PROJECT / 'profiles' / 'quickstart.txt'} {COMMON} --eval-interval 50",
}
MUON_GRID = (0.02, 0.04, 0.08)
ADAM_GRID = (0.006, 0.012, 0.024)
LION_GRID = (0.001, 0.002, 0.004)
# Name -> flags beside --optimizer, and where its learning rates are looked for.
ARMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "adamw": ("--optimizer adamw", ADAM_GRID),
    "muon": ("--optimizer muon --muon-iteration quintic", MUON_GRID),
    "muon-polar": ("--optimizer muon --muon-iteration polar-express", MUON_GRID),
    "normuon": ("--optimizer normuon", MUON_GRID),
    "adamuon": ("--optimizer adamuon", ADAM_GRID),
    "soap": ("--optimizer soap", ADAM_GRID),
    "lion": ("--optimizer lion", LION_GRID),
    "lion-bf16": ("--optimizer lion --lion-state-dtype bf16", LION_GRID),
    "galore-lion": ("--optimizer galore-lion", LION_GRID),
    "c3o": ("--optimizer c3o", MUON_GRID),
    "c3o-credit": ("--optimizer c3o --c3o-credit-enabled", MUON_GRID),
    "c3o-shuffled": ("--optimizer c3o --c3o-credit-enabled --c3o-credit-shuffled", MUON_GRID),
}
# Credit moves effort between blocks and leaves the mean of the factors at one: no grid of its own.
RATE_OF = {"c3o-credit": "c3o", "c3o-shuffled": "c3o"}
DEFAULT_ARMS = [arm for arm in ARMS if not arm.startswith("c3o")]
EXTENSION = 2.0
MAX_EXTENSIONS = 3
# Two-sided 95 % points of Student's t by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def arm_config(preset: str, arm: str, *, lr: float, seed: int, more: list[str]) -> SigmaConfig:
    """Settings of one run: the preset's flags, then `more`, then the arm's; later ones win, `lr`
    last."""
    flags = [*PRESETS[preset].split(), *more, *ARMS[arm][0].split()]
    return parse_args([*flags, "--lr", repr(lr), "--seed", str(seed)])


class Trial:
    """One training run: the trainer's update without its services, with a loss curve."""

    def __init__(
        self, config: SigmaConfig, corpus: TokenCorpus, vocab_size: int, probe: Probe | None
    ) -> None:
        self.config = config
        self.probe = probe
        self.model = SigmaLLM(config.model_config(vocab_size), seed=config.run.seed)
        apply_instant(self.model)
        self.optimizer = build_optimizer(config, self.model)
        self.stream = TokenStream(
            corpus,
            seed=config.run.seed,
            batch_size=config.data.batch_size,
            seq_len=config.data.seq_len,
        )
        self.evaluate = build_evaluator(config, corpus, torch.device("cpu"), say=print)
        self.seconds = {"train": 0.0, "optimizer": 0.0}

    def run(self) -> dict[str, Any]:
        """Curve of (step, bits per byte), CPU seconds; stops where the loss is not finite."""
        steps, interval = self.config.run.steps, self.config.eval.eval_interval
        torch.manual_seed(self.config.run.seed)
        self.model.train()
        curve: list[tuple[int, float]] = []
        for step in range(1, steps + 1):
            start = time.process_time()
            loss = self._step(step)
            self.seconds["train"] += time.process_time() - start
            if not math.isfinite(loss):
                break
            if step % interval == 0 or step == steps:
                bpb = self.evaluate(self.model)["eval_bpb"]
                assert bpb is not None, "no memory for the evaluation"
                curve.append((step, round(bpb, 5)))
        whole = bool(curve) and curve[-1][0] == steps and math.isfinite(curve[-1][1])
        return {
            "final_bpb": curve[-1][1] if whole else None,
            "curve": curve,
            "train_cpu_s": round(self.seconds["train"], 2),
            "optimizer_cpu_s": round(self.seconds["optimizer"], 2),
        }

    def _step(self, step: int) -> float:
        optim, total = self.config.optim, self.config.run.steps
        factor, decay = step_factors(step, total_steps=total, optim=optim)
        self.optimizer.set_schedule(lr_factor=factor, decay_factor=decay)
        batch = self.stream.next_batch()
        with self.model.weights_held():
            outputs = self.model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
            (outputs.loss + sum(outputs.aux.values())).backward()
        start = time.process_time()
        nn.utils.clip_grad_norm_(list(self.optimizer.parameters()), optim.grad_clip)
        self._update(step)
        self.seconds["optimizer"] += time.process_time() - start
        self.optimizer.zero_grad()
        return float(outputs.loss.detach())

    def _update(self, step: int) -> None:
        """The update, with a probe of it where credit is due, as the feature c3o_credit does."""
        own, model = self.config.c3o, self.model
        control, probe = self.optimizer.control, self.probe
        is_due = own.credit_enabled and (step - 1) % own.probe_interval == 0
        if not is_due or control is None or probe is None:
            self.optimizer.step()
            model.after_optimizer_step()
            return
        control.begin_probe()
        self.optimizer.step()
        model.after_optimizer_step()
        batch = probe.batch(control.num_probes)
        control.finish_probe(
            probe.gradient(model, batch)[1],
            evaluate=lambda: probe.loss(model, batch),
            generator=torch.Generator().manual_seed(step),
        )


class Bench:
    """Runs trials once each and keeps them in the output file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path: Path = options.out
        self.more: list[str] = options.flags.split()
        self.setting = f"{options.preset} {options.flags}".strip()
        self.result: dict[str, Any] = {"setting": self.setting, "runs": {}}
        if self.path.exists():
            self.result = json.loads(self.path.read_text(encoding="utf-8"))
            if self.result["setting"] != self.setting:
                raise SystemExit(f"--out {self.path} holds another setting; choose a new file")
        probed = [arm for arm in options.only.split(",") if arm in RATE_OF]
        config = self.config(probed[0] if probed else "adamw", lr=0.01, seed=0)
        tokenizer = build_tokenizer(config)
        self.vocab_size = tokenizer.vocab_size
        corpus = build_corpus(config, tokenizer)
        self.corpus, self.probe = build_probe(config, corpus, torch.device("cpu"))

    def config(self, arm: str, *, lr: float, seed: int) -> SigmaConfig:
        """Settings of a run whose companion AdamW has the best rate found for adamw alone, once
        there is one."""
        companion = self.result.get("best_lr", {}).get("adamw")
        rate = [] if companion is None else ["--adam-lr", repr(companion)]
        return arm_config(self.options.preset, arm, lr=lr, seed=seed, more=[*rate, *self.more])

    def final(self, arm: str, *, lr: float, seed: int) -> float:
        """Final bits per byte, infinite where the run broke; from the file if it stands there."""
        key = f"{arm} lr={lr:g} seed={seed}"
        runs = self.result["runs"]
        if key not in runs:
            config = self.config(arm, lr=lr, seed=seed)
            runs[key] = Trial(config, self.corpus, self.vocab_size, self.probe).run()
            print(key, runs[key]["final_bpb"], f"{runs[key]['train_cpu_s']} s", flush=True)
            self.save()
        found = runs[key]["final_bpb"]
        return math.inf if found is None else found

    def best_rate(self, arm: str, seed: int) -> float:
        """The learning rate with the lowest final loss; an edge of the grid is moved outwards."""
        if arm in RATE_OF and RATE_OF[arm] in self.result["best_lr"]:
            self.result["best_lr"][arm] = self.result["best_lr"][RATE_OF[arm]]
            return self.result["best_lr"][arm]
        rates = sorted(ARMS[arm][1])
        for _ in range(MAX_EXTENSIONS + 1):
            losses = {lr: self.final(arm, lr=lr, seed=seed) for lr in rates}
            best = min(losses, key=lambda lr: losses[lr])
            if best == rates[-1]:
                rates.append(rates[-1] * EXTENSION)
            elif best == rates[0]:
                rates.insert(0, rates[0] / EXTENSION)
            else:
                break
        shown = {f"{lr:g}": v if math.isfinite(v) else None for lr, v in sorted(losses.items())}
        self.result.setdefault("grids", {})[arm] = shown
        self.result.setdefault("best_lr", {})[arm] = best
        return best

    def save(self) -> None:
        """Write the whole result over the output file; ValueError when a figure is NaN or
        infinite."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.result, indent=1, allow_nan=False)
        self.path.write_text(text + "\n", encoding="utf-8")


def steps_to(curve: list[tuple[int, float]], target: float) -> float | None:
    """First step at which the curve is at or below the target, between its points by a line."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= target:
            if before is None or before[1] == value:
                return float(step)
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and half width of the 95 % interval of the mean (None for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": round(mean, 5), "half_width_95": None}
    width = T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": round(mean, 5), "half_width_95": round(width, 5)}


def summarize(bench: Bench, arms: list[str], seeds: list[int]) -> dict[str, Any]:
    """Per optimizer: final loss, steps and seconds to the targets, ratio to muon's steps."""
    runs, best = bench.result["runs"], bench.result["best_lr"]
    found = {arm: [runs[f"{arm} lr={best[arm]:g} seed={seed}"] for seed in seeds] for arm in arms}
    targets = [run["final_bpb"] for run in found[bench.options.target]]
    if None in targets:
        raise SystemExit(f"--target {bench.options.target}: a run of it ended without a loss")
    table: dict[str, Any] = {}
    for arm, arm_runs in found.items():
        reached = [steps_to(run["curve"], goal) for run, goal in zip(arm_runs, targets)]
        finals = [run["final_bpb"] for run in arm_runs if run["final_bpb"] is not None]
        per_step = [
            (run["train_cpu_s"] / run["curve"][-1][0], run["optimizer_cpu_s"] / run["curve"][-1][0])
            for run in arm_runs
            if run["curve"]
        ]
        hits = [steps for steps in reached if steps is not None]
        table[arm] = {
            "lr": best[arm],
            "final_bpb": interval(finals) if finals else None,
            "steps_to_target": [None if s is None else round(s, 1) for s in reached],
            "cpu_s_to_target": round(
                statistics.fmean(hits) * statistics.median(s for s, _ in per_step), 1
            )
            if len(hits) == len(seeds)
            else None,
            "step_cpu_ms": round(1e3 * statistics.median(s for s, _ in per_step), 1),
            "clip_and_update_cpu_ms": round(1e3 * statistics.median(o for _, o in per_step), 1),
        }
    _add_ratios(table)
    return {"target_bpb": targets, "target_of": bench.options.target, "table": table}


def _add_ratios(table: dict[str, Any]) -> None:
    """Steps against muon's, seed by seed, where both reached the target."""
    if "muon" not in table:
        return
    for row in table.values():
        pairs = zip(row["steps_to_target"], table["muon"]["steps_to_target"])
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs]
        row["steps_over_muon"] = interval(ratios) if ratios else None


def time_updates(bench: Bench, arms: list[str], *, rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of one update alone, all optimizers and their peers taking turns.

    "one by one": adamw and muon without buckets of equal tensors.
    """
    config = bench.config("adamw", lr=1e-4, seed=0)
    model = SigmaLLM(config.model_config(bench.vocab_size), seed=0)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn(param.shape, generator=generator)
    projections = projection_names(model)
    named = list(model.named_parameters())
    is_matrix = [takes_muon(*one, config.optim, projections=projections) for one in named]
    sources = peer_optimizers(
        [param for (_, param), taken in zip(named, is_matrix) if taken],
        [param for (_, param), taken in zip(named, is_matrix) if not taken],
    )
    for arm in arms:
        sources[arm] = build_optimizer(bench.config(arm, lr=1e-4, seed=0), model)
    for arm in {"adamw", "muon"} & set(arms):
        single = build_optimizer(bench.config(arm, lr=1e-4, seed=0), model)
        for part in single.parts:
            part.foreach = False
        sources[f"{arm}, one by one"] = single
    taken: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(rounds + 1):
        for name, source in sources.items():
            start = time.process_time()
            source.step()
            taken[name].append(1e3 * (time.process_time() - start))
    # The first round makes the state.
    return {name: round(statistics.median(times[1:]), 2) for name, times in taken.items()}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Steps of every optimizer to one validation loss.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--only", default=",".join(DEFAULT_ARMS), help="optimizers, by commas")
    parser.add_argument("--seeds", default="1,2,3", help="by commas; the first one runs the grids")
    parser.add_argument("--target", default="adamw", choices=sorted(ARMS))
    parser.add_argument("--flags", default="", help="further flags of train_sigma.py, quoted")
    parser.add_argument("--rounds", type=int, default=20, help="updates timed per optimizer")
    parser.add_argument("--updates-only", action="store_true", help="time single updates, no runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, continued if it exists")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    arms, seeds = options.only.split(","), [int(seed) for seed in options.seeds.split(",")]
    if unknown := set(arms) - set(ARMS):
        raise SystemExit(f"--only: no such optimizer: {', '.join(sorted(unknown))}")
    if options.target not in arms:
        raise SystemExit(f"--target {options.target} must be among --only")
    arms.sort(key=lambda arm: arm != "adamw")
    bench = Bench(options)
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {platform.system()}, {options.threads} thread(s)",
        "load": load_average(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | peer_versions(),
        "flags": [*PRESETS[options.preset].replace(str(PROJECT), ".").split(), *bench.more],
    }
    if options.updates_only:
        bench.result |= about
        bench.result["update_cpu_ms"] = time_updates(bench, arms, rounds=options.rounds)
        bench.save()
        print(json.dumps(bench.result["update_cpu_ms"], indent=1))
        return
    for arm in arms:
        bench.best_rate(arm, seeds[0])
    for seed in seeds:  # seed by seed, so that a change of the machine's load meets all of them
        for arm in arms:
            bench.final(arm, lr=bench.result["best_lr"][arm], seed=seed)
    bench.result |= about | {
        "seeds": seeds,
        "update_cpu_ms": time_updates(bench, arms, rounds=options.rounds),
        **summarize(bench, arms, seeds),
    }
    bench.save()
    print(json.dumps({"target_bpb": bench.result["target_bpb"], **bench.result["table"]}, indent=1))


if __name__ == "__main__":
    main()
