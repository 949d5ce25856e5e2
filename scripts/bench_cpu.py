"""All benches that need no GPU, as one result.

    python scripts/bench_cpu.py --json bench/results/cpu.json

About eight minutes on an idle core. Stopped, `--resume` goes on with the cases that are missing;
`--only decoding` measures those. GPU rows are listed as not measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_operations, bench_scaling, bench_training
from scripts.bench_common import BenchOptions, Case, run_bench


def cases(options: BenchOptions) -> list[Case]:
    """Cases of the training, scaling and operations benches, in the order in which they run."""
    return [
        case
        for bench in (bench_training, bench_scaling, bench_operations)
        for case in bench.cases(options)
    ]


if __name__ == "__main__":
    sys.exit(run_bench(__doc__ or "", cases))
