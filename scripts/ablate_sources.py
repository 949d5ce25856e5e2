"""Does the adaptive mixture do what it says? Runs over planted sources, each against its placebo.

    python scripts/ablate_sources.py --seeds 1 2 3 --output bench/results/adaptive_sources_cpu.json

Three sources with equal weights: `noise` (words drawn at random from a list: nothing to learn once
the list is known), `easy` (one short template, learned in a few steps), `hard` (documentation
and books: learned slowly, but learned). Arms, equal in tokens, seeds and everything else: weights
as asked for, by progress, by excess over a reference run, by raw loss, and progress with the
signals dealt to the wrong sources. Reported: factors over the second half of each run, shares of
the tokens, and bits per byte of text of each source that no run has read.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.soak import code_version, machine_text
from training.build import build_trainer
from training.build_data import build_tokenizer
from training.config.cli import parse_args
from training.data import text_batches
from training.evaluation import evaluate_bpb
from training.sources.base import split_of
from training.sources.embedded import EmbeddedCorpus
from training.tokenizer import Tokenizer

SOURCES = ("noise", "easy", "hard")
NOISE_WORDS = 512
DOCUMENTS = 900
CHARACTERS = 1800  # of a document
HELD_OUT_CHARACTERS = 40_000
ADAPTIVE = ("--aux-enable-adaptive-sources", "--aux-adaptive-signal")
FIRST_ARM = "as asked for"
ARMS = {
    FIRST_ARM: (),
    "progress": (*ADAPTIVE, "progress"),
    "progress, signals shuffled": (*ADAPTIVE, "progress", "--aux-adaptive-shuffled"),
    "excess": (*ADAPTIVE, "excess"),
    "raw": (*ADAPTIVE, "raw"),
}
FLAGS = """
--no-require-cuda --device cpu --no-torch-compile --tokenizer-name assets-4k
--d-model 64 --n-heads 2 --n-layers 2 --mamba-ratio 0 --attention-ratio 1 --kv-latent-dim 16
--rope-dim 8 --mamba-head-dim 32 --mamba-d-state 16 --mamba-chunk-len 32 --mimo-rank 1
--d-ff 128 --n-routed-experts 0 --no-rib-router-enabled
--seq-len 64 --batch-size 8 --optimizer muon --lr 0.02 --adam-lr 0.02 --gn-ns-steps 3
--warmup-steps 20 --warmdown-fraction 0.6 --log-interval 10 --save-interval 100000
--max-checkpoints 2 --eval-interval 0 --sample-interval 0 --integrity-hidden-eval-every 0
--data-backend local --spool-max-mb 0 --dedup-window-size 0 --near-dedup-window 0
--no-quality-filter --no-contamination-check --source-read-timeout-sec 600 --num-workers 0
--stream-shuffle-buffer 64 --aux-adaptive-interval-tokens 32768 --aux-adaptive-smoothing 0.5
"""


def write_sources(folder: Path) -> tuple[Path, dict[str, str]]:
    """The source list's file, and held-out text of each source."""
    texts = {name: source_texts(name) for name in SOURCES}
    entries = []
    for name, (documents, _) in texts.items():
        (folder / name).mkdir()
        for number, text in enumerate(documents):
            (folder / name / f"{number:04}.txt").write_text(text, encoding="utf-8")
        entries.append({"type": "text", "path": str(folder / name), "name": name})
    path = folder / "sources.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path, {name: held_out for name, (_, held_out) in texts.items()}


def source_texts(name: str) -> tuple[list[str], str]:
    """Documents to train on, and text to measure on."""
    generator = np.random.default_rng(11)
    held_out_generator = np.random.default_rng(12)
    if name == "hard":
        sides: dict[str, list[str]] = {"train": [], "validation": []}
        for document in EmbeddedCorpus().documents():
            sides[split_of(document.id)].append(document.text)
        generator.shuffle(sides["train"])
        whole = "\n\n".join(sides["train"])[: DOCUMENTS * CHARACTERS]
        documents = [whole[at : at + CHARACTERS] for at in range(0, len(whole), CHARACTERS)]
        held_out_generator.shuffle(sides["validation"])
        return documents, "\n\n".join(sides["validation"])[:HELD_OUT_CHARACTERS]
    if name == "easy":
        return [template(generator) for _ in range(DOCUMENTS)], template(held_out_generator)
    words = noise_words(Tokenizer.from_name("assets-4k"))
    return [noise(generator, words) for _ in range(DOCUMENTS)], noise(held_out_generator, words)


def noise_words(tokenizer: Tokenizer) -> list[str]:
    """Words that are one token each, so that nothing within a word is left to learn."""
    pieces = tokenizer.pieces()
    return [piece[1:] for piece in pieces if re.fullmatch(" [a-z]{3,}", piece)][:NOISE_WORDS]


def noise(generator: np.random.Generator, words: list[str]) -> str:
    """Words drawn evenly and each by itself, so that knowing the text before one says nothing about
    it."""
    return " " + " ".join(generator.choice(words, CHARACTERS // 6))


def template(generator: np.random.Generator) -> str:
    """Lines that differ in nothing but a colour, about CHARACTERS characters of them."""
    colours = generator.choice(["red", "green", "blue"], CHARACTERS // 24)
    return "\n".join(f"The colour is {colour} here." for colour in colours)


def run_arm(
    flags: tuple[str, ...], held_out: dict[str, str], directory: Path, *, seed: int, steps: int
) -> dict[str, Any]:
    """Train once; factors, shares and held-out bits per byte by source."""
    config = parse_args(
        [*FLAGS.split(), "--seed", str(seed), "--steps", str(steps), *flags,
         "--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")]
    )  # fmt: skip
    trainer = build_trainer(config)
    trainer.fit()
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] > steps // 2]
    tokenizer = build_tokenizer(config)
    result: dict[str, Any] = {"factor": {}, "share": {}, "held_out_bpb": {}}
    for name in SOURCES:
        batches = text_batches(held_out[name], tokenizer=tokenizer, seq_len=128, batch_size=16)
        measured = evaluate_bpb(trainer.model, batches, device="cpu")
        factors = [row.get(f"source_weight_{name}", 1.0) for row in rows]
        result["factor"][name] = round(statistics.mean(factors), 4)
        result["share"][name] = round(rows[-1][f"data_source_fraction_{name}"], 4)
        result["held_out_bpb"][name] = round(measured.bpb, 4)
    return result


def run_seed(seed: int, *, steps: int, arms: list[str]) -> dict[str, dict[str, Any]]:
    """All arms with one seed; the reference of `excess` is the run with the weights asked for."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="sigma_sources_") as directory:
        return _run_arms(Path(directory), seed=seed, steps=steps, arms=arms)


def _run_arms(home: Path, *, seed: int, steps: int, arms: list[str]) -> dict[str, dict[str, Any]]:
    source_list, held_out = write_sources(home)
    results: dict[str, dict[str, Any]] = {}
    for number, (name, flags) in enumerate(ARMS.items()):
        if name not in arms:
            continue
        extra = ("--source-list", str(source_list))
        if name == "excess":
            extra += ("--aux-adaptive-reference", str(home / "0" / "checkpoints"))
        directory = home / str(number)
        results[name] = run_arm((*flags, *extra), held_out, directory, seed=seed, steps=steps)
        print(json.dumps({"seed": seed, "arm": name, **results[name]}), flush=True)
    return results


def summary(runs: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over the seeds, and the held-out gain of each arm over the weights asked for."""
    table: dict[str, Any] = {}
    for arm in next(iter(runs.values())):
        table[arm] = {
            figure: {
                name: round(statistics.mean(run[arm][figure][name] for run in runs.values()), 4)
                for name in SOURCES
            }
            for figure in ("factor", "share", "held_out_bpb")
        }
        table[arm]["hard_bpb_below_as_asked_for"] = [
            round(run[FIRST_ARM]["held_out_bpb"]["hard"] - run[arm]["held_out_bpb"]["hard"], 4)
            for run in runs.values()
        ]
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=600)
    others = [name for name in ARMS if name != FIRST_ARM]
    parser.add_argument("--arms", nargs="+", choices=others, default=others, metavar="ARM")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    run = functools.partial(run_seed, steps=options.steps, arms=[FIRST_ARM, *options.arms])
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = dict(zip(options.seeds, pool.map(run, options.seeds), strict=True))
    report = {
        "what": "adaptive mixture over planted sources with equal weights, "
        f"{options.steps} steps of 512 tokens; factors over the second half of a run",
        "arms": summary(runs),
        "runs": {str(seed): run for seed, run in runs.items()},
        "seconds": round(time.monotonic() - start),
        "code": code_version(),
        "machine": f"{machine_text()}, 1 thread, torch {torch.__version__}",
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
