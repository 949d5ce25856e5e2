"""Architecture search against random search at equal compute, on the embedded corpus.

    python scripts/bench_fractal_search.py --seeds 3 --json bench/results/fractal_search_cpu.json

Three arms per seed, each with the same operations: the search (children keep their parent's
function), random search (same halving, every genome anew), and the reference network trained alone
with all of it, which asks whether searching pays at all. The probe text is that of the search; the
judgement is on validation text that no arm has seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from evolution.fractal_nas import FractalSearch, pareto_front
from model.sigma_llm import SigmaLLM
from scripts.bench_common import cpu_name, load_average
from scripts.paired import compare
from training.arch_nursery import ModelNursery
from training.build_data import build_corpus, build_tokenizer
from training.config.cli import parse_args
from training.config.sigma_config import SigmaConfig
from training.data import validation_batches
from training.evaluation import evaluate_bpb
from training.modes.arch_search import open_nursery, reference_genome, search_settings
from training.runtime.environment import configure_threads, prepare_caches, versions

ARGUMENTS = (
    "--fractal-arch-search --device cpu --no-require-cuda --no-torch-compile --instant-mode off "
    "--tokenizer-name assets-4k --seq-len 64 --batch-size 4 --d-model 64 --n-heads 2 "
    "--mamba-ratio 1 --attention-ratio 1 --kv-latent-dim 32 --rope-dim 16 --mamba-head-dim 32 "
    "--mamba-d-state 16 --mamba-chunk-len 32 --mimo-rank 1 --d-ff 96 --n-shared-experts 1 "
    "--n-routed-experts 4 --moe-top-k 2 --router-balance-lr 0.01 --no-rib-router-enabled "
    "--optimizer muon --lr 0.02 --adam-lr 0.01 --gn-ns-steps 3 --warmup-steps 5 "
    "--probe-batch-size 32 --probe-batches 1"
).split()
VALIDATION_TOKENS = 16384
ARMS = ("search", "random", "reference")


def run_search(config: SigmaConfig, nursery: ModelNursery, *, inherit: bool) -> dict[str, Any]:
    """One search to its end; what it found and the curve of its best probe loss."""
    settings = search_settings(config, nursery, inherit=inherit)
    search = FractalSearch(settings, nursery.base, nursery)
    curve = []
    while not search.finished:
        generation = search.generation
        search.advance()
        if search.generation > generation:
            curve.append({"flops": search.spent, "probe_loss": search.best().loss})
    best = search.best()
    return {
        "networks": len(search.archive),
        "spent_flops": search.spent,
        "best": best.to_dict() | {"as_text": str(best.genome)},
        "curve": curve,
        "pareto_front": [
            {"genome": str(c.genome), "probe_loss": c.loss, "bytes": c.cost.bytes,
             "flops": c.cost.flops, "latency_us": nursery.latency_us(c.genome)}
            for c in pareto_front(search.archive)
        ],
    } | _validated(config, nursery, best.number, best.loss)  # fmt: skip


def run_reference(config: SigmaConfig, nursery: ModelNursery) -> dict[str, Any]:
    """All compute on the network that the budget is measured by."""
    genome = reference_genome(nursery.base)
    nursery.found(0, genome)
    loss, flops = nursery.train(0, flops=search_settings(config, nursery).budget)
    return {"spent_flops": flops, "best": {"as_text": str(genome)}} | _validated(
        config, nursery, 0, loss
    )


def _validated(
    config: SigmaConfig, nursery: ModelNursery, number: int, loss: float
) -> dict[str, Any]:
    tokenizer = build_tokenizer(config)
    model = SigmaLLM(nursery.genome(number).network(nursery.base))
    model.load_state_dict(nursery.weights(number))
    batches = validation_batches(
        build_corpus(config, tokenizer),
        seq_len=config.data.seq_len,
        batch_size=64,
        max_tokens=VALIDATION_TOKENS,
    )
    result = evaluate_bpb(model, batches, device="cpu")
    return {"probe_loss": loss, "validation_bpb": result.bpb, "validation_loss": result.loss}


def run_arm(arm: str, *, seed: int, steps: int) -> dict[str, Any]:
    """The result of "search", "random" or "reference", with `cpu_s`, the process's seconds;
    KeyError else."""
    config = parse_args([*ARGUMENTS, f"--seed={seed}", f"--steps={steps}"])
    nursery = open_nursery(config, torch.device("cpu"))
    start = time.process_time()
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "search": lambda: run_search(config, nursery, inherit=True),
        "random": lambda: run_search(config, nursery, inherit=False),
        "reference": lambda: run_reference(config, nursery),
    }
    result = runs[arm]()
    return {"arm": arm, "seed": seed, "cpu_s": time.process_time() - start} | result


def comparisons(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The search less each other arm, paired by seed, in validation bits per byte."""
    by_arm = {
        arm: {run["seed"]: run["validation_bpb"] for run in runs if run["arm"] == arm}
        for arm in ARMS
    }
    result = {}
    for other in ARMS[1:]:
        seeds = sorted(by_arm["search"].keys() & by_arm[other].keys())
        if len(seeds) > 1:
            pair = [[by_arm[arm][seed] for seed in seeds] for arm in ("search", other)]
            result[f"search less {other}, bpb"] = compare(*pair).to_dict()
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Architecture search against random search.")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; 3")
    parser.add_argument("--first-seed", type=int, default=1, help="the first of them; 1")
    parser.add_argument("--steps", type=int, default=800, help="budget in reference steps; 800")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms to run, by commas")
    parser.add_argument("--json", type=Path, required=True, help="file of the results; added to")
    options = parser.parse_args(argv)
    prepare_caches()
    configure_threads()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"steps": options.steps, "arguments": " ".join(ARGUMENTS), "runs": []}
    if options.json.is_file():
        report = json.loads(options.json.read_text(encoding="utf-8"))
        if report["steps"] != options.steps or report["arguments"] != " ".join(ARGUMENTS):
            print(f"error: {options.json} holds another bench: use a new file", file=sys.stderr)
            return 2
    done = {(run["arm"], run["seed"]) for run in report["runs"]}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in options.arms.split(","):
            if (arm, seed) in done:
                continue
            report["runs"].append(run_arm(arm, seed=seed, steps=options.steps))
            write_report(report, options.json)
            last = report["runs"][-1]
            print(f"{arm} {seed}: {last['validation_bpb']:.4f} bpb, {last['cpu_s']:.0f} s")
    write_report(report, options.json)
    return 0


def write_report(report: dict[str, Any], path: Path) -> None:
    """What is known so far, with what it was measured on."""
    report["machine"] = {"cpu": cpu_name(), "load": load_average(), "threads": 1}
    report["date"], report["versions"] = datetime.now(UTC).date().isoformat(), versions()
    report["comparisons"] = comparisons(report["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    sys.exit(main())
