"""Run eco_train.exe under Wine as a user would, and keep what it did as one JSON file.

Every trial is a command, what it must answer, and what it must leave behind; the first thing that
does not hold is the trial's fault. Started by scripts/windows_lab.sh, which makes `DIR/windows`:
the command that runs a Windows program in a folder. Exit code 1 when a trial fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

# Started as a file: the project's folder is not on the path by itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from scripts.windows_lab.controls import BUILDS, CONTROLS, write_build

PE32_PLUS = 0x20B
LIMIT_S = 3600
STEPS = 30
RESUMED_STEPS = 40
KEPT_LINES = 12
KEPT_CHARACTERS = 300
STARTS = 5
PROGRAM = "/lab/build/dist/eco_train/eco_train.exe"
QUICKSTART = "@profiles/quickstart.txt"
CPU = ("--device", "cpu", "--no-require-cuda")
# Sends Ctrl+C as a console does, to every process in it, once the run has written a row of metrics;
# without a console of its own the driver has none to send it in. Passes the exit code on.
CTRL_C_DRIVER = """\
import ctypes, pathlib, subprocess, sys, time
program, metrics, *rest = sys.argv[1:]
kernel32 = ctypes.windll.kernel32
kernel32.FreeConsole()
kernel32.AllocConsole()
streams = dict(stdin=subprocess.DEVNULL, stdout=sys.stdout, stderr=subprocess.STDOUT)
run = subprocess.Popen([program, *rest], **streams)
kernel32.SetConsoleCtrlHandler(None, True)
deadline = time.monotonic() + 1800
path = pathlib.Path(metrics)
while run.poll() is None and time.monotonic() < deadline:
    if path.is_file() and path.read_bytes().count(b"\\n") > 1:
        break
    time.sleep(0.2)
if not kernel32.GenerateConsoleCtrlEvent(0, 0):
    sys.exit("Ctrl+C could not be sent")
sys.exit(run.wait(1800))
"""


class TrialFault(Exception):
    """What did not hold, in one line."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """One trial and what came of it; `facts` are its figures, `said` the end of its output.

    load: processes that wanted a core when it ended, without which its seconds say little.
    """

    name: str
    seconds: float = 0.0
    load: float = 0.0
    exit_code: int | None = None
    fault: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Laboratory:
    """The folder made by windows_lab.sh."""

    root: Path

    @property
    def inside(self) -> Path:
        """What Windows programs see as Z:\\lab."""
        return self.root / "debian/lab"

    @property
    def runs(self) -> Path:
        """Where the trials run: a copy of what lies beside the program."""
        return self.inside / "trials"

    def start(self, *command: str) -> tuple[int, str]:
        """Exit code and output of a Windows program started in the folder of the trials."""
        run = subprocess.run(
            [str(self.root / "windows"), "/lab/trials", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LIMIT_S,
        )
        return run.returncode, run.stdout.decode("utf-8", errors="strict").replace("\r", "")

    def program(self, trial: Trial, *arguments: str, exit_code: int = 0) -> str:
        """Run eco_train.exe for a trial; TrialFault when its exit code is another."""
        return self.expect(trial, PROGRAM, *arguments, exit_code=exit_code)

    def expect(self, trial: Trial, *command: str, exit_code: int = 0) -> str:
        trial.exit_code, output = self.start(*command)
        trial.said = output.splitlines()[-KEPT_LINES:]
        check(trial.exit_code == exit_code, f"exit code {trial.exit_code}, not {exit_code}")
        return output


def check(holds: object, fault: str) -> None:
    """TrialFault with `fault`, which is what the result file says of the trial, unless `holds`."""
    if not holds:
        raise TrialFault(fault)


def rows(directory: Path) -> list[dict[str, float]]:
    """Rows of a run's metrics.jsonl; OSError where it wrote none, ValueError where a line is
    torn."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def last_step(directory: Path) -> int:
    return int(rows(directory)[-1]["step"])


def is_windows_program(laboratory: Laboratory, trial: Trial) -> None:
    """A 64-bit PE file with torch beside it, and what is in the folder."""
    folder = laboratory.inside / "build/dist/eco_train"
    content = (folder / "eco_train.exe").read_bytes()
    header = int.from_bytes(content[0x3C:0x40], "little")
    check(content[header : header + 4] == b"PE\0\0", "eco_train.exe is no PE file")
    magic = int.from_bytes(content[header + 24 : header + 26], "little")
    check(magic == PE32_PLUS, f"the optional header says {magic:#x}, not PE32+")
    check((folder / "_internal/torch/lib/torch_cpu.dll").is_file(), "torch_cpu.dll is missing")
    files = [path for path in folder.rglob("*") if path.is_file()]
    parts = sorted((folder / "_internal").iterdir())
    sizes = {part.name: tree_mib(part) for part in parts}
    trial.facts = {
        "exe_mib": round(len(content) / 2**20, 1),
        "folder_mib": round(sum(path.stat().st_size for path in files) / 2**20, 1),
        "files": len(files),
        "build_s": int((laboratory.inside / "build/seconds.txt").read_text(encoding="utf-8")),
        "largest_mib": dict(sorted(sizes.items(), key=lambda item: -item[1])[:12]),
        "packages": sorted(part.name for part in parts if part.is_dir()),
    }


def tree_mib(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 2**20, 1)


def starts_quickly(laboratory: Laboratory, trial: Trial) -> None:
    """Wall clock of --help, which imports no torch; Wine's own start is included."""
    seconds = []
    for _ in range(STARTS):
        began = time.monotonic()
        output = laboratory.program(trial, "--help")
        seconds.append(time.monotonic() - began)
    check("--require-cuda, --no-require-cuda" in output, "--help does not list --require-cuda")
    began = time.monotonic()
    laboratory.start("/lab/python/python.exe", "-S", "-E", "-c", "pass")
    trial.facts = {
        "help_s_median": round(statistics.median(seconds), 2),
        "help_s_first": round(seconds[0], 2),
        "bare_python_s": round(time.monotonic() - began, 2),
    }


def checks_itself(laboratory: Laboratory, trial: Trial) -> None:
    """Imports, back ends, a cubin, a C stub, assets, a spawned worker, the caches' place."""
    flags = ("--mode", "doctor", "--self-check", "--json")
    output = laboratory.program(trial, QUICKSTART, *CPU, *flags)
    line = next(line for line in output.splitlines() if line.startswith("{"))
    answer = json.loads(line)
    trial.said = []
    trial.facts = {
        entry["name"]: f"{entry['status']}: {entry['found']}" for entry in answer["checks"]
    }
    check(answer["passed"], "a check failed")
    kernels = str(trial.facts.get("kernels", ""))
    check(re.search(r"[1-9]\d* bytes for sm_80", kernels), f"no cubin: {kernels}")
    check(str(trial.facts.get("worker", "")).startswith("ok"), "no spawned worker answered")


def trains(laboratory: Laboratory, trial: Trial) -> None:
    """Steps of the quickstart on the CPU leave metrics, a checkpoint and a report."""
    laboratory.program(trial, QUICKSTART, *CPU, "--steps", str(STEPS))
    directory = laboratory.runs / "runs/quickstart"
    check(last_step(directory) == STEPS, f"the last row is of step {last_step(directory)}")
    check(any((directory / "checkpoints").iterdir()), "no checkpoint")
    report = (directory / "report.html").read_text(encoding="utf-8")
    check("</html>" in report, "report.html is not whole")
    history = rows(directory)
    losses = [row["train_loss"] for row in history if "train_loss" in row]
    check(losses and losses[-1] < losses[0], f"the loss did not fall: {losses}")
    trial.facts = {
        "rows": len(history),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tokens_per_s": history[-1].get("tokens_per_s"),
    }


def resumes(laboratory: Laboratory, trial: Trial) -> None:
    """The same command with more steps goes on where the checkpoint stands."""
    output = laboratory.program(trial, QUICKSTART, *CPU, "--steps", str(RESUMED_STEPS))
    directory = laboratory.runs / "runs/quickstart"
    steps = [int(row["step"]) for row in rows(directory) if "train_loss" in row]
    check(steps[-1] == RESUMED_STEPS, f"the last row is of step {steps[-1]}")
    check(steps == sorted(set(steps)), f"steps were repeated: {steps}")
    check(f"resumed from step {STEPS} " in output, "it did not resume")
    trial.facts = {"steps": steps}


def saves_when_interrupted(laboratory: Laboratory, trial: Trial) -> None:
    """Ctrl+C ends the step, saves and answers 0; the next start goes on from there."""
    directory = laboratory.runs / "runs/interrupted"
    (laboratory.runs / "send_ctrl_c.py").write_text(CTRL_C_DRIVER, encoding="utf-8")
    flags = ("--output-dir", "runs/interrupted", "--checkpoint-dir", "runs/interrupted/checkpoints")
    flags = (QUICKSTART, *CPU, *flags, "--steps", "400", "--log-interval", "1")
    driver = ("/lab/python/python.exe", "send_ctrl_c.py", "Z:" + PROGRAM.replace("/", "\\"))
    laboratory.expect(trial, *driver, "runs/interrupted/metrics.jsonl", *flags)
    stopped = last_step(directory)
    check(0 < stopped < 400, f"stopped at step {stopped}")
    check(any((directory / "checkpoints").iterdir()), "no checkpoint")
    output = laboratory.program(trial, *flags, "--steps", str(stopped + 2))
    check(f"resumed from step {stopped} " in output, "it did not resume")
    check(last_step(directory) == stopped + 2, f"resumed to step {last_step(directory)}")
    trial.facts = {"stopped_at": stopped, "resumed_to": stopped + 2}


def refuses_a_bad_flag(laboratory: Laboratory, trial: Trial) -> None:
    before = sorted(laboratory.runs.rglob("*"))
    output = laboratory.program(trial, "--stpes", "5", exit_code=2)
    check("did you mean --steps?" in output, "no hint at the right flag")
    check(sorted(laboratory.runs.rglob("*")) == before, "something was written")


def reports_a_crash(laboratory: Laboratory, trial: Trial) -> None:
    """A folder where the run must put a file: exit code 1 and a crash JSON."""
    directory = laboratory.runs / "runs/crash"
    (directory / "samples.jsonl").mkdir(parents=True)
    flags = ("--output-dir", "runs/crash", "--checkpoint-dir", "runs/crash/checkpoints")
    laboratory.program(trial, QUICKSTART, *CPU, *flags, "--steps", "20", exit_code=1)
    reports = [path for path in directory.rglob("*crash*.json") if path.is_file()]
    check(len(reports) == 1, f"{len(reports)} crash reports")
    report = json.loads(reports[0].read_text(encoding="utf-8"))
    trial.facts = {"file": reports[0].name, "keys": sorted(report)[:20]}


def takes_backslashes(laboratory: Laboratory, trial: Trial) -> None:
    r"""The mission's way to write a folder, --output-dir runs\sigma_debug, in an args file."""
    text = "--output-dir runs\\sigma_debug\n--checkpoint-dir runs\\sigma_debug\\checkpoints\n"
    (laboratory.runs / "Größe.txt").write_text(f"# Σ\r\n{text}--steps 2\n", encoding="utf-8")
    laboratory.program(trial, QUICKSTART, *CPU, "@Größe.txt")
    check(last_step(laboratory.runs / "runs/sigma_debug") == 2, "no run in runs/sigma_debug")


def freezes_probes(laboratory: Laboratory, trial: Trial) -> None:
    """The probe frozen whole and with parts of the recipe left out: see controls.py."""
    for build in BUILDS:
        seen_as = f"Z:/lab/trials/{build.name}"
        folder = laboratory.runs / build.name
        write_build(build, folder, seen_as=seen_as, project="Z:/lab/project")
        places = (f"--distpath={seen_as}/dist", f"--workpath={seen_as}/work")
        packer = ("/lab/python/python.exe", "-m", "PyInstaller", "--noconfirm", *places)
        laboratory.expect(trial, *packer, f"{seen_as}/probe.spec")
    faults = []
    for control in CONTROLS:
        name = " ".join((control.build, *control.arguments))
        program = f"/lab/trials/{control.build}/dist/probe/probe.exe"
        code, output = laboratory.start(program, *control.arguments)
        said = [line for line in output.splitlines() if control.says in line]
        if not said or (code == 0) != control.works:
            faults.append(f"{name}: exit code {code}, without {control.says!r}")
        answer = said[-1] if said else output
        # Folders of the machine tell nothing.
        trial.facts[name] = re.sub(r"\b[A-Za-z]:/(?:[^/\s:]+/)+", "", answer)[-KEPT_CHARACTERS:]
    trial.said = []
    check(not faults, "; ".join(faults))


TRIALS: tuple[Callable[[Laboratory, Trial], None], ...] = (
    is_windows_program,
    starts_quickly,
    refuses_a_bad_flag,
    checks_itself,
    trains,
    resumes,
    takes_backslashes,
    reports_a_crash,
    saves_when_interrupted,
    freezes_probes,
)


def attempt(action: Callable[[Laboratory, Trial], None], laboratory: Laboratory) -> Trial:
    """Run one trial; what it found wrong is in it."""
    trial = Trial(name=action.__name__)
    began = time.monotonic()
    try:
        action(laboratory, trial)
    except (TrialFault, OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
        trial.fault = f"{type(error).__name__}: {error}"
    trial.seconds = round(time.monotonic() - began, 1)
    trial.load = round(os.getloadavg()[0], 1)
    state = trial.fault or "ok"
    print(f"{trial.name:24} {trial.seconds:7.1f} s  {state}", flush=True)
    return trial


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run eco_train.exe under Wine")
    parser.add_argument("--lab", type=Path, required=True, help="folder made by windows_lab.sh")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", action="append", help="run only this trial (repeatable)")
    given = parser.parse_args(arguments)
    laboratory = Laboratory(root=given.lab)
    beside = laboratory.inside / "build/dist/eco_train"
    shutil.copytree(beside / "profiles", laboratory.runs / "profiles", dirs_exist_ok=True)
    chosen = [trial for trial in TRIALS if not given.only or trial.__name__ in given.only]
    results = [attempt(trial, laboratory) for trial in chosen]
    record = {
        "what": "eco_train.exe built and run under Wine 10, CPU build of the same torch",
        "date": datetime.now(tz=UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "passed": not any(trial.fault for trial in results),
        "trials": [asdict(trial) for trial in results],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    given.output.write_text(text + "\n", encoding="utf-8")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
