"""Do Hydra's adapters learn, each its domain, and what is left of it after a merge?

    python scripts/hydra_learns.py --json bench/results/hydra_learns_cpu.json --work runs/rl_learns

A model of each seed that has read the text of scripts/rl_text.py gets one adapter for sums and one
for differences. `verdicts` prefers what the
verifier passed, `permuted` learns from pairs made alike, of which a coin says which half is
the better one. Then every
adapter is examined on every domain, on held-out items, and so are the merges: TIES, DARE-TIES, and
the plain weighted mean of the products.

The file is written after every arm, and an arm that it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model.adapters import Adapter, attached
from model.sigma_llm import SigmaLLM
from scripts.bench_common import cpu_name, load_average
from scripts.paired import compare
from scripts.rl_text import FAMILIES, FixedLevels, byte_tokenizer, pretrained
from training.hydra.domain import AdapterSettings
from training.hydra.dpo import DPOSettings
from training.hydra.learner import Hydra, HydraSettings
from training.hydra.merge import MergeSettings, domain_weights, merge_products
from training.hydra.sources import Item, Source, TaskSource
from training.rl.rollout import sample
from training.rl.verifier import Verifier
from training.tokenizer import Tokenizer

WHAT = "Do adapters per domain learn, and what is left after a merge?"
ARMS = ("verdicts", "permuted")
UPDATES, GATE_EVERY, EXAM_ITEMS, EXAM_SAMPLES = 80, 40, 80, 8
SETTINGS = HydraSettings(
    tasks=64,
    max_new_tokens=10,
    gate_tasks=EXAM_ITEMS,
    adapter=AdapterSettings(lr=1e-3),
    dpo=DPOSettings(max_len=10),
)
MERGES = {
    "ties": MergeSettings(),
    "ties_half": MergeSettings(density=0.5),
    "dare_ties_half": MergeSettings(method="dare_ties", density=0.5),
}


class ExamLevel(TaskSource):
    """Tasks of the level that the text is unsure of."""

    GATE_LEVELS = (2,)


def sources_of(seed: int) -> dict[str, Source]:
    """Sums and differences."""
    return {
        family: ExamLevel(
            FixedLevels((family,), seed=seed),
            FixedLevels((family,), split="val", seed=seed),
            Verifier(code=False, timeout_ms=2500),
        )
        for family in FAMILIES
    }


def exam_items(seed: int) -> dict[str, list[Item]]:
    """Held-out tasks, which neither pairs nor gates are made of."""
    return {
        family: ExamLevel(
            FixedLevels((family,), seed=seed),
            FixedLevels((family,), split="test", seed=seed),
            Verifier(code=False, timeout_ms=2500),
        ).gate_items(EXAM_ITEMS)
        for family in FAMILIES
    }


def examine(
    hydra: Hydra, adapter: Adapter | None, items: dict[str, list[Item]]
) -> dict[str, dict[str, float]]:
    """Share of passing samples and of passing likeliest completions, by domain."""
    scores = {}
    for name, own in items.items():
        row = {}
        for kind, count, temperature in (("sampled", EXAM_SAMPLES, 0.8), ("greedy", 1, 0.0)):
            prompts = [
                [hydra.tokenizer.end_id, *hydra.tokenizer.encode(item.prompt)]
                for item in own
                for _ in range(count)
            ]
            with attached(hydra.model, adapter):
                rollout = sample(
                    hydra.model,
                    prompts,
                    max_new_tokens=SETTINGS.max_new_tokens,
                    temperature=temperature,
                    top_k=SETTINGS.top_k if temperature else 0,
                    generator=torch.Generator().manual_seed(11),
                    stop_ids=hydra.stop_ids,
                    pad_id=hydra.tokenizer.end_id,
                )
            texts = rollout.texts(hydra.tokenizer, stop_ids=hydra.stop_ids)
            spread = [item for item in own for _ in range(count)]
            rewards = hydra.sources[name].rewards(spread, texts, rng=random.Random(11))
            row[kind] = round(sum(reward == 1.0 for reward in rewards) / len(rewards), 4)
        scores[name] = row
    return scores


def teach(hydra: Hydra, *, seed: int) -> dict[str, Any]:
    """The updates, with a gate now and then; a curve and what the gates decided."""
    curve, looks = [], []
    for number in range(UPDATES):
        update = hydra.update(seed=1000 * seed + number)
        if number % 20 == 19:
            keys = ("hydra_loss", "hydra_train_pairs", "hydra_candidate_pass_rate")
            curve.append({key: round(update.metrics[key], 4) for key in keys})
        if number % GATE_EVERY == GATE_EVERY - 1:
            for name, look in hydra.gate().items():
                figures = {"drop": round(look.drop, 4), "p_value": round(look.p_value, 5)}
                looks.append({"domain": name, "decision": look.decision.value, **figures})
    return {"curve": curve, "looks": looks, "counts": dict(hydra.counts)}


def merged_scores(hydra: Hydra, items: dict[str, list[Item]]) -> dict[str, Any]:
    """Scores of every merge, weighted by what each adapter gained on the gate's items."""
    gains = {}
    for name, domain in hydra.domains.items():
        own, base = hydra.examine(name, domain.adapter), hydra.examine(name, None)
        gains[name] = (sum(own) - sum(base)) / len(own)
    weights = domain_weights(gains)
    products = [domain.adapter.products() for domain in hydra.domains.values()]
    found: dict[str, Any] = {"weights": weights}
    for name, settings in MERGES.items():
        merged = merge_products(
            products, list(weights.values()), settings, generator=torch.Generator().manual_seed(5)
        )
        adapter, kept = hydra.factorised(merged.products)
        found[name] = examine(hydra, adapter, items)
        found[f"{name}_conflicts"] = round(merged.conflicts, 4)
        found[f"{name}_norm_kept"] = round(min(kept.values()), 4)
    shares = torch.tensor(list(weights.values()), dtype=torch.float64).view(-1, 1, 1)
    mean = {
        layer: (shares * torch.stack([own[layer].double() for own in products])).sum(0)
        / shares.sum()
        for layer in products[0]
    }
    found["mean"] = examine(hydra, hydra.factorised(mean)[0], items)
    return found


def run_arm(arm: str, model: SigmaLLM, tokenizer: Tokenizer, *, seed: int) -> dict[str, Any]:
    """Teach one set of adapters and examine them; `base` is the model without any."""
    started = time.process_time()
    placebo = "permuted" if arm == "permuted" else "none"
    settings = replace(SETTINGS, placebo=placebo)
    hydra = Hydra(model, tokenizer, sources_of(seed), settings, seed=seed)
    items = exam_items(seed)
    result: dict[str, Any] = {"base": examine(hydra, None, items)}
    result |= teach(hydra, seed=seed)
    result["adapters"] = {
        name: examine(hydra, domain.adapter, items) for name, domain in hydra.domains.items()
    }
    result["merges"] = merged_scores(hydra, items)
    hydra.close()
    result["cpu_s"] = round(time.process_time() - started, 1)
    return result


def summarize(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Gain over the model without adapters: mean and 95 % interval over seeds."""
    rows = []
    for arm in ARMS:
        done = [found[arm] for found in seeds.values() if arm in found]
        if len(done) < 2:
            continue
        readers = {f"adapter {name}": ("adapters", name) for name in done[0]["adapters"]}
        readers |= {f"merge {name}": ("merges", name) for name in (*MERGES, "mean")}
        for what, (group, key) in readers.items():
            for domain in done[0]["base"]:
                for score in ("sampled", "greedy"):
                    after = [run[group][key][domain][score] for run in done]
                    before = [run["base"][domain][score] for run in done]
                    gain = compare(after, before)
                    rows.append(
                        {
                            "arm": arm,
                            "what": what,
                            "domain": domain,
                            "score": score,
                            "start": round(statistics.fmean(before), 4),
                            "gain": round(gain.mean, 4),
                            "interval": [round(gain.low, 4), round(gain.high, 4)],
                            "seeds": gain.num_seeds,
                        }
                    )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="pretrained models")
    parser.add_argument("--seeds", default="0,1,2", metavar="NUMBERS")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": WHAT,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "threads": 1,
        "settings": repr(SETTINGS),
        "updates": UPDATES,
        "seeds": {},
    }
    if options.json.is_file():
        record["seeds"] = json.loads(options.json.read_text(encoding="utf-8"))["seeds"]
    tokenizer = byte_tokenizer()
    for seed in map(int, options.seeds.split(",")):
        own = record["seeds"].setdefault(str(seed), {})
        for arm in ARMS:
            if arm in own:
                continue
            model = pretrained(seed, tokenizer, directory=options.work, say=print)
            own[arm] = run_arm(arm, model, tokenizer, seed=seed)
            print(json.dumps({"seed": seed, "arm": arm, **own[arm]}), flush=True)
            record["date"] = datetime.now(UTC).isoformat(timespec="minutes")
            record |= {"summary": summarize(record["seeds"]), "load_after": load_average()}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
