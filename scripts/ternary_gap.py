"""What ternary weights cost: bits per byte against the full-precision twin, paired by seed.

    python scripts/ternary_gap.py --folder runs/gap --json bench/results/ternary_gap_cpu.json

Each seed trains the quickstart twice on the same tokens, as it is and with `--quant-mode none`, and
both are measured on the whole validation split. 3 seeds of 400 steps take about 40 minutes on one
idle thread. A run that was stopped is resumed, one that is done is only measured again. Both use
the quickstart's learning rates, which were chosen for the ternary network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import paired
from scripts.bench_common import cpu_name
from training.runtime.environment import versions

ROOT = Path(__file__).resolve().parent.parent
MODES = {"ternary": "bitnet_1_58", "full_precision": "none"}
Measure = Callable[[str, int], float]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--seeds", default="1,2,3", metavar="N,N,...")
    parser.add_argument("--steps", type=int, default=400, metavar="N")
    parser.add_argument("flags", nargs="*", help="further flags of both runs, behind --")
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if len(set(seeds)) < max(2, len(seeds)):
        print("error: --seeds takes two or more different numbers", file=sys.stderr)
        return 2

    def measure(mode: str, seed: int) -> float:
        folder = options.folder / f"{mode}_{seed}"
        return train_and_measure(
            folder,
            [f"--quant-mode={mode}", f"--seed={seed}", f"--steps={options.steps}"],
            options.flags,
        )

    result = describe(options.steps, options.flags) | compare(seeds, measure)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def compare(seeds: Sequence[int], measure: Measure) -> dict[str, Any]:
    """Bits per byte of both networks per seed, and the gap with its 95 % interval."""
    found: dict[str, list[float]] = {name: [] for name in MODES}
    for seed in seeds:
        for name, mode in MODES.items():
            found[name].append(measure(mode, seed))
    gaps = [a - b for a, b in zip(found["ternary"], found["full_precision"], strict=True)]
    gap = paired.compare(found["ternary"], found["full_precision"])
    return {
        "seeds": list(seeds),
        **{name: [round(value, 4) for value in values] for name, values in found.items()},
        "gap_bpb": {
            "each": [round(each, 4) for each in gaps],
            "mean": round(gap.mean, 4),
            "interval_95_t": [round(gap.low, 4), round(gap.high, 4)],
        },
    }


def train_and_measure(folder: Path, own: Sequence[str], flags: Sequence[str]) -> float:
    """Train, or resume, in `folder`; bits per byte on the whole validation split."""
    common = [f"--output-dir={folder}", f"--checkpoint-dir={folder / 'checkpoints'}", *own, *flags]
    run_program("--sample-interval=0", "--integrity-hidden-eval-every=0", *common)
    answer = run_program("--mode=eval", "--json", *common, "--eval-tokens=0", answer=True)
    return float(json.loads(answer.splitlines()[-1])["bpb"])


def run_program(*flags: str, answer: bool = False) -> str:
    """train_sigma.py on the quickstart, its standard output if wanted; RuntimeError if it fails."""
    command = [sys.executable, str(ROOT / "train_sigma.py")]
    command += [f"@{ROOT / 'profiles' / 'quickstart.txt'}", *flags]
    run = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE if answer else None, check=False, text=True
    )
    if run.returncode:
        raise RuntimeError(f"train_sigma.py ended with exit code {run.returncode}: {flags}")
    return run.stdout or ""


def describe(steps: int, flags: Sequence[str]) -> dict[str, Any]:
    """Head of the result file: what was compared, how, when and on which machine."""
    return {
        "what": "ternary against full precision at equal tokens, whole validation split",
        "command": "profiles/quickstart.txt " + " ".join([f"--steps {steps}", *flags]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "versions": {name: value for name, value in versions().items() if value is not None},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
