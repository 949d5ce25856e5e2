"""launch.py as a person uses it: real environments, the real pip, offline wheels of a few bytes."""

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile

import pytest

from scripts.environment import ROOT, STAMP, setup_lock

POSIX_ONLY = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals to a process group")
LOCKFILE = "torch==2.13.0\nexample==1.0\npytest==9.0\n"
SOURCES = "__init__ launch launcher environment installer packages pip_output".split()
TORCH = "__version__ = '{version}'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
SHOW_ARGV = "import json, os, sys; print(json.dumps([os.getcwd(), sys.argv[1:]]))\n"
# Stands in for uv: notes its arguments, then takes the CPU build from a folder only it knows.
FAKE_UV = """\
import json, os, pathlib, subprocess, sys
pathlib.Path(os.environ["UV_NOTES"]).write_text(json.dumps(sys.argv[1:]))
if "UV_WHEELS" not in os.environ:
    sys.exit("error: Failed to fetch\\n  cause: dns error\\n  cause: failed to lookup address")
command = [sys.executable, "-m", "pip", "install", "--find-links", os.environ["UV_WHEELS"]]
sys.exit(subprocess.call([*command, "--no-index", "--force-reinstall", sys.argv[-1]]))
"""


def make_wheel(folder, name, version, *, files, requires=()):
    """A wheel with the given files, as small as pip accepts it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags}
    record = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**content, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


def make_torch(folder, version, *, requires=()):
    files = {"torch.py": TORCH.format(version=version)}
    make_wheel(folder, "torch", version, files=files, requires=requires)


class Project:
    """A copy of the launcher with a lockfile of its own and wheels to serve it."""

    def __init__(self, folder):
        self.root = folder / "project"
        self.wheels = folder / "wheels"
        self.venv = self.root / ".venv"
        self.lockfile = self.root / "requirements-cpu.txt"
        (self.root / "scripts").mkdir(parents=True)
        for name in SOURCES:
            source = ROOT / "scripts" / f"{name}.py"
            (self.root / "scripts" / source.name).write_bytes(source.read_bytes())
        (self.root / "train_sigma.py").write_text(SHOW_ARGV)
        self.lockfile.write_text(LOCKFILE)
        for version in ("1.0", "1.1"):
            files = {"example.py": f"version = '{version}'\n"}
            make_wheel(self.wheels, "example", version, files=files)
        make_wheel(self.wheels, "pytest", "9.0", files={"pytest.py": SHOW_ARGV})
        make_wheel(self.wheels, "uv", "0.13.8", files={"uv/__main__.py": FAKE_UV})
        make_torch(self.wheels, "2.13.0")

    def environment(self, **more):
        env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        # A driver would choose the CUDA set; no visible device is a machine without one.
        env |= {"PIP_CONFIG_FILE": os.devnull, "CUDA_VISIBLE_DEVICES": "-1"}
        return env | {name: str(value) for name, value in more.items()}

    def command(self, *arguments):
        return [sys.executable, str(self.root / "scripts" / "launch.py"), *arguments]

    def launch(self, *arguments, folder=None, **variables):
        return subprocess.run(
            self.command(*arguments),
            cwd=folder or self.root,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, *arguments, **variables):
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One project, set up for the first time; the outcome of that run is kept in `first`."""
    project = Project(tmp_path_factory.mktemp("launch"))
    project.first = project.launch("exec", "--", "python", "-c", "import example, torch; print(1)")
    project.stamp = (project.venv / STAMP).read_bytes()
    return project


@pytest.fixture
def project(shared):
    """The finished project, given back to the next test as it was."""
    yield shared
    shared.lockfile.write_text(LOCKFILE)
    (shared.venv / STAMP).write_bytes(shared.stamp)


def complaint(run):
    """The launcher's last line, after a check that there is no traceback."""
    assert "Traceback" not in run.stderr
    return run.stderr.strip().splitlines()[-1]


def test_first_run_makes_the_environment_and_runs_the_program(shared):
    assert shared.first.returncode == 0, shared.first.stderr
    assert shared.first.stdout == "1\n"
    lines = shared.first.stderr.splitlines()
    assert all(line.startswith("launch: ") for line in lines)
    assert "first run" in lines[0] and "torch 2.13.0 on the CPU" in lines[-1]
    assert len(lines) <= 8


def test_second_run_installs_nothing_and_says_nothing(project):
    run = project.launch("exec", "--", "python", "-c", "print(2)", PIP_FIND_LINKS="/nowhere")
    assert (run.returncode, run.stdout, run.stderr) == (0, "2\n", "")


@pytest.mark.parametrize("code", [0, 1, 2, 7])
def test_exit_code_is_the_programs(project, code):
    run = project.launch("exec", "--", "python", "-c", f"raise SystemExit({code})")
    assert run.returncode == code and run.stderr == ""


def test_half_made_environment_is_made_again(project):
    (project.venv / STAMP).unlink()
    # What a copy cut short leaves, and what pip takes for installed.
    next(project.venv.rglob("example.py")).write_text("")
    run = project.launch("exec", "--", "python", "-c", "import example; print(example.version)")
    assert run.stdout == "1.0\n", run.stderr
    assert "it was not finished" in run.stderr.splitlines()[0]


def test_changed_lockfile_is_installed_without_a_new_environment(project):
    before = (project.venv / "pyvenv.cfg").stat().st_mtime_ns
    project.lockfile.write_text(LOCKFILE.replace("example==1.0", "example==1.1"))
    run = project.launch("exec", "--", "python", "-c", "import example; print(example.version)")
    assert run.stdout == "1.1\n", run.stderr
    assert "requirements-cpu.txt has changed" in run.stderr
    assert (project.venv / "pyvenv.cfg").stat().st_mtime_ns == before


def test_missing_package_is_one_line_and_leaves_no_finished_environment(project):
    project.lockfile.write_text(LOCKFILE + "nowhere-to-be-had==1.0\n")
    run = project.launch("exec", "--", "python", "-c", "print('ran')")
    assert run.returncode == 1 and run.stdout == ""
    assert "nowhere-to-be-had==1.0 is not to be had for Python" in complaint(run)
    assert not (project.venv / STAMP).exists()


def test_no_network_is_one_line(project):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        index = f"http://127.0.0.1:{closed.getsockname()[1]}/simple"
        project.lockfile.write_text(LOCKFILE + "other==1.0\n")
        variables = {"PIP_NO_INDEX": "0", "PIP_RETRIES": "1", "PIP_INDEX_URL": index}
        run = project.launch("exec", "--", "true", **variables)
    assert run.returncode == 1
    assert "no connection to the package index" in complaint(run)


def cuda_wheels(project, version):
    """Wheels among which pip finds only a torch that asks for CUDA packages."""
    folder = project.root.parent / f"cuda-{version}"
    make_torch(folder, version, requires=["nvidia-cublas==13.0"])
    make_wheel(folder, "nvidia_cublas", "13.0", files={"nvidia_cublas.py": ""})
    project.lockfile.write_text(LOCKFILE.replace("torch==2.13.0", f"torch=={version}"))
    return f"{folder} {project.wheels}"


LINUX_ONLY = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere PyTorch is the CPU build"
)
SHOW_TORCH = (
    "import torch, importlib.util as u; print(torch.__version__, u.find_spec('nvidia_cublas'))"
)


@LINUX_ONLY
def test_cpu_build_comes_from_uv_when_pip_would_bring_cuda(project, tmp_path):
    make_torch(tmp_path / "uv", "2.14.0+cpu")
    variables = {"PIP_FIND_LINKS": cuda_wheels(project, "2.14.0"), "UV_NOTES": tmp_path / "notes"}
    command = ("exec", "--", "python", "-c", SHOW_TORCH)
    run = project.launch(*command, UV_WHEELS=tmp_path / "uv", **variables)
    assert run.stdout == "2.14.0+cpu None\n", run.stderr
    assert "asking uv for the CPU build" in run.stderr
    notes = json.loads((tmp_path / "notes").read_text())
    assert notes[notes.index("--torch-backend") + 1] == "cpu"
    assert notes[-1] == "torch==2.14.0"


@LINUX_ONLY
def test_default_build_with_a_warning_when_there_is_no_cpu_build(project, tmp_path):
    variables = {"PIP_FIND_LINKS": cuda_wheels(project, "2.15.0"), "UV_NOTES": tmp_path / "notes"}
    run = project.launch("exec", "--", "python", "-c", SHOW_TORCH, **variables)
    assert run.stdout.startswith("2.15.0 ModuleSpec"), run.stderr
    assert "several GB" in run.stderr and "no connection" in run.stderr


def test_second_launch_waits_for_the_first(project):
    project.lockfile.write_text(LOCKFILE + "# changed\n")
    with setup_lock(project.root / ".runtime_cache" / "setup.lock"):
        waiting = project.start("exec", "--", "python", "-c", "print('ran')")
        line = waiting.stderr.readline()
        assert f"another launch (process {os.getpid()})" in line
        assert waiting.poll() is None
    out, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, out) == (0, "ran\n")


def test_two_launches_at_once_install_once(project):
    project.lockfile.write_text(LOCKFILE + "# changed again\n")
    launches = [project.start("exec", "--", "python", "-c", "print('ran')") for _ in range(2)]
    outcomes = [launch.communicate(timeout=60) for launch in launches]
    assert [out for out, _ in outcomes] == ["ran\n", "ran\n"]
    assert sum(error.count("ready after") for _, error in outcomes) == 1


COUNT_INTERRUPTS = """\
import signal, sys, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("listening", flush=True)
end = time.monotonic() + 30
while not seen and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)
print(len(seen), flush=True)
sys.exit(5)
"""


def interrupt_when_listening(process):
    """Ctrl+C as a terminal gives it: to the whole process group. Returns stdout, stderr, code."""
    assert process.stdout.readline() == "listening\n"
    os.killpg(process.pid, signal.SIGINT)
    return (*process.communicate(timeout=30), process.returncode)


@POSIX_ONLY
def test_ctrl_c_reaches_the_program_once_and_its_exit_code_comes_back(project):
    process = project.start("exec", "--", "python", "-c", COUNT_INTERRUPTS)
    assert interrupt_when_listening(process) == ("1\n", "", 5)


@POSIX_ONLY
def test_ctrl_c_where_the_launcher_has_to_wait(project):
    """The Windows way of running a program, tried here: launcher and child both get the signal."""
    code = (
        "import os, sys; from pathlib import Path; from scripts.launcher import run_and_wait\n"
        "argv = [sys.executable, '-c', sys.argv[1]]\n"
        "sys.exit(run_and_wait(argv, env=dict(os.environ), folder=Path.cwd()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, COUNT_INTERRUPTS],
        cwd=project.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert interrupt_when_listening(process) == ("1\n", "", 5)


@POSIX_ONLY
def test_ctrl_c_during_the_set_up_ends_pip_too(project):
    project.lockfile.write_text(LOCKFILE + "other==1.0\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        process = project.start("exec", "--", "true", PIP_NO_INDEX=0, PIP_INDEX_URL=index)
        connection, _ = silent.accept()  # pip is asking, and gets no answer
        with connection:
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            connection.settimeout(30)
            while connection.recv(4096):
                continue  # until pip's end is closed
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "the same command goes on" in errors.splitlines()[-1]


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 10, 13), (3, 14, 0)])
def test_wrong_python_is_one_line(version):
    code = (
        "import runpy, sys\n"
        f"sys.version_info = {version}\n"
        "sys.argv = ['launch.py', 'train']\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'launch.py')!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "3.11, 3.12 or 3.13" in run.stderr and ".".join(map(str, version)) in run.stderr


def is_readable_by_old_pythons(source):
    """Whether a source has none of the syntax that came after Python 2.7 and is likely here."""
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Nonlocal)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, newer) or isinstance(node, ast.Starred):
            return False
        if isinstance(node, ast.arg) and node.annotation is not None:
            return False
        if isinstance(node, ast.FunctionDef) and (node.returns or node.args.kwonlyargs):
            return False
    return source.isascii()


def test_any_python_can_read_the_entry():
    assert is_readable_by_old_pythons((ROOT / "scripts" / "launch.py").read_text())
    assert not is_readable_by_old_pythons("f'{1}'")
    assert not is_readable_by_old_pythons("def f(a: int): pass")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "no command given"),
        (["tarin"], 2, "did you mean `train`?"),
        (["deploy"], 2, "train, test or exec"),
        (["exec", "--"], 2, "needs a command"),
        (["exec", "--", "no-such-program"], 2, "`no-such-program` is neither"),
    ],
)
def test_mistakes_are_one_line(project, arguments, code, words):
    run = project.launch(*arguments)
    assert run.returncode == code and run.stdout == ""
    assert words in complaint(run) and len(run.stderr.splitlines()) == 1


def test_train_takes_the_quickstart_profile_unless_one_is_named(project, tmp_path):
    def argv(*arguments, folder=project.root):
        run = project.launch("train", *arguments, folder=folder)
        return json.loads(run.stdout)

    quickstart = "@profiles/quickstart.txt"
    assert argv() == [str(project.root), [quickstart]]
    assert argv("--steps", "5")[1] == [quickstart, "--steps", "5"]
    assert argv("@mine.txt", "--steps", "5")[1] == ["@mine.txt", "--steps", "5"]
    expected = [str(tmp_path), [f"@{project.root / quickstart[1:]}"]]
    assert argv(folder=tmp_path) == expected


def test_test_runs_pytest_in_the_project(project, tmp_path):
    run = project.launch("test", "-k", "word", folder=tmp_path)
    assert json.loads(run.stdout) == [str(project.root), ["-k", "word"]]


def test_start_costs_little(project):
    """Not a limit in seconds: the ready path must not even load what the set-up needs."""
    code = (
        "import sys; from pathlib import Path; from scripts.environment import ensure_environment\n"
        "ensure_environment(Path.cwd()); import scripts.launcher\n"
        "print({'subprocess', 'scripts.installer', 'tempfile'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=project.root,
        env=project.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout == "set()\n", run.stderr


def test_readme_and_ci_give_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python scripts/launch.py train" in readme
    assert "python scripts/launch.py test" in readme
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").strip().splitlines()
    assert commands[-1] == 'exec "$python" scripts/launch.py test'
