"""Compile every Triton kernel ahead of time for every GPU generation, without a GPU.

    python scripts/compile_kernels.py            a table
    python scripts/compile_kernels.py --json     one JSON object a line

Shown for each kernel and architecture: the tensor-core instructions in its PTX, bytes of shared
memory, bytes of machine code. Registers, spills and speed need a device. The interpreter must be
off (TRITON_INTERPRET unset), for it replaces the compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.kernel_builds import Build

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TENSOR_CORE = re.compile(r"(?:wgmma\.mma_async|tcgen05\.mma|(?<![\w.])mma)[a-z0-9._:]*")


def describe(build: Build, architecture: int) -> dict[str, Any]:
    compiled = build.compile(architecture)
    instructions = sorted(set(TENSOR_CORE.findall(compiled.asm["ptx"])))
    return {
        "kernel": build.kernel.__name__,
        "architecture": architecture,
        "tensor_core": instructions,
        "shared_bytes": compiled.metadata.shared,
        "code_bytes": len(compiled.asm["cubin"]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels for every GPU generation.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("error: TRITON_INTERPRET is set and replaces the compiler; unset it", file=sys.stderr)
        return 2
    from model.kernel_builds import builds

    for architecture in options.arch:
        for build in builds(architecture):
            row = describe(build, architecture)
            line = f"sm_{architecture:<4} {row['kernel']:24} {row['shared_bytes']:>7} B shared  "
            print(json.dumps(row) if options.json else line + " ".join(row["tensor_core"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
