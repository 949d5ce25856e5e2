"""What may stand nowhere in the project: doors for foreign code, machine paths, registry hosts.

R23 of the reliability plan, with a negative control for every rule. The names that are looked for
in texts are put together from halves here, or this file would be the first to be found.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = ("assets/", "shared/")  # texts that other people wrote
UNTRACKED = {".git", ".venv", ".runtime_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}
UNTRACKED |= {"__pycache__", "runs", "checkpoints", "dist", "build", "_internal", "libtorch"}

HOSTS = tuple(
    first + second
    for first, second in (
        ("py", "pi.org"),
        ("pythonho", "sted.org"),
        ("pyto", "rch.org/whl"),
        ("download.pyto", "rch.org"),
        ("np", "mjs.org"),
        ("np", "mjs.com"),
        ("deb.deb", "ian.org"),
        ("archive.ubu", "ntu.com"),
        ("anacon", "da.org"),
        ("crat", "es.io"),
        ("proxy.gol", "ang.org"),
        ("pypi.nvi", "dia.com"),
    )
)
# A home or a work folder of one machine; /usr, /proc, /dev and Program Files are everybody's.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(?:root|work|home|Users|opt|mnt|srv|data)/[\w.-]|(?i:[a-z]:[\\/]+users[\\/]+\w)"
)
TEMPORARY_PATH = re.compile(r"(?<![\w.:/-])/tmp/\w")  # in a result: whose command is it then?


# The one program whose purpose is to run foreign code, inside a sandbox.
MAY_EXECUTE = ("training/rl/sandbox_child.py",)
# Built-in functions and library calls that run or unpickle what they are given.
EXECUTING = ("eval", "exec", "compile")
LOADERS = re.compile(
    r"(c|cloud)?[pP]ickle\.(load|loads|Unpickler)|dill\.loads?|joblib\.load|marshal\.loads?"
    r"|shelve\.open|(pd|pandas)\.read_pickle|torch\.(hub\.load|package\.PackageImporter)"
    r"|torch\.(jit|export)\.load|yaml\.(load|unsafe_load|full_load|load_all)"
    r"|ssl\._create_unverified_context|tempfile\.mktemp"
)
SHELLS = (
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "create_subprocess_shell",
)
# Arguments that must be False wherever they are given: in a call, a dictionary or a definition.
REFUSED = ("trust_remote_code", "allow_pickle", "shell", "remote_code")
UNPICKLERS = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value in (False, 0, None)


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def call_faults(call: ast.Call) -> Iterator[str]:
    """What is wrong with one call."""
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if LOADERS.fullmatch(name) or name in SHELLS or name in EXECUTING:
        yield name
    if name == "torch.load" and not is_true(keywords.get("weights_only", ast.Constant(None))):
        yield "torch.load without weights_only=True"
    if name.endswith(".extractall") and "filter" not in keywords:
        yield "extractall without a filter"
    if "verify" in keywords and is_false(keywords["verify"]):
        yield "verify=False"
    for argument in REFUSED:
        if argument in keywords and not is_false(keywords[argument]):
            yield argument


def code_faults(source: str, *, path: str) -> list[str]:
    """Doors through which a file could let foreign code in."""
    faults = []
    for node in ast.walk(ast.parse(source, filename=path)):
        found: list[str] = []
        if isinstance(node, ast.Call):
            found = list(call_faults(node))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = list(import_faults(node))
        elif isinstance(node, ast.Dict):
            found = [
                str(key.value)
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value in REFUSED and not is_false(value)
            ]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {ast.unparse(target).split(".")[-1] for target in targets}
            # A variable may well be named "shell".
            found = [n for n in names & set(REFUSED) - {"shell"} if not is_false(node.value)]
        elif isinstance(node, ast.arguments):
            found = [name for name in REFUSED if name in opened_defaults(node)]
        if path in MAY_EXECUTE:
            found = [fault for fault in found if fault not in EXECUTING]
        line = getattr(node, "lineno", 0)
        faults += [f"{path}:{line}: {fault}" for fault in found]
    return faults


def import_faults(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Imports that would hide a name from the rules about calls."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname and alias.name in (*UNPICKLERS, "os", "subprocess", "torch"):
                yield f"import {alias.name} under another name"
    elif node.module in UNPICKLERS:
        yield f"from {node.module} import"
    elif node.module in ("torch", "torch.hub", "os", "yaml"):
        yield from (
            f"from {node.module} import {alias.name}"
            for alias in node.names
            if f"{node.module}.{alias.name}"
            in (*SHELLS, "torch.load", "torch.hub.load", "yaml.load")
        )


def opened_defaults(arguments: ast.arguments) -> set[str]:
    """Parameters whose default is something else than False."""
    plain = [*arguments.posonlyargs, *arguments.args]
    with_default = plain[len(plain) - len(arguments.defaults) :]
    pairs = [
        *zip(with_default, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return {name.arg for name, value in pairs if value is not None and not is_false(value)}


def text_faults(text: str, *, path: str) -> list[str]:
    """Registry hosts and paths of one machine."""
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        faults += [f"{path}:{number}: {host}" for host in HOSTS if host in line.lower()]
        found = MACHINE_PATH.search(line)
        if found is None and path.startswith("bench/"):
            found = TEMPORARY_PATH.search(line)
        if found:
            faults.append(f"{path}:{number}: machine path {found[0]}")
    return faults


def project_paths() -> list[str]:
    """Every file of the project: what git tracks or would; without git, what no run has made."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if (ROOT / ".git").exists():
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        paths = [path for path in listing.decode("utf-8").split("\0") if path]
    else:
        files = (file for file in ROOT.rglob("*") if file.is_file())
        relative = (file.relative_to(ROOT) for file in files)
        paths = [path.as_posix() for path in relative if not UNTRACKED & set(path.parts)]
    return [path for path in paths if not path.startswith(NOT_OURS) and (ROOT / path).is_file()]


def project_texts() -> Iterator[tuple[str, str]]:
    """Path and content of the project's text files."""
    for path in project_paths():
        try:
            yield path, (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text


def test_nothing_lets_foreign_code_in():
    sources = {path: text for path, text in project_texts() if path.endswith(".py")}
    assert len(sources) > 20
    faults = [fault for path, text in sources.items() for fault in code_faults(text, path=path)]
    assert not faults, "\n".join(faults)


def test_no_registry_host_and_no_machine_path():
    texts = dict(project_texts())
    assert {"pyproject.toml", ".ci/run", "requirements-cpu.txt"} <= set(texts)
    faults = [fault for path, text in texts.items() for fault in text_faults(text, path=path)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "pickle.loads(data)",
        "cPickle.load(file)",
        "pickle.Unpickler(file)",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "subprocess.run(command, shell=True)",
        "subprocess.Popen(command, shell=flag)",
        "os.system(command)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "AutoModel.from_pretrained(name, **{'trust_remote_code': True})",
        "numpy.load(path, allow_pickle=True)",
        "import pickle as p",
        "import torch as t",
        "from torch import load",
        "from torch.hub import load",
        "from os import system",
        "from marshal import loads",
        "torch.hub.load(repository, name)",
        "torch.jit.load(path)",
        "marshal.loads(data)",
        "shelve.open(path)",
        "pandas.read_pickle(path)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "subprocess.run(command, **{'shell': True})",
        "asyncio.create_subprocess_shell(command)",
        "config.trust_remote_code = True",
        "def load(path, *, trust_remote_code=True): pass",
        "def run(command, shell=True): pass",
        "requests.get(url, verify=False)",
        "archive.extractall(folder)",
        "ssl._create_unverified_context()",
        "tempfile.mktemp()",
    ],
)
def test_a_door_for_foreign_code_is_found(source):
    assert len(code_faults(source, path="x.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "subprocess.run(command, shell=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "json.load(file)",
        "re.compile(text), torch.compile(model), model.eval()",
        "def load(path, *, trust_remote_code=False, shell=None): pass",
        "archive.extractall(folder, filter='data')",
        "from torch import nn, Tensor",
        "import numpy as np",
        "yaml.safe_load(text)",
        "shell = find_shell()",
        "requests.get(url, verify=True)",
        "'shell=True and pickle.load in a text are no calls'",
    ],
)
def test_harmless_code_is_not(source):
    assert code_faults(source, path="x.py") == []


def test_only_the_sandboxed_child_may_execute_text():
    assert code_faults("exec(text)", path=MAY_EXECUTE[0]) == []
    assert code_faults("pickle.loads(data)", path=MAY_EXECUTE[0])


@pytest.mark.parametrize("host", HOSTS)
def test_a_registry_host_is_found(host):
    assert text_faults(f"--index-url https://{host.upper()}/simple", path="x.txt")


@pytest.mark.parametrize(
    "parts",
    [
        ("", "home", "ann", "sigma"),
        ("", "Users", "ann", "x"),
        ("", "root", ".cache"),
        ("", "opt", "x"),
    ],
)
def test_a_machine_path_is_found(parts):
    path = "/".join(parts)
    assert text_faults(f"open('{path}')", path="x.py")
    assert text_faults("C:" + "\\".join(("", "Users", "ann", "sigma")), path="x.bat")
    assert not text_faults(f"relative{path} and model{path}", path="x.md")
    assert not text_faults("/usr/bin/env, /dev/null, /proc/meminfo, C:\\Program Files\\x", path="x")


def test_ruff_is_content():
    """The linter's own words are the assertion's message."""
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "--output-format", "concise", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
