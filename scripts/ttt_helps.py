"""What test-time training is worth: bits per byte of two texts, learned from after each score.

    python scripts/ttt_helps.py --json bench/results/ttt_cpu.json

Small networks of three seeds read the embedded corpus. Then they score its validation split, and
Python source, which they have not met; with each scope and rate, with a placebo that learns from
the chunk's tokens in random order, and with the one temperature that hindsight would have chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import training.ttt
from model.sigma_llm import SigmaLLM
from scripts.ablation import Arm, Lane
from scripts.bench_common import cpu_name, load_average
from scripts.instant_bits import FLAGS
from scripts.paired import compare
from training.build_data import build_corpus, build_tokenizer
from training.data import IGNORED_LABEL, Batch, text_batches, validation_batches
from training.evaluation import bits_per_byte, evaluate_bpb
from training.runtime.environment import versions
from training.ttt import ChunkLearner, TTTSettings, evaluate_with_ttt

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SHAPE = {"seq_len": 128, "batch_size": 8}
RATES = (0.002, 0.02, 0.2)
SETTINGS = TTTSettings(chunk_tokens=4096)
TEMPERATURES = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4)


class OrderDestroyed(ChunkLearner):
    """Learns from the same tokens, each the label of one that it never followed."""

    def train(self, chunk: Sequence[Batch], *, rate: float) -> bool:
        random = torch.Generator().manual_seed(self.num_updates)
        changed = []
        for batch in chunk:
            order = torch.randperm(batch.input_ids.numel(), generator=random)
            ids = batch.input_ids.flatten()[order].view_as(batch.input_ids)
            changed.append(replace(batch, input_ids=ids, labels=ids.roll(-1, 1)))
        return super().train(changed, rate=rate)


def texts(config: Any, *, num_tokens: int) -> dict[str, list[Batch]]:
    """Batches of both texts, each of about so many tokens."""
    tokenizer = build_tokenizer(config)
    corpus = build_corpus(config, tokenizer)
    source = b"\n".join(path.read_bytes() for path in sorted((ROOT / "model").glob("*.py")))
    code = list(text_batches(source, tokenizer=tokenizer, **SHAPE))
    return {
        "validation split": list(validation_batches(corpus, max_tokens=num_tokens, **SHAPE)),
        "Python source": code[: max(1, num_tokens // (SHAPE["seq_len"] * SHAPE["batch_size"]))],
    }


@torch.no_grad()
def best_temperature(model: SigmaLLM, batches: Sequence[Batch]) -> dict[str, float]:
    """The temperature with the fewest bits, and those bits."""
    nats = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for batch in batches:
        logits = model(batch.input_ids, reset_mask=batch.reset_mask).logits.float().flatten(0, 1)
        labels = batch.labels.flatten()
        for place, temperature in enumerate(TEMPERATURES):
            nats[place] += torch.nn.functional.cross_entropy(
                logits / temperature, labels, ignore_index=IGNORED_LABEL, reduction="sum"
            )
    bits = [bits_per_byte(float(n), sum(b.num_bytes for b in batches)) for n in nats]
    best = min(range(len(bits)), key=bits.__getitem__)
    return {"temperature": TEMPERATURES[best], "bpb": bits[best]}


def judge(model: SigmaLLM, batches: Sequence[Batch]) -> dict[str, float]:
    """Bits per byte of every way."""
    model.eval()
    found = {"plain": evaluate_bpb(model, batches, device=CPU).bpb}
    found["best temperature"] = best_temperature(model, batches)["bpb"]
    for scope in training.ttt.SCOPES:
        for rate in RATES:
            settings = replace(SETTINGS, lr=rate, scope=scope)
            result = evaluate_with_ttt(model, batches, settings=settings, device=CPU)
            found[f"{scope}, {rate:g}"] = result.score.bpb
    own = training.ttt.ChunkLearner
    training.ttt.ChunkLearner = OrderDestroyed
    settings = replace(SETTINGS, lr=RATES[1], scope="all")
    found["placebo"] = evaluate_with_ttt(model, batches, settings=settings, device=CPU).score.bpb
    training.ttt.ChunkLearner = own
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=32768)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds: list[dict[str, dict[str, float]]] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            arm = Arm(name="run")
            lane = Lane(
                FLAGS.split(), arm, seed=seed, steps=options.steps, directory=Path(directory)
            )
            lane.advance(options.steps, clock=time.process_time)
            model = lane.trainer.model
            lane.close()
            given = texts(lane.trainer.config, num_tokens=options.tokens)
        seeds.append({name: judge(model, batches) for name, batches in given.items()})
        print(json.dumps(seeds[-1]), flush=True)
    record = {
        "what": (__doc__ or "").partition("\n")[0],
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": 1, "load": load_average()},
        "versions": versions(),
        "command": " ".join(["python scripts/ttt_helps.py", *sys.argv[1:]]),
        "flags": FLAGS.split(),
        "steps": options.steps,
        "tokens": options.tokens,
        "settings": repr(SETTINGS),
        "seeds": seeds,
        "less plain": {
            name: {
                way: compare(
                    [own[name][way] for own in seeds], [own[name]["plain"] for own in seeds]
                ).to_dict()
                for way in seeds[0][name]
                if way != "plain"
            }
            for name in seeds[0]
        },
    }
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    for name, ways in record["less plain"].items():
        for way, found in ways.items():
            low, high = found["interval"]
            print(f"{name}: {way} {found['mean']:+.4f} ({low:+.4f} to {high:+.4f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
