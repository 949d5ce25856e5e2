"""The decisions behind launch.py: which packages, when to make `.venv` again, what to say."""

import errno
import io
import re
import shutil
from dataclasses import replace

import pytest

from scripts import environment, installer
from scripts.environment import (
    ROOT,
    Stamp,
    expected_stamp,
    read_stamp,
    reason_to_rebuild,
    wanted_packages,
    write_stamp,
)
from scripts.installer import Installer, read_pins
from scripts.launcher import explain_os_error
from scripts.packages import (
    CPU,
    CUDA_LINUX,
    CUDA_WINDOWS,
    SetupError,
    choose_packages,
    executables_of,
    python_of,
)
from scripts.pip_output import Progress, explain

STAMP = Stamp(python="3.11", folder="/a/.venv", packages="cpu", lockfile_sha256="0")


@pytest.mark.parametrize(
    ("system", "python", "driver", "packages"),
    [
        ("linux", (3, 11), False, CPU),
        ("linux", (3, 12), True, CUDA_LINUX),
        ("win32", (3, 13), False, CPU),
        ("win32", (3, 13), True, CUDA_WINDOWS),
        ("win32", (3, 12), True, CPU),
        ("darwin", (3, 13), False, CPU),
        ("darwin", (3, 13), True, CPU),
    ],
)
def test_packages_for_a_machine(system, python, driver, packages):
    assert choose_packages(system=system, python=python, driver=driver) is packages


@pytest.mark.parametrize(
    ("held", "driver", "cpu_only", "packages"),
    [
        (None, True, False, CUDA_LINUX),
        (None, True, True, CPU),
        ("cpu", False, False, CPU),
        ("cpu", True, False, CUDA_LINUX),  # a driver was installed since
        ("cpu", True, True, CPU),
        ("cuda-linux", False, False, CUDA_LINUX),  # a card was taken out: no reason to download
        ("cuda-linux", True, True, CUDA_LINUX),
        ("from-the-future", False, False, CPU),
    ],
)
def test_finished_environment_is_kept_unless_the_machine_offers_more(
    monkeypatch, held, driver, cpu_only, packages
):
    monkeypatch.setattr(environment, "has_cuda_driver", lambda: driver)
    monkeypatch.setattr(environment.sys, "platform", "linux")
    found = replace(STAMP, packages=held) if held else None
    assert wanted_packages(found, cpu_only=cpu_only) is packages


def make_interpreter(venv, *, home):
    executables_of(venv).mkdir(parents=True)
    python_of(venv).write_text("")
    (venv / "pyvenv.cfg").write_text(f"home = {home}\nversion = 3.11.7\n")


def test_reasons_to_make_an_environment_again(tmp_path):
    venv = tmp_path / ".venv"
    make_interpreter(venv, home=tmp_path)

    def reason(found):
        return reason_to_rebuild(venv, found=found, expected=STAMP) or ""

    assert reason(STAMP) == ""
    assert reason(replace(STAMP, lockfile_sha256="1")) == ""  # an update will do
    assert "not finished" in reason(None)
    assert "Python 3.12" in reason(replace(STAMP, python="3.12"))
    assert "another folder" in reason(replace(STAMP, folder="/b/.venv"))
    assert "for CUDA" in reason(replace(STAMP, packages="cuda-linux"))
    (venv / "pyvenv.cfg").write_text(f"home = {tmp_path / 'uninstalled'}\n")
    assert "Python is gone" in reason(STAMP)


def test_stamp_survives_a_round_trip_and_any_damage_reads_as_none(tmp_path):
    write_stamp(tmp_path, STAMP)
    assert read_stamp(tmp_path) == STAMP
    path = tmp_path / environment.STAMP
    whole = path.read_bytes()
    for damaged in (whole[:20], b"", b"\xff\xfe", b"[]", b'{"python": "3.11"}'):
        path.write_bytes(damaged)
        assert read_stamp(tmp_path) is None


def test_lockfile_decides_the_stamp_but_its_line_ends_do_not(tmp_path):
    path = tmp_path / CPU.lockfile
    path.write_bytes(b"torch==1.0\nnumpy==2.0\n")
    stamp = expected_stamp(CPU, root=tmp_path)
    path.write_bytes(b"torch==1.0\r\nnumpy==2.0\r\n")
    assert expected_stamp(CPU, root=tmp_path) == stamp
    path.write_bytes(b"torch==1.0\nnumpy==2.1\n")
    assert expected_stamp(CPU, root=tmp_path) != stamp
    path.unlink()
    with pytest.raises(SetupError, match=r"requirements-cpu\.txt is missing"):
        expected_stamp(CPU, root=tmp_path)


@pytest.fixture
def make_installer(tmp_path, monkeypatch):
    """Installers over the project's own lockfiles whose tools are only noted down."""

    def make(packages, *, offered):
        (tmp_path / ".runtime_cache").mkdir(exist_ok=True)
        shutil.copy(ROOT / packages.lockfile, tmp_path)
        made = Installer(tmp_path / ".venv", root=tmp_path, packages=packages, lock=io.BytesIO())
        made.commands = []
        made.run = lambda command, *, doing: made.commands.append(command) or ""
        made.ask_pip = lambda requirement: offered
        return made

    return make


def test_cuda_on_linux_refuses_a_cpu_build_among_pips_sources(make_installer):
    plain = make_installer(CUDA_LINUX, offered={"torch": "2.13.0", "nvidia-cublas": "13.1"})
    assert plain.prepare_torch() == []
    local = make_installer(CUDA_LINUX, offered={"torch": "2.13.0+cpu"})
    assert local.prepare_torch() == ["torch===2.13.0"]


def test_cuda_on_windows_takes_pytorch_through_uv(make_installer):
    made = make_installer(CUDA_WINDOWS, offered={})
    assert made.prepare_torch() == []
    command = made.commands[-1]
    assert command[1:5] == ["-m", "uv", "pip", "install"]
    assert command[command.index("--torch-backend") + 1] == "cu128"
    assert command[-3:] == [
        "torch==2.10.0+cu128",
        "torchvision==0.25.0+cu128",
        "torchaudio==2.10.0+cu128",
    ]


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_cpu_set_elsewhere_is_the_default_build(make_installer, monkeypatch, system):
    made = make_installer(CPU, offered={"torch": "2.13.0", "nvidia-cublas": "13.1"})
    monkeypatch.setattr(installer.sys, "platform", system)
    assert made.prepare_torch() == [] and made.commands == []


def test_python_without_venv_names_the_package(make_installer, monkeypatch):
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"apt install python3\.\d+-venv"):
        make_installer(CPU, offered={}).create()


def test_too_small_a_disk_is_found_before_anything_is_downloaded(make_installer, monkeypatch):
    usage = shutil.disk_usage(ROOT)._replace(free=300_000_000)
    monkeypatch.setattr(installer.shutil, "disk_usage", lambda folder: usage)
    made = make_installer(CPU, offered={})
    with pytest.raises(SetupError, match=r"about 3 GB .* has 0\.3 GB left: free some space"):
        made.create()
    assert made.commands == []


REFUSED = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
    "'<HTTPSConnection>: Failed to establish a new connection: [Errno 101] unreachable')'\n"
    "ERROR: Could not find a version that satisfies the requirement torch==2.13.0\n"
    "ERROR: No matching distribution found for torch==2.13.0\n"
)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (REFUSED, "no connection to the package index"),
        (REFUSED.split("\n", 1)[1], r"torch==2\.13\.0 is not to be had for Python"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "disk is full"),
        ("ERROR: [WinError 112] There is not enough space on the disk\n", "disk is full"),
        (
            "ERROR: [Errno 13] Permission denied: '/x/.venv/lib'\n",
            "no permission .* make the folder",
        ),
        ("ERROR: [WinError 5] Access is denied: 'python.exe'\n", "close programs that use .venv"),
        ("SSLError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed')\n", "PIP_CERT"),
        ("error: x\n  cause: dns error\n  cause: failed to lookup address\n", "no connection"),
        ("Collecting a\nERROR: Cannot install a and b\n\n", "^Cannot install a and b: all of its"),
        ("Traceback\nImportError: DLL load failed\n", "DLL load failed"),
        ("", "silently"),
    ],
)
def test_failures_of_the_tools_become_one_line(tmp_path, output, words):
    line = str(SetupError(*explain(output, log=tmp_path / "setup.log")))
    assert re.search(words, line) and "\n" not in line


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "no permission for /x/.venv: make the folder yours"),
        (errno.EROFS, "no permission for /x/.venv"),
        (errno.EIO, "/x/.venv"),
    ],
)
def test_failed_system_calls_become_one_line(number, words):
    line = explain_os_error(OSError(number, "what it says", "/x/.venv"))
    assert words in line and "\n" not in line


def test_progress_without_a_terminal_is_a_few_lines(tmp_path, capsys):
    progress = Progress("packages", started=0.0, total=3, downloads=tmp_path)
    for line in (
        "Collecting torch==2.13.0 (from -r requirements-cpu.txt (line 25))\n",
        "  Downloading torch-2.13.0-cp311-cp311-win_amd64.whl (191.8 MB)\n",
        "Collecting rich==15.0.0\n",
        "  Downloading rich-15.0.0-py3-none-any.whl (310 kB)\n",
        "Processing /somewhere/numpy-2.4.6-cp311-cp311-win_amd64.whl (from -r requirements)\n",
        "Installing collected packages: numpy, rich, torch\n",
    ):
        progress.read(line)
        progress.show()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^launch: .* s  ", "", line) for line in lines] == [
        "package 1 of 3: torch, 192 MB",
        "copying 3 packages into .venv",
    ]


def test_progress_on_a_terminal_shows_how_much_has_arrived(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment.sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("packages", started=0.0, total=3, downloads=tmp_path)
    progress.read("Collecting torch==2.13.0\n")
    progress.read("  Downloading torch-2.13.0-cp311-cp311-win_amd64.whl (191.8 MB)\n")
    with (tmp_path / "torch.whl").open("wb") as part:
        part.truncate(50_000_000)
    progress.show()
    assert "package 1 of 3: torch, 50 of 192 MB" in capsys.readouterr().err


@pytest.mark.parametrize("packages", [CPU, CUDA_WINDOWS], ids=lambda packages: packages.name)
def test_lockfile_pins_everything_that_the_program_and_its_tests_import(packages):
    text = (ROOT / packages.lockfile).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pinned = re.compile(r"^[a-z0-9-]+==[^\s;*]+( ; .+)?$")
    assert [line for line in lines if not pinned.match(line)] == []
    assert "://" not in text
    needed = "torch transformers tokenizers safetensors numpy rich orjson psutil filelock jinja2"
    needed += " nvidia-ml-py pytest hypothesis scipy ruff"
    pins = read_pins(ROOT / packages.lockfile)
    assert len(pins) == len(lines)
    assert set(needed.split()) <= set(pins)


def test_the_two_lockfiles_agree_where_nothing_forces_them_apart():
    cpu, cuda = (read_pins(ROOT / packages.lockfile) for packages in (CPU, CUDA_WINDOWS))
    differing = {name for name in cpu if name in cuda and cpu[name] != cuda[name]}
    assert differing == {"torch", "fsspec"}  # the EXE's PyTorch; datasets wants an older fsspec
