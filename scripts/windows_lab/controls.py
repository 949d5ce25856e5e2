"""What each part of the recipe is for: small programs frozen whole and with something left out.

A build that works proves little about the recipe until the build without a part fails, and fails in
the way that part is there to prevent. The parts are taken out of the real hook by its own text, so
a hook that no longer says what is removed is an error here, not a control that quietly passes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
HOOK = PROJECT / "scripts/freeze/hooks/hook-triton.py"
SPEC = """\
analysis = Analysis(
    [{program!r}],
    pathex=[{folder!r}, {project!r}],
    hookspath={hooks!r},
    excludes={excluded!r},
    module_collection_mode={mode!r},
)
program = EXE(
    PYZ(analysis.pure), analysis.scripts, name="probe", console=True, exclude_binaries=True,
    upx=False,
)
COLLECT(program, analysis.binaries, analysis.datas, name="probe", upx=False)
"""
EXCLUDED = "IPython PIL matplotlib numpy pandas pytest setuptools tkinter torch".split()
NO_SOURCE = "@jit functions should be defined in a Python file"
HEADERS = "    *python_headers(),\n"


@dataclass(slots=True, kw_only=True, frozen=True)
class Build:
    """A way to freeze the probe: with its kernel's source or not, and what the hook must lack."""

    name: str
    keeps_source: bool = True
    uses_hook: bool = True
    removed: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True, frozen=True)
class Control:
    """An action of a build and what its output must contain; `works`: whether it succeeds."""

    build: str
    arguments: tuple[str, ...]
    says: str
    works: bool = False
    windows_only: bool = False


BUILDS = (
    Build(name="whole"),
    Build(name="bare", keeps_source=False, removed=(HEADERS,)),
    Build(name="stock", uses_hook=False),
)
CONTROLS = (
    Control(build="whole", arguments=("kernel",), says="cubin of ", works=True),
    Control(build="whole", arguments=("stub",), says="loaded probe_stub", works=True),
    Control(build="whole", arguments=("worker",), says="worker answered", works=True),
    Control(build="whole", arguments=("text",), says="λ", works=True),
    Control(build="whole", arguments=("worker", "unprepared"), says="the worker ended with"),
    Control(
        build="whole",
        arguments=("text", "unprepared"),
        says="UnicodeEncodeError",
        windows_only=True,
    ),
    Control(
        build="whole",
        arguments=("stub", "unprepared"),
        says="Failed to find C compiler",
        windows_only=True,
    ),
    Control(build="bare", arguments=("kernel",), says=NO_SOURCE),
    Control(build="bare", arguments=("stub",), says="Python.h"),
    Control(build="stock", arguments=("kernel",), says="0 compatible backends"),
)


def write_build(build: Build, folder: Path, *, seen_as: str, project: str) -> Path:
    """Write a build's spec, hook and program into `folder`; returns the spec.

    seen_as, project: `folder` and the project's folder as the building Python sees them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "probe").glob("*.py"):
        shutil.copy2(file, folder)
    hooks = folder / "hooks"
    hooks.mkdir(exist_ok=True)
    if build.uses_hook:
        source = HOOK.read_text(encoding="utf-8")
        for text in build.removed:
            if source.count(text) != 1:
                raise ValueError(f"{HOOK.name} does not say {text.strip()!r} exactly once")
            source = source.replace(text, "")
        (hooks / HOOK.name).write_text(source, encoding="utf-8")
    spec = folder / "probe.spec"
    spec.write_text(
        SPEC.format(
            program=f"{seen_as}/probe.py",
            folder=seen_as,
            project=project,
            hooks=[f"{seen_as}/hooks"],
            excluded=EXCLUDED,
            mode={"probe_kernel": "pyz+py"} if build.keeps_source else {},
        ),
        encoding="utf-8",
    )
    return spec
