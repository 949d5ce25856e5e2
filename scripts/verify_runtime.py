"""Whether an environment can run SIGMA and be packed: versions, imports and symbols.

`python scripts/verify_runtime.py` answers for the Python that runs it. Every pin of the lockfile
must be installed in exactly that version, and every module that
`training/runtime/needed_modules.py` names must import and hold its symbols if its distribution is
pinned. Each is imported in a process of its own, because a broken DLL ends the process that loads
it and would take the report along. Exit codes: 0 all is there, 1 something is not, 2 usage.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # Python puts the folder of this file first; the packages of the project are one above.
    sys.path[0] = str(ROOT)

from training.runtime.frozen import use_utf8_output  # noqa: E402
from training.runtime.needed_modules import NEEDED, NeededModule  # noqa: E402

LOCKFILE = "requirements-py313-cu128.txt"
IMPORT_LIMIT_S = 600.0
NO_CUDA = 3
PROBE = """\
import importlib, sys
module, needs_gpu, *symbols = sys.argv[1:]
if needs_gpu == "True":
    import torch
    if not torch.cuda.is_available():
        sys.exit(3)
found = importlib.import_module(module)
for symbol in symbols:
    value = found
    for name in symbol.split("."):
        try:
            value = getattr(value, name)
        except AttributeError:
            sys.exit(f"{module} has no {symbol}")
"""


@dataclass(slots=True, kw_only=True, frozen=True)
class Finding:
    """One thing that was looked at. status: "ok", "fail", or "seen": there, but not importable on
    this machine for want of a GPU."""

    kind: str
    name: str
    status: str
    found: str


def main(arguments: list[str]) -> int:
    """Check, report, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Verify that this Python can run and pack SIGMA.", allow_abbrev=False
    )
    parser.add_argument("--lockfile", default=str(ROOT / LOCKFILE), help="pins to hold against")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    given = parser.parse_args(arguments)
    try:
        pins = read_pins(Path(given.lockfile))
    except (OSError, ValueError) as error:
        print(f"verify_runtime: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    findings = []
    for finding in examine(pins):
        findings.append(finding)
        if not given.json:
            print(line_of(finding), flush=True)  # an import may take a minute on a cold disk
    conclude(findings, lockfile=given.lockfile, as_json=given.json)
    return 1 if any(finding.status == "fail" for finding in findings) else 0


def examine(pins: dict[str, SpecifierSet]) -> Iterator[Finding]:
    """All checks, the quick ones first."""
    yield from check_pins(pins)
    yield from check_coverage(pins, NEEDED)
    for needed in NEEDED:
        if needed.distribution in pins or needed.elsewhere in pins:
            yield check_import(needed)


def read_pins(lockfile: Path) -> dict[str, SpecifierSet]:
    """Distribution to its exact pin, of the lines that apply to this machine.

    ValueError for a line that is no exact pin: such a lockfile would not be one.
    """
    pins = {}
    for number, line in enumerate(lockfile.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise ValueError(f"{lockfile} line {number}: {error}") from None
        specifiers = list(requirement.specifier)
        if len(specifiers) != 1 or specifiers[0].operator != "==" or "*" in str(specifiers[0]):
            raise ValueError(f"{lockfile} line {number}: {text} is no exact pin (name==version)")
        if requirement.marker is None or requirement.marker.evaluate():
            pins[requirement.name.lower().replace("_", "-")] = requirement.specifier
    return pins


def check_pins(pins: dict[str, SpecifierSet]) -> list[Finding]:
    """Every pinned distribution is installed, in exactly the pinned version.

    As pip reads a pin: one without a local label (2.13.0) is met by any build (2.13.0+cpu), one
    with a label (2.10.0+cu128) by that build only.
    """
    findings = []
    for name, pin in sorted(pins.items()):
        try:
            found = importlib.metadata.version(name)
            status = "ok" if pin.contains(found, prereleases=True) else "fail"
        except importlib.metadata.PackageNotFoundError:
            found, status = "not installed", "fail"
        found = found if status == "ok" else f"{found}, but the lockfile has {pin}"
        findings.append(Finding(kind="version", name=name, status=status, found=found))
    return findings


def check_coverage(pins: Container[str], needed: Iterable[NeededModule]) -> list[Finding]:
    """What the program itself needs is pinned; a lockfile without it would verify nothing."""
    missing = {
        module.distribution
        for module in needed
        if module.part == "program" and module.distribution not in pins
    }
    return [
        Finding(kind="pin", name=name, status="fail", found="needed, but not in the lockfile")
        for name in sorted(missing)
    ]


def check_import(needed: NeededModule) -> Finding:
    """The module imports in a fresh process and holds its symbols."""
    command = [sys.executable, "-c", PROBE, needed.module, str(needed.needs_gpu), *needed.symbols]
    try:
        child = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUTF8": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=IMPORT_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        found = f"no answer within {IMPORT_LIMIT_S:.0f} s"
        return Finding(kind="import", name=needed.module, status="fail", found=found)
    if child.returncode == NO_CUDA and needed.needs_gpu:
        if importlib.util.find_spec(needed.module) is None:
            return Finding(kind="import", name=needed.module, status="fail", found="not there")
        found = "there; only a machine with CUDA can import it"
        return Finding(kind="import", name=needed.module, status="seen", found=found)
    if child.returncode != 0:
        last = (child.stderr.strip() or f"exit code {child.returncode}").splitlines()[-1]
        return Finding(kind="import", name=needed.module, status="fail", found=last)
    found = ", ".join(needed.symbols)
    return Finding(kind="import", name=needed.module, status="ok", found=found)


def line_of(finding: Finding) -> str:
    return f"{finding.status:4} {finding.kind} {finding.name}: {finding.found}"


def conclude(findings: list[Finding], *, lockfile: str, as_json: bool) -> None:
    """Say the result; the failures once more at the end, where a reader of a build log looks."""
    failed = [finding for finding in findings if finding.status == "fail"]
    if as_json:
        record = {
            "passed": not failed,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "lockfile": Path(lockfile).name,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(record))
    elif failed:
        print(f"verify_runtime: {len(failed)} of {len(findings)} checks failed:")
        print("\n".join(map(line_of, failed)))
    else:
        print(f"verify_runtime: all {len(findings)} checks passed ({Path(lockfile).name})")


if __name__ == "__main__":
    use_utf8_output()
    sys.exit(main(sys.argv[1:]))
