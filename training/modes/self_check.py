"""`--mode doctor --self-check`: is this program whole? It asks of the program, not of the machine.

A packed program can lack what its sources have: a module nobody imports by name, the text of a
kernel, a back end found by an entry point, a data file, the way workers start. Each is tried here
for real. Modules are looked up by name from a list, the only place that does so: an import
statement would make the packer include the very thing whose absence is to be seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import platform
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from training.config.sigma_config import SigmaConfig
from training.modes.checks import Check, check_writable
from training.runtime.environment import CACHE_DIRECTORY, package_version, probe_cuda
from training.runtime.needed_modules import KERNELS, PROGRAM, NeededModule
from training.sources.embedded import ASSETS_DIRECTORY, MANIFEST_FILE

OWN_PACKAGES = ("evolution", "model", "research", "training")
# What a program may do without: training on a CPU needs neither.
LEFT_OUT = ("transformers", "triton")
QUESTIONS = ASSETS_DIRECTORY.parent / "training" / "hidden_eval_manifest.json"
REPACK = "pack the program again: this one is not whole"
PROBED = 80  # compute capability for which the kernels are compiled
SPAWN_LIMIT_S = 300.0
END_LIMIT_S = 10.0
WIDE_TEXT = "Größe λ → █"
# What importing or compiling in an incomplete program has been seen to raise.
BROKEN = (ImportError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
STUB_NAME = "sigma_stub_probe"
STUB_SOURCE = """\
/* {token} */
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) {{ return PyLong_FromLong(42); }}
static PyMethodDef methods[] = {{
    {{"answer", answer, METH_NOARGS, "42"}}, {{NULL, NULL, 0, NULL}}}};
static struct PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{name}", NULL, -1, methods}};
PyMODINIT_FUNC PyInit_{name}(void) {{ return PyModule_Create(&definition); }}
"""


def examine(config: SigmaConfig) -> list[Check]:
    """All checks. Nothing here depends on flags but where the run would write."""
    caches = Path(os.environ.get("TRITON_CACHE_DIR", CACHE_DIRECTORY / "triton")).parent
    return [
        describe_program(),
        check_symbols("imports", PROGRAM),
        check_own_modules(),
        *check_triton(),
        check_assets(),
        check_questions(),
        check_worker(),
        check_output(),
        check_cache_place(caches),
        check_writable("cache directory", "TRITON_CACHE_DIR", caches),
        check_writable("output directory", "--output-dir", Path(config.run.output_dir)),
        check_writable("checkpoint directory", "--checkpoint-dir", Path(config.run.checkpoint_dir)),
    ]


def describe_program() -> Check:
    frozen = "packed" if getattr(sys, "frozen", False) else "run from its sources"
    found = (
        f"{Path(sys.executable).name}, {frozen}, Python {platform.python_version()}, "
        f"torch {package_version('torch') or 'unknown'}, {platform.platform()}"
    )
    return Check(name="program", status="ok", found=found)


def check_symbols(name: str, needed: tuple[NeededModule, ...]) -> Check:
    """Every module imports, every symbol is in it; all that do not are named."""
    problems = []
    for entry in needed:
        for symbol in ("", *entry.symbols):
            try:
                pkgutil.resolve_name(f"{entry.module}:{symbol}")
            except BROKEN as error:
                where = f"{entry.module}.{symbol}" if symbol else entry.module
                problems.append(f"{where}: {_first_line(error)}")
                if not symbol:
                    break
    if problems:
        return Check(name=name, status="fail", found="; ".join(problems), advice=REPACK)
    symbols = sum(len(entry.symbols) for entry in needed)
    return Check(name=name, status="ok", found=f"{len(needed)} modules with {symbols} symbols")


def check_own_modules() -> Check:
    """Every module of the program's own imports, but those about a package that is left out."""
    problems, left_out, done = [], [], 0
    for name in own_modules():
        try:
            pkgutil.resolve_name(f"{name}:")  # with the colon: import it, do not look for it
            done += 1
        except BROKEN as error:
            missing = (getattr(error, "name", None) or "").partition(".")[0]
            if missing in LEFT_OUT and importlib.util.find_spec(missing) is None:
                left_out.append(f"{name} for want of {missing}")
            else:
                problems.append(f"{name}: {_first_line(error)}")
    if problems:
        return Check(name="own modules", status="fail", found="; ".join(problems), advice=REPACK)
    found = "; not ".join([f"{done} import", *left_out])
    return Check(name="own modules", status="ok", found=found)


def own_modules() -> Iterator[str]:
    """Dotted names of all modules of the packages that are there."""
    for package in OWN_PACKAGES:
        try:
            paths = pkgutil.resolve_name(f"{package}:").__path__
        except ImportError:
            continue
        yield from (item.name for item in pkgutil.walk_packages(paths, prefix=f"{package}."))


def check_triton() -> list[Check]:
    """Imports, back ends, every kernel compiled, the launcher's C stub compiled and loaded."""
    if triton_version() is None:
        missing = sys.platform == "win32" and getattr(sys, "frozen", False)
        found = "not in this program" + ("" if missing else "; the CPU needs none")
        status, advice = ("fail", REPACK) if missing else ("ok", "")
        return [Check(name="Triton", status=status, found=found, advice=advice)]
    checks = [check_symbols("Triton", KERNELS)]
    steps: tuple[tuple[str, Callable[[], str]], ...] = (
        ("Triton back ends", list_backends),
        ("kernels", compile_kernels),
        ("C stub", compile_stub),
    )
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        found = "TRITON_INTERPRET is set and replaces the compiler: nothing was compiled"
        checks.append(Check(name="kernels", status="warn", found=found, advice="unset it"))
    elif checks[0].status == "ok":
        checks += [_attempt(name, step) for name, step in steps]
    if checks[-1].name == "C stub" and checks[-1].status == "fail" and not _launches_kernels():
        checks[-1].status = "warn"
    return checks


def triton_version() -> str | None:
    """Version of the installed or packed Triton; None without one."""
    try:
        return pkgutil.resolve_name("triton:__version__")
    except ModuleNotFoundError:
        return None
    except BROKEN:
        return "broken"


def list_backends() -> str:
    """Names of Triton's back ends; LookupError without NVIDIA's, which entry points register."""
    backends = pkgutil.resolve_name("triton.backends:backends")
    if "nvidia" not in backends:
        raise LookupError(f"NVIDIA's is not among the {len(backends)} back ends found")
    return ", ".join(sorted(backends))


def compile_kernels() -> str:
    """Compile each kernel ahead of time for sm_80, not from the cache; their bytes by name."""
    import triton.knobs

    from model.kernel_builds import builds
    from model.triton_probe import compile_probe

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        sizes = {"scaled_add_kernel": len(compile_probe(capability=PROBED))}
        for build in {b.kernel: b for b in builds(PROBED, operands=("bf16",))}.values():
            sizes[build.kernel.__name__] = len(build.compile(PROBED).asm["cubin"])
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{len(sizes)} compiled, {sum(sizes.values())} bytes for sm_{PROBED}: {shown}"


def compile_stub() -> str:
    """Compile and load a C extension the way a kernel's launcher is; needs Python.h and a compiler.

    The text is new each time, for Triton would serve an old one from its cache.
    """
    from triton.runtime.build import compile_module_from_src

    source = STUB_SOURCE.format(token=secrets.token_hex(8), name=STUB_NAME)
    answer = compile_module_from_src(source, STUB_NAME).answer()
    return f"compiled and loaded, answers {answer}"


def check_assets() -> Check:
    """Every shipped file is there with its published hash."""
    try:
        text = (ASSETS_DIRECTORY / MANIFEST_FILE).read_text(encoding="utf-8")
        expected = {name: entry["sha256"] for name, entry in json.loads(text)["files"].items()}
        actual = {
            name: hashlib.sha256((ASSETS_DIRECTORY / name).read_bytes()).hexdigest()
            for name in expected
        }
    except (OSError, ValueError, KeyError) as error:
        found = f"unreadable: {_first_line(error)}"
        return Check(name="assets", status="fail", found=found, advice=REPACK)
    damaged = [name for name in expected if actual[name] != expected[name]]
    if damaged:
        found = f"damaged: {', '.join(damaged)}"
        return Check(name="assets", status="fail", found=found, advice=REPACK)
    found = ", ".join(f"{name} {digest[:12]}" for name, digest in actual.items())
    return Check(name="assets", status="ok", found=found)


def check_questions(path: Path = QUESTIONS) -> Check:
    """The manifest of the hidden evaluation is there and can be read; what it says is not asked."""
    try:
        size = len(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        found = f"unreadable: {_first_line(error)}"
        return Check(name="hidden questions", status="fail", found=found, advice=REPACK)
    return Check(name="hidden questions", status="ok", found=f"{path.name}, {size} entries")


def check_worker(limit_s: float = SPAWN_LIMIT_S) -> Check:
    """A spawned worker answers; without `freeze_support` the program would start itself again."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=answer_from_worker, args=(sender, WIDE_TEXT), daemon=True)
    worker.start()
    sender.close()
    try:
        pid, text = receiver.recv() if receiver.poll(limit_s) else (None, "")
    except EOFError:
        pid, text = None, ""
    finally:
        receiver.close()
        worker.join(END_LIMIT_S)
        worker.terminate()
        worker.join()
    if pid == worker.pid and text == WIDE_TEXT:
        return Check(name="worker", status="ok", found=f"process {pid} answered")
    found = f"a spawned process ended with code {worker.exitcode} and without an answer"
    return Check(name="worker", status="fail", found=found, advice=REPACK)


def answer_from_worker(sender: Connection, text: str) -> None:
    """What the worker does: send back its process number and what it was given."""
    sender.send((os.getpid(), text))
    sender.close()


def check_output() -> Check:
    """Both streams take any character, whatever the console's code page; the text shows it."""
    encodings = {
        name: (getattr(sys, name).encoding or "none").lower() for name in ("stdout", "stderr")
    }
    found = ", ".join(f"{name} is {encoding}" for name, encoding in encodings.items())
    if set(encodings.values()) <= {"utf-8", "utf8"}:
        return Check(name="output", status="ok", found=f"{found}: {WIDE_TEXT}")
    advice = "set the environment variable PYTHONUTF8=1, or start train_sigma.py itself"
    return Check(name="output", status="fail", found=found, advice=advice)


def check_cache_place(caches: Path) -> Check:
    """Caches lie outside the packed folder, which an update replaces and may not be writable."""
    bundle = getattr(sys, "_MEIPASS", None)
    inside = bundle is not None and caches.resolve().is_relative_to(Path(bundle).resolve())
    return Check(
        name="cache place",
        status="fail" if inside else "ok",
        found=f"{caches} is {'inside' if inside else 'outside'} the program's own folder",
        advice="start the program from another folder" if inside else "",
    )


def _launches_kernels() -> bool:
    """Whether this program will have to compile launchers: the Windows EXE, or a CUDA machine."""
    return sys.platform == "win32" or probe_cuda().available


def _attempt(name: str, step: Callable[[], str]) -> Check:
    import triton.errors

    try:
        return Check(name=name, status="ok", found=step())
    except (*BROKEN, subprocess.SubprocessError, triton.errors.TritonError) as error:
        return Check(name=name, status="fail", found=_first_line(error), advice=REPACK)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
