"""Does credit by one gradient rank blocks as leaving them out does, on the quickstart's network?

    python scripts/credit_ranks.py --json bench/results/credit_ranks_cpu.json

Runs with C3O train undisturbed (gain 0: all factors are one). At some probes a sample of the blocks
that moved is left out one by one, on the probe's own text: as many ternary blocks as others. Kept
are Spearman's rank correlation of the two credits, and the placebo: credits of other blocks.

The exact credit is no smooth function: the least change of a weight turns roundings of activations
and sends tokens to other experts. `floor_nats` is what changes of a millionth do to the loss; a
block whose credit is not well above it cannot be ranked by leaving it out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.ablation import Arm, Lane
from scripts.bench_common import cpu_name, load_average
from scripts.paired import t_quantile
from training.credit import UpdateTrial
from training.optim.c3o import C3O
from training.runtime.environment import versions

PROFILE = Path(__file__).resolve().parent.parent / "profiles" / "quickstart.txt"
FLAGS = (
    "--device cpu --optimizer c3o --c3o-credit-enabled --c3o-credit-gain 0 --batch-size 2 "
    "--warmup-steps 10 --eval-interval 0 --sample-interval 0 --probe-batch-size 8 "
    "--probe-batches 16"
)
MOVED = 1e-12  # length of a step below which a block counts as one that stayed
NOTHING, FLOOR_DRAWS = 1e-6, 8


class Listener:
    """Hears the probes of a C3O and, at those asked for, leaves `count` blocks of a kind out."""

    def __init__(self, control: C3O, *, probes: set[int], count: int, seed: int) -> None:
        self._control = control
        self._probes, self._count = probes, count
        self._begin, self._finish = control.begin_probe, control.finish_probe
        self._random = torch.Generator().manual_seed(seed)
        self._latent: list[Tensor] = []
        self.rows: list[dict[str, Any]] = []
        vars(control).update(begin_probe=self.begin, finish_probe=self.finish)

    def begin(self) -> None:
        """Stands in for C3O's begin_probe: keeps the latent weights (a copy) and then does the
        same."""
        self._latent = [param.detach().clone() for param in self._control._layouts]
        self._begin()

    def finish(
        self,
        gradients: Mapping[Tensor, Tensor],
        *,
        evaluate: Callable[[], Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Stands in for C3O's finish_probe, whose result it returns; a probe asked for adds one of
        `rows`."""
        control = self._control
        first = self._finish(gradients, evaluate=evaluate, generator=generator)
        if control.num_probes in self._probes:
            params = list(control._layouts)
            steps = [old - param.detach() for old, param in zip(self._latent, params)]
            trial = UpdateTrial(params, steps, layout=control._layout, evaluate=evaluate)
            moved = control._layout.norms(steps) > MOVED
            row = {"probe": control.num_probes} | self._compare(first, trial, moved)
            self.rows.append(row | {"floor_nats": self._floor(params, evaluate)})
        return first

    @torch.no_grad()
    def _floor(self, params: list[Tensor], evaluate: Callable[[], Tensor]) -> float:
        """Median change of the loss when every weight changes by about a millionth."""
        found, full, changes = [param.detach().clone() for param in params], evaluate(), []
        for _ in range(FLOOR_DRAWS):
            for param in params:
                noise = torch.randn(param.shape, generator=self._random)
                param.mul_(1.0 + NOTHING * noise)
            changes.append(abs(float(evaluate() - full)))
            for param, value in zip(params, found):
                param.copy_(value)
        return statistics.median(changes)

    def _compare(self, first: Tensor, trial: UpdateTrial, moved: Tensor) -> dict[str, Any]:
        control = self._control
        is_ternary = torch.cat([
            torch.full((count,), param in control._roundings)
            for param, count in zip(control._layouts, control._counts)
        ])  # fmt: skip
        ones = torch.ones(len(first))
        full = trial.loss(ones)
        found: dict[str, Any] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        for kind, mask in (("ternary", is_ternary & moved), ("other", ~is_ternary & moved)):
            places = mask.nonzero().flatten()
            drawn = torch.randperm(len(places), generator=self._random)[: self._count]
            places = places[drawn]
            exact = torch.stack([trial.loss(ones.index_fill(0, b, 0.0)) - full for b in places])
            pairs.append((first[places], exact))
            found[kind] = round(spearman(*pairs[-1]), 4)
        predicted, exact = (torch.cat(side) for side in zip(*pairs))
        shuffled = predicted[torch.randperm(len(predicted), generator=self._random)]
        return found | {
            "all": round(spearman(predicted, exact), 4),
            "placebo": round(spearman(shuffled, exact), 4),
            "blocks": len(exact),
            "median_nats": float(exact.abs().median()),
        }


def spearman(left: Tensor, right: Tensor) -> float:
    ranks = torch.stack([left.argsort().argsort(), right.argsort().argsort()]).float()
    return float(torch.corrcoef(ranks)[0, 1])


def run(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one seed's run."""
    flags = [f"@{PROFILE}", *FLAGS.split(), *options.flags.split()]
    with tempfile.TemporaryDirectory() as directory:
        lane = Lane(
            flags, Arm(name="run"), seed=seed, steps=options.steps, directory=Path(directory)
        )
        control = lane.trainer.optimizer.control
        assert isinstance(control, C3O)
        probes = {int(number) for number in options.probes.split(",")}
        listener = Listener(control, probes=probes, count=options.blocks, seed=seed)
        lane.advance(options.steps, clock=time.process_time)
        lane.close()
    return listener.rows


def summarise(seeds: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean over seeds of each seed's mean over its probes, with its interval."""
    result = {}
    for kind in ("all", "ternary", "other", "placebo", "median_nats", "floor_nats"):
        means = [statistics.fmean(row[kind] for row in rows) for rows in seeds.values()]
        result[kind] = {"mean": statistics.fmean(means), "seeds": means}
        if len(means) > 1:
            reach = t_quantile(0.975, degrees=len(means) - 1) * statistics.stdev(means)
            reach /= len(means) ** 0.5
            result[kind]["interval"] = [result[kind]["mean"] - reach, result[kind]["mean"] + reach]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=97)
    parser.add_argument("--probes", default="5,9,13", help="numbers of probes, one every 8 steps")
    parser.add_argument("--blocks", type=int, default=60, help="of each kind")
    parser.add_argument("--flags", default="", help="further flags of the runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": (__doc__ or "").partition("\n")[0],
        "command": " ".join(["python scripts/credit_ranks.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": 1, "load": load_average()},
        "versions": versions(),
        "flags": f"quickstart {FLAGS} {options.flags}".strip(),
        "seeds": {},
    }
    for seed in range(1, options.seeds + 1):
        record["seeds"][str(seed)] = run(seed, options)
        print(seed, json.dumps(record["seeds"][str(seed)]), flush=True)
        record["summary"] = summarise(record["seeds"])
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
