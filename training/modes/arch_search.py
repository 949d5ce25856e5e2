"""`--fractal-arch-search`: find an architecture on the embedded corpus, in place of training.

`--steps` is the budget: what so many steps of the three-block network with the flags' widths take.
Everything is saved after every rung, so a stopped search goes on where it was. Writes into
`<output-dir>/fractal_search`: the resolved settings, `report.json`, `metrics.jsonl` (a row per
generation) and, under `best/`, the network found with its settings, and `args.txt`, which trains
such a network anew.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from evolution.fractal_nas import FractalSearch, SearchSettings, pareto_front
from evolution.genome import Genome, Letter, forward_flops, mixers
from model.config import SigmaModelConfig
from training.arch_nursery import TRAINING_FACTOR, ModelNursery, NurserySettings
from training.build import build_autocast
from training.build_data import build_corpus, build_tokenizer
from training.config.cli import to_args, write_resolved
from training.config.presets import without_secrets
from training.config.sigma_config import SigmaConfig
from training.data import TokenCorpus, TokenStream
from training.probe import Probe, hold_out, probe_batches
from training.runtime.atomic_io import FileOps, make_dirs, replace_file
from training.runtime.checkpoint import CheckpointStore
from training.runtime.crash_report import write_crash_report
from training.runtime.directories import check_directories
from training.runtime.environment import (
    config_hash,
    configure_threads,
    resolve_device,
    seed_everything,
)
from training.runtime.keep_awake import KeepAwake
from training.runtime.locks import RunLock
from training.runtime.reported_run import ReportedRun
from training.runtime.signals import StopRequest
from training.runtime.state_tree import join_state, split_state
from training.runtime.tensor_file import copy_to_host, encode_tensors

FOLDER = "fractal_search"
GROUP = "networks"


def run(config: SigmaConfig) -> int:
    """Search, or go on with a search, until the budget is spent or someone asks to stop."""
    check_directories(config, folder=FOLDER)
    device = resolve_device(config)
    configure_threads()
    seed_everything(config.run.seed)
    output_dir = Path(config.run.output_dir)
    nursery = open_nursery(config, device)
    search = FractalSearch(search_settings(config, nursery), nursery.base, nursery)
    store = open_store(config, nursery)
    if not config.run.no_resume:
        store.check_settings()
    with (
        RunLock(output_dir),
        closing(store.open()),
        StopRequest(output_dir) as stop,
        KeepAwake(),
        ReportedRun((nursery, store), report=lambda error: report_crash(config, search, error)),
    ):
        if not config.run.no_resume:
            restore(store, search, nursery)
        write_resolved(config, output_dir / FOLDER)  # those of a run there stay its own
        while not search.finished and not stop.requested:
            advance(search, nursery, store, output_dir=output_dir)
        if search.finished:
            finish(search, nursery, config)
            print(_sentences(search, output_dir))
        else:
            save(store, search, nursery)
            print(f"stopped after {search.trials} trials; the same command goes on")
    return 0


def report_crash(config: SigmaConfig, search: FractalSearch, error: Exception) -> Path | None:
    """The crash report of a search; its step is the number of trials."""
    if not config.run.crash_report_enabled:
        return None
    return write_crash_report(
        Path(config.run.output_dir),
        step=search.trials,
        error=error,
        last_metrics=(metrics_rows(search) or [{}])[-1],
        feature_state={},
        config_hash=config_hash(config),
    )


def open_nursery(config: SigmaConfig, device: torch.device) -> ModelNursery:
    """Networks of the flags' widths on the embedded corpus, less the probe text."""
    tokenizer = build_tokenizer(config)
    corpus, probe = split_probe(config, build_corpus(config, tokenizer), device)
    settings = NurserySettings(
        base=config.model_config(tokenizer.vocab_size).validate(),
        optim=config.optim,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        batch_size=config.data.batch_size,
        grad_accum_steps=config.data.grad_accum_steps,
        average_decay=config.ema.decay if config.ema.enabled else None,
        kernel_backend=config.precision.kernel_backend,
        scan_blocks=config.precision.scan_blocks(),
        pieces=tokenizer.pieces(),
    )
    stream = TokenStream(
        corpus,
        seed=config.run.seed,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
    )
    autocast = build_autocast(config, device)
    return ModelNursery(settings, stream=stream, probe=probe, device=device, autocast=autocast)


def split_probe(
    config: SigmaConfig, corpus: TokenCorpus, device: torch.device
) -> tuple[TokenCorpus, Probe]:
    """The text to train on, and the held-out part of the training text that decides."""
    own, seq_len = config.probe, config.data.seq_len
    rest, held_out = hold_out(corpus, num_tokens=own.batch_size * own.batches * seq_len)
    batches = probe_batches(
        held_out, corpus, batch_size=own.batch_size, num_batches=own.batches, seq_len=seq_len
    )
    return rest, Probe(batches, device=device, autocast=build_autocast(config, device))


def reference_genome(base: SigmaModelConfig) -> Genome:
    """Three blocks of the flags' mixers and widths: what a step of the budget is measured by."""
    kinds = mixers(base)
    return Genome(scales=(Letter(kind=kinds[0]), Letter(kind=kinds[-1])))


def search_settings(
    config: SigmaConfig, nursery: ModelNursery, *, inherit: bool = True
) -> SearchSettings:
    """Settings whose budget, in operations, is that of --steps of the reference network."""
    network = reference_genome(nursery.base).network(nursery.base)
    data = config.data
    tokens = data.batch_size * data.seq_len * data.grad_accum_steps
    step = TRAINING_FACTOR * forward_flops(network, seq_len=data.seq_len) * tokens
    return SearchSettings(
        budget=float(config.run.steps * step), seed=config.run.seed, inherit=inherit
    )


def open_store(config: SigmaConfig, nursery: ModelNursery) -> CheckpointStore:
    """The store of a search below --checkpoint-dir; a resume under flags that decide otherwise
    fails."""
    data, probe = config.data, config.probe
    own = {
        "steps": config.run.steps,
        "seed": config.run.seed,
        "seq-len": data.seq_len,
        "batch-size": data.batch_size,
        "grad-accum-steps": data.grad_accum_steps,
        "tokenizer-name": data.tokenizer_name,
        "probe-batch-size": probe.batch_size,
        "probe-batches": probe.batches,
        "ema-enabled": config.ema.enabled,
        "ema-decay": config.ema.decay,
        "precision": config.precision.precision,
        "no-amp": config.precision.no_amp,
        **asdict(config.optim),
        **nursery.base.to_dict(),
    }
    return CheckpointStore(
        Path(config.run.checkpoint_dir) / FOLDER,
        max_checkpoints=2,
        fingerprint={f"--{name.replace('_', '-')}": str(value) for name, value in own.items()},
    )


def save(store: CheckpointStore, search: FractalSearch, nursery: ModelNursery) -> None:
    """Keep search and networks under the number of trials, and wait; nothing if that is saved
    already."""
    if store.last_saved_step == search.trials:
        return
    tree = {"search": search.state_dict(), "nursery": nursery.state_dict()}
    tensors, plain = split_state(tree)
    store.save(search.trials, {GROUP: tensors}, {"tree": plain}, block=True)


def restore(store: CheckpointStore, search: FractalSearch, nursery: ModelNursery) -> None:
    """Go on from the newest checkpoint, if there is one."""
    checkpoint = store.load_newest()
    if checkpoint is None:
        return
    tree = join_state(checkpoint.tensors[GROUP], checkpoint.state["tree"])
    search.load_state_dict(tree["search"])
    nursery.load_state_dict(tree["nursery"])


def advance(
    search: FractalSearch, nursery: ModelNursery, store: CheckpointStore, *, output_dir: Path
) -> None:
    """One trial; at the end of a rung everything is saved, at that of a generation reported."""
    generation = search.generation
    candidate = search.advance()
    print(
        f"generation {candidate.generation}, candidate {candidate.number}: probe loss "
        f"{candidate.loss:.4f} after {candidate.trials} trials; {candidate.mutation.what}: "
        f"{candidate.genome}"
    )
    if search.rung_closed:
        save(store, search, nursery)
    if search.generation > generation:
        write_report(search, output_dir)


def metrics_rows(search: FractalSearch) -> list[dict[str, Any]]:
    """A row per finished generation, in the names of the metrics table."""
    rows = []
    for generation in range(search.generation):
        known = [c for c in search.archive if c.generation <= generation]
        front = pareto_front(known)
        rows.append(
            {
                "fractal_arch_generation": generation + 1,
                "fractal_arch_pareto_size": len(front),
                "fractal_arch_best_probe_loss": min(c.loss for c in known),
                "fractal_arch_flops": sum(c.spent for c in known),
            }
        )
    return rows


def report(search: FractalSearch) -> dict[str, Any]:
    """Everything a search has found, as JSON values; the same for the same search."""
    best = search.best() if search.archive else None
    return {
        "settings": search.state_dict()["settings"],
        "spent_flops": search.spent,
        "generations": metrics_rows(search),
        "best": None if best is None else best.number,
        "pareto_front": [candidate.number for candidate in pareto_front(search.archive)],
        "archive": [candidate.to_dict() for candidate in search.archive],
    }


def write_report(
    search: FractalSearch, output_dir: Path, *, extra: dict[str, Any] | None = None
) -> None:
    """Replace `report.json` (with `extra`) and `metrics.jsonl`, each in one step; OSError on a full
    disk."""
    folder, ops = output_dir / FOLDER, FileOps()
    make_dirs(ops, folder)
    plain = split_state(report(search) | (extra or {}))[1]  # a loss may be infinite
    rows = "".join(json.dumps(row) + "\n" for row in metrics_rows(search))
    replace_file(ops, folder / "report.json", (json.dumps(plain, indent=1) + "\n").encode())
    replace_file(ops, folder / "metrics.jsonl", rows.encode())


def finish(search: FractalSearch, nursery: ModelNursery, config: SigmaConfig) -> None:
    """The report with measured latencies, the best network, and flags that train one like it."""
    output_dir, best = Path(config.run.output_dir), search.best()
    front = pareto_front(search.archive)
    extra = {
        "latency_us": {str(c.number): nursery.latency_us(c.genome) for c in front},
        "best_average_loss": nursery.average_loss(best.number),
    }
    write_report(search, output_dir, extra=extra)
    folder, ops = output_dir / FOLDER / "best", FileOps()
    make_dirs(ops, folder)
    settings = json.dumps(best.genome.network(nursery.base).to_dict(), indent=1)
    weights = b"".join(encode_tensors(copy_to_host(nursery.weights(best.number))))
    replace_file(ops, folder / "model.json", settings.encode())
    replace_file(ops, folder / "model.safetensors", weights)
    replace_file(ops, folder / "args.txt", training_args(config, str(best.genome)).encode())


def training_args(config: SigmaConfig, genome: str) -> str:
    """An args file: this configuration with the network found, in a run directory of its own."""
    home = Path(config.run.output_dir) / FOLDER / "best" / "run"
    return to_args(
        replace(
            without_secrets(config),
            run=replace(config.run, output_dir=str(home), checkpoint_dir=str(home / "checkpoints")),
            fractal=replace(config.fractal, arch_search=False, genome=genome),
        )
    )


def _sentences(search: FractalSearch, output_dir: Path) -> str:
    best = search.best()
    return (
        f"best of {len(search.archive)} networks: {best.genome} (probe loss {best.loss:.4f}, "
        f"{best.cost.bytes:,} bytes, {best.cost.flops:,} operations a token); "
        f"{len(pareto_front(search.archive))} on the Pareto front, see "
        f"{output_dir / FOLDER / 'report.json'}"
    )
