"""Nothing that trains can reach the hidden evaluation: X15, proved over imports and names.

Three rules over the whole product, each tried on code that breaks it: who may import the sealed
modules (directly or through others), who may name hidden results or their files at all, and that
the trainer only passes an audit's columns on into a row.
"""

import ast

import pytest

from tests.test_architecture import PRODUCT, imported_names, project_files

SEALED = {"training.hidden_eval", "training.hidden_process", "training.integrity_guards"}
# The composition root, the entry and the modes that are no training may reach them (build_data: its
# questions, to keep documents that hold one out of the stream).
OUTSIDE = (
    "training/build.py", "training/build_data.py", "training/build_guards.py",
    "training/build_inference.py", "training/modes/", "train_sigma.py",
)  # fmt: skip
# A mode that does train: it has parts of the composition root and may ask them for nothing hidden.
TRAINING_MODES = ("training/modes/arch_search.py",)
OWN = tuple(f"{name.replace('.', '/')}.py" for name in SEALED)
# Declares the flags; the trainer's process never reads their files.
NAMED_IN_CONFIG = ("training/config/sections.py",)
ROW_READERS = ("training/runtime/recorder.py", "training/sigma_trainer.py")


def product_sources() -> dict[str, str]:
    return {path: text for path, text in project_files() if path.split("/")[0] in PRODUCT}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> product modules that it imports anywhere, each package on the way included."""
    modules = {module_name(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        found = graph.setdefault(module_name(path), set())
        for _, name in imported_names(ast.parse(source), path=path):
            parts = name.split(".")
            prefixes = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
            found |= prefixes & modules
    return graph


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for name in graph[waiting.pop()] - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def import_leaks(sources: dict[str, str]) -> list[str]:
    """Training components from which a sealed module can be reached."""
    graph = import_graph(sources)
    found = {
        path: SEALED & reachable(graph, module_name(path))
        for path in sources
        if not path.startswith((*OUTSIDE, *OWN))
    }
    asked = SEALED | {"training.build_guards"}
    found |= {path: asked & graph[module_name(path)] for path in sources if path in TRAINING_MODES}
    return [f"{path} reaches {', '.join(sorted(names))}" for path, names in found.items() if names]


def name_leaks(sources: dict[str, str]) -> list[str]:
    """Training components that name hidden results, their files or the newest row."""
    leaks = []
    for path, source in sources.items():
        if path.startswith((*OUTSIDE, *OWN, *NAMED_IN_CONFIG)) and path not in TRAINING_MODES:
            continue
        for node in ast.walk(ast.parse(source)):
            docstring = isinstance(node, ast.Constant) and "\n" in str(node.value)
            text = getattr(node, "attr", getattr(node, "id", getattr(node, "value", "")))
            if isinstance(text, str) and not docstring:
                if "hidden_eval" in text or "hidden-eval" in text:
                    leaks.append(f"{path}:{node.lineno}: {text}")
                if text == "last_row" and path not in ROW_READERS:
                    leaks.append(f"{path}:{node.lineno}: reads rows")
    return leaks


def flow_leaks(source: str) -> list[str]:
    """Uses of an audit's answers other than spreading them into the dictionary of a row."""
    tree = ast.parse(source)
    spread = {
        id(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if key is None
    }
    stored = {
        id(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "audit"
    }
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    allowed = {"metrics": spread, "state_dict": stored}
    leaks = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Attribute) and owner.attr == "audit":
                if id(node) not in allowed.get(node.func.attr, alone):
                    leaks.append(f"line {node.lineno}: {ast.unparse(node)}")
    return leaks


def test_no_training_component_reaches_the_hidden_evaluation():
    sources = product_sources()
    assert len(sources) > 60 and {*OWN, *TRAINING_MODES} <= set(sources)
    for folder in ("evolution/", "research/", "training/rl/", "training/features/"):
        checked = [path for path in sources if path.startswith(folder)]
        assert len(checked) > 1 and not any(path.startswith((*OUTSIDE, *OWN)) for path in checked)
    assert import_leaks(sources) == []
    assert name_leaks(sources) == []
    assert flow_leaks(sources["training/sigma_trainer.py"]) == []
    # The rules see something: the composition root does reach all of it.
    graph = import_graph(sources)
    assert reachable(graph, "training.build") >= SEALED
    assert {"training.context", "training.audit"} <= reachable(graph, "training.sigma_trainer")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/replay.py", "from training.hidden_eval import read_manifest"),
        ("training/features/replay.py", "def f():\n    import training.hidden_eval"),
        ("training/rl/tasks.py", "from .. import hidden_eval"),
        ("training/optim/c3o.py", "from training.integrity_guards import IntegrityGuards"),
        ("evolution/search.py", "from training.build_guards import build_guards"),
        ("evolution/uroboros.py", "def f():\n    from training.hidden_eval import read_manifest"),
        ("research/journal.py", "import training.hidden_process"),
        ("training/overlay_trials.py", "from training.build import build_trainer"),
        ("training/build_trials.py", "from training.build_guards import build_guards"),
        ("training/build_rl.py", "import training.integrity_guards"),
        ("training/modes/arch_search.py", "from training.build_guards import build_guards"),
        ("training/context.py", "from training.through import x"),
    ],
)
def test_an_import_that_leaks_is_found(path, source):
    through = {"training/through.py": "from training.modes.evaluate import run"}
    leaks = import_leaks(product_sources() | through | {path: source})
    assert any(leak.startswith(path) for leak in leaks)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("training/features/replay.py", "x = row['hidden_eval_pass']"),
        ("training/optim/c3o.py", "x = config.integrity.integrity_hidden_eval_manifest"),
        ("training/replay.py", "open('training/hidden_eval_manifest.json')"),
        ("evolution/search.py", "path = directory / f'hidden_eval/{step}'"),
        ("training/overlay_trials.py", "score = row['hidden_eval_pass']"),
        ("training/build_trials.py", "score = row['hidden_eval_pass']"),
        ("training/modes/arch_search.py", "score = row['hidden_eval_pass']"),
        ("training/features/replay.py", "x = recorder.last_row"),
    ],
)
def test_a_name_that_leaks_is_found(path, source):
    assert len(name_leaks({path: source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "score = self.services.audit.metrics()['hidden_eval_pass']",
        "ctx.metrics.update(self.services.audit.metrics())",
        "if self.services.audit.metrics(): pass",
        "x = {'score': self.services.audit.metrics()}",
        "lr = self.services.audit.observe(1, model)",
    ],
)
def test_a_use_of_an_audits_answer_is_found(source):
    assert len(flow_leaks(source)) == 1
