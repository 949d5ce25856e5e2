"""Compile every Triton kernel ahead of time for every GPU generation, without a GPU.

    python scripts/compile_kernels.py            a table
    python scripts/compile_kernels.py --json     one JSON object a line

Shown for each kernel and architecture: bytes of shared memory, registers a thread, bytes a thread
spills to the stack, the tensor-core instructions in its PTX. Speed needs a device. The interpreter
must be off (TRITON_INTERPRET unset), for it replaces the compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.kernel_build import Build

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
TENSOR_CORE = re.compile(r"(?:wgmma\.mma_async|tcgen05\.mma|(?<![\w.])mma)[a-z0-9._:]*")


def describe(build: Build, architecture: int) -> dict[str, Any]:
    """What the kernel compiled for `architecture` (90 = sm_90) needs; shared memory and code in
    bytes."""
    compiled = build.compile(architecture)
    instructions = sorted(set(TENSOR_CORE.findall(compiled.asm["ptx"])))
    return {
        "kernel": build.kernel.__name__,
        "use": build.use,
        "architecture": architecture,
        "tensor_core": instructions,
        "shared_bytes": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
        "code_bytes": len(compiled.asm["cubin"]),
    }


def resources(machine_code: bytes) -> dict[str, int]:
    """Registers and stack bytes of a thread, as the tool that comes with Triton reads them."""
    import triton.knobs

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(machine_code)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = RESOURCES.search(shown)
    if found is None:
        raise RuntimeError(f"cuobjdump shows no resources: {shown!r}")
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels for every GPU generation.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument(
        "--operands", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"),
        help="types in which kernels of both multiply",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("error: TRITON_INTERPRET is set and replaces the compiler; unset it", file=sys.stderr)
        return 2
    from model.kernel_builds import builds

    for architecture in options.arch:
        for build in builds(architecture, tuple(options.operands)):
            row = describe(build, architecture)
            name = f"{row['kernel']} {row['use']}".rstrip()
            line = f"sm_{architecture:<4} {name:48} {row['shared_bytes']:>7} B shared "
            line += f"{row['registers']:>4} registers {row['stack_bytes']:>5} B stack  "
            print(json.dumps(row) if options.json else line + " ".join(row["tensor_core"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
