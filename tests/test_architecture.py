"""The rules of the design that a machine can hold: who imports whom, sizes, no hidden control flow.

Every rule is tried on a source that breaks it as well, so that a rule cannot quietly stop looking.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("evolution", "model", "research", "training", "train_sigma.py")
MEASURED = (*PRODUCT, "bench", "scripts", "tests")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

NOBODY = ("scripts", "tests", "bench")  # what product code may never import
ORCHESTRATION = (
    *("training.sigma_trainer", "training.modes"),
    *("training.build", "training.build_data", "training.build_guards", "training.build_rl"),
    *("training.build_trials", "training.build_replay", "training.build_hydra"),
    "training.build_inference",
)
# Path prefix -> what is forbidden there, and what is allowed all the same. The first match counts.
IMPORT_RULES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("model/", ("training", "evolution", "research"), ()),
    ("evolution/", ("training", "model"), ("model.config",)),
    ("research/", ("training",), ()),
    ("training/build", (), ()),  # build.py and its parts
    ("training/modes/", (), ()),
    ("training/config/", ("torch", "transformers", "training.features", *ORCHESTRATION), ()),
    ("training/features/__init__.py", ORCHESTRATION, ()),
    (
        "training/features/",
        ("training.features", "training.config.cli", *ORCHESTRATION),
        ("training.features.base",),
    ),
    (
        "training/sigma_trainer.py",
        ("model", "training.features", "training.config.cli", "training.build", "training.modes"),
        ("training.features.base",),
    ),
    ("training/", ("training.features", "training.config.cli", *ORCHESTRATION), ()),
    ("train_sigma.py", (), ()),
)
# The steps of defining an operator for torch.compile are named so by torch itself.
TORCH_REGISTRATIONS = {"register_fake", "register_autograd", "register_kernel"}
DYNAMIC_IMPORTS = ("import_module", "__import__", "resolve_name")
LOOKS_UP_BY_NAME = {"training/modes/self_check.py"}  # it asks whether what is named can be found
PACKAGES_WITH_IMPORTS = {"training/features/__init__.py"}  # the ordered tuple of all features


def imported_names(tree: ast.AST, *, path: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.split("/")[: -node.level]
                module = ".".join([*package, module] if module else package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def import_faults(tree: ast.AST, *, path: str) -> list[str]:
    """Imports that the design forbids in this file."""
    if path.split("/")[0] not in PRODUCT:
        return []
    forbidden, allowed = next(rule[1:] for rule in IMPORT_RULES if path.startswith(rule[0]))
    return [
        f"{path}:{line}: imports {name}"
        for line, name in imported_names(tree, path=path)
        if is_within(name, forbidden + NOBODY) and not is_within(name, allowed)
    ]


def last_name(node: ast.expr) -> str:
    """`c` of `a.b.c(...)`."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def control_faults(tree: ast.AST, *, path: str) -> list[str]:
    """Control flow that a reader, and PyInstaller, cannot follow."""
    if path.split("/")[0] not in PRODUCT:
        return []
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = {last_name(decorator) for decorator in node.decorator_list}
            hidden = {name for name in names if name.startswith("register")} - TORCH_REGISTRATIONS
            faults += [f"{path}:{node.lineno}: registering decorator {name}" for name in hidden]
        elif isinstance(node, ast.Call) and last_name(node) in DYNAMIC_IMPORTS:
            if path in LOOKS_UP_BY_NAME:
                continue
            faults.append(f"{path}:{node.lineno}: dynamic import")
        elif isinstance(node, ast.Global):
            faults.append(f"{path}:{node.lineno}: global statement")
    return faults


def size_faults(source: str, tree: ast.AST, *, path: str) -> list[str]:
    """Files and functions above their ceilings; the bodies of kernels may be long."""
    faults = []
    if (count := len(source.splitlines())) > MAX_FILE_LINES:
        faults.append(f"{path}: {count} lines")
    if "kernel" in Path(path).stem:
        return faults
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return faults


def package_faults(tree: ast.Module, *, path: str) -> list[str]:
    """What an `__init__.py` does beyond naming things: importing a package must cost nothing."""
    if Path(path).name != "__init__.py":
        return []
    faults = []
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_value = isinstance(node, ast.Assign | ast.AnnAssign) and not any(
            isinstance(part, ast.Call) for part in ast.walk(node)
        )
        is_import = isinstance(node, ast.Import | ast.ImportFrom) and path in PACKAGES_WITH_IMPORTS
        if not (is_text or is_value or is_import):
            faults.append(f"{path}:{node.lineno}: {type(node).__name__} in a package file")
    return faults


def faults_of(path: str, source: str) -> list[str]:
    """All the faults of one file; `path` is relative to the project, with forward slashes."""
    tree = ast.parse(source, filename=path)
    return [
        *import_faults(tree, path=path),
        *control_faults(tree, path=path),
        *size_faults(source, tree, path=path),
        *package_faults(tree, path=path),
    ]


def project_files() -> Iterator[tuple[str, str]]:
    """Path and source of every Python file that the rules are about."""
    for name in MEASURED:
        root = ROOT / name
        for file in [root] if root.is_file() else sorted(root.rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")


def test_the_project_keeps_the_rules():
    files = dict(project_files())
    assert {"train_sigma.py", "model/config.py", "training/context.py"} <= set(files)
    faults = [fault for path, source in files.items() for fault in faults_of(path, source)]
    assert not faults, "\n".join(faults)


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/mla.py", "import training.data"),
        ("model/mla.py", "from training import data"),
        ("model/mla.py", "def f():\n    from training.data import Batch"),
        ("model/skc/net.py", "from ...training import data"),
        ("model/mla.py", "from scripts.launcher import run"),
        ("evolution/genome.py", "from model.sigma_llm import SigmaLLM"),
        ("research/journal.py", "import training"),
        ("training/instant.py", "from training.sigma_trainer import SigmaTrainer"),
        ("training/optim/c3o.py", "from training import features"),
        ("training/rl/tasks.py", "from ..features.base import Feature"),
        ("training/data.py", "import training.config.cli"),
        ("training/runtime/ui.py", "from training.build import build_trainer"),
        ("training/features/ema.py", "from training.build import build_trainer"),
        ("training/features/ema.py", "from training.features.curriculum import CurriculumFeature"),
        ("training/features/ema.py", "from . import curriculum"),
        ("training/sigma_trainer.py", "from training.features import FEATURES"),
        ("training/sigma_trainer.py", "from training.features.ema import EmaFeature"),
        ("training/sigma_trainer.py", "from model.sigma_llm import SigmaLLM"),
        ("training/config/sections.py", "import torch"),
        ("training/config/sections.py", "from torch import nn"),
        ("train_sigma.py", "import tests"),
        ("training/ema.py", "@register_feature\nclass A: pass"),
        ("training/ema.py", "@FEATURES.register('ema')\ndef f(): pass"),
        ("training/ema.py", "import importlib\nimportlib.import_module('x')"),
        ("training/ema.py", "__import__('x')"),
        ("training/ema.py", "import pkgutil\npkgutil.resolve_name('x')"),
        ("training/ema.py", "def f():\n    global x\n    x = 1"),
        ("training/ema.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
        ("scripts/soak.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
        ("training/ema.py", LONG_FUNCTION),
        ("scripts/soak.py", LONG_FUNCTION),
        ("model/__init__.py", "from model.sigma_llm import SigmaLLM"),
        ("training/rl/__init__.py", "TASKS = load()"),
        ("training/features/__init__.py", "def build(): pass"),
    ],
)
def test_a_broken_rule_is_found(path, source):
    assert len(faults_of(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/mla.py", "from model.sequence import SequenceContext\nimport torch"),
        ("evolution/genome.py", "from model.config import SigmaModelConfig"),
        ("training/instant.py", "from model.bitlinear import BitLinear\nimport torch"),
        ("training/build.py", "from training.features import FEATURES"),
        ("training/modes/plan.py", "from training.build import build_model"),
        ("training/features/ema.py", "from training.features.base import Feature"),
        ("training/features/ema.py", "from training.features import base"),
        ("training/features/__init__.py", "from training.features.ema import E\nFEATURES = (E,)"),
        ("training/sigma_trainer.py", "from training.features.base import FeatureSet"),
        ("training/config/sections.py", "from model.config import QUANT_MODES"),
        ("training/ema.py", "@torch.library.register_fake('a::b')\ndef f(): pass"),
        ("model/sigma_kernel_src.py", LONG_FUNCTION),
        ("model/__init__.py", '"""Networks."""\nNAMES = ("a", "b")'),
        ("scripts/ablate.py", "from training.build import build_trainer"),
        ("training/modes/self_check.py", "import pkgutil\npkgutil.resolve_name('x')"),
        ("training/trainingmodes.py", "import modeling, torchlike"),
    ],
)
def test_what_the_design_allows_is_no_fault(path, source):
    assert faults_of(path, source) == []


@pytest.mark.parametrize("module", ["training.config.cli", "train_sigma"])
def test_flags_are_read_without_torch(module):
    """The whole chain of imports, which no single file shows."""
    code = f"import sys, {module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.stdout == "set()\n", run.stderr
