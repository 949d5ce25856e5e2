"""SIGMA's only entry: parse, check the machine, do what `--mode` says, return an exit code.

torch is imported after parsing, so that `--help` and a mistake answer at once. Exit codes: 0 done
or stopped on request, 1 failure with a crash report, 2 usage (nothing has been written), 130
interrupted before the run began.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from training.config.cli import parse_args
from training.config.menu import choose_profile, list_profiles
from training.config.sigma_config import ConfigError, SigmaConfig
from training.runtime.console import HeldWindow, is_interactive, read_line
from training.runtime.frozen import prepare_frozen
from training.runtime.supervisor import die_with_parent, supervise, take_supervision_mark
from training.runtime.text import one_line

UNMARKED = object()
OWN_PACKAGES = ("evolution", "model", "research", "training")


def main(arguments: list[str]) -> int:
    """Run the program; every expected mistake becomes one line on stderr and exit code 2."""
    try:
        given = arguments or default_arguments(program_directory())
        return begin(given, parse_args(given)) if given else 0
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        return refuse(message)
    except KeyboardInterrupt:
        print("interrupted before the run began", file=sys.stderr)
        return 130


def refusal(error: Exception) -> str | None:
    """What a person is told whose mistake, or whose machine's lack, an error is; None: a failure.

    Both are raised as ValueError, RuntimeError, OSError or a class of their own. What torch raises
    as a class of its own (short memory, a driver) and what only a bug raises is neither.
    """
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            return None
        return f"{error.name} is not installed: start with python scripts/launch.py train"
    failures = NotImplementedError | RecursionError
    if isinstance(error, failures) or type(error).__module__.partition(".")[0] == "torch":
        return None
    if "torch" in sys.modules:
        from training.runtime.memory_guard import is_out_of_memory

        if is_out_of_memory(error):  # the CPU's allocator has no class of its own
            return None
    return str(error) if isinstance(error, ValueError | RuntimeError | OSError) else None


def begin(arguments: list[str], config: SigmaConfig) -> int:
    """Do what is asked, with `--supervised` in a child process."""
    if take_supervision_mark():
        die_with_parent()
    elif config.run.mode == "train" and config.run.supervised:
        return supervise(program_command(), arguments, config)
    with ReportedFailure(config) as failure:
        return dispatch(config)
    return failure.exit_code


def program_command() -> list[str]:
    """How this program was started, without its arguments; an EXE is its own interpreter."""
    frozen = getattr(sys, "frozen", False)
    return [sys.executable] if frozen else [sys.executable, str(Path(__file__).resolve())]


def dispatch(config: SigmaConfig) -> int:
    """Do what `--mode` says; returns the exit code."""
    from training.runtime.directories import cache_directory
    from training.runtime.environment import prepare_caches

    prepare_caches(cache_directory(config))
    match config.run.mode:
        case "train" if config.fractal.arch_search:
            from training.modes import arch_search

            return arch_search.run(config)
        case "train":
            return train(config)
        case "plan":
            from training.modes import plan

            return plan.run(config)
        case "doctor":
            from training.modes import doctor

            return doctor.run(config)
        case "data":
            from training.modes import data

            return data.run(config)
        case "eval":
            from training.modes import evaluate

            return evaluate.run(config)
        case "generate":
            from training.modes import generate

            return generate.run(config)
        case "chat":
            from training.modes import chat

            return chat.run(config)
        case "export":
            from training.modes import export

            return export.run(config)
        case "report":
            from training.modes import report

            return report.run(config)
        case "watch":
            from training.modes import watch

            return watch.run(config)
        case "support":
            from training.modes import support

            return support.run(config)
    raise ConfigError(f"--mode {config.run.mode} is not known")


def train(config: SigmaConfig) -> int:
    """Train; what the machine cannot do is refused before anything is written."""
    from training.build import build_trainer
    from training.runtime.directories import check_directories
    from training.runtime.keep_awake import KeepAwake

    check_directories(config)

    trainer = build_trainer(config)
    with KeepAwake():
        trainer.fit()
    return 0


class ReportedFailure(AbstractContextManager["ReportedFailure"]):
    """Ends a failure of a run with exit code 1, and one line that names its crash report.

    The run has written it and marked the error, `error.crash_report`; that of a failure before the
    run is written here. Where none could or should be (None) the traceback is all there is, so it
    is shown. Refusals and what fails in other modes than training pass through.
    """

    def __init__(self, config: SigmaConfig) -> None:
        self.exit_code = 0
        self._config = config

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        report = getattr(error, "crash_report", UNMARKED)
        if not isinstance(error, Exception):
            return False
        if report is UNMARKED:
            if self._config.run.mode != "train" or refusal(error) is not None:
                return False
            report = report_crash(self._config, error)
        if report is None:
            traceback.print_exception(error)
        where = "no crash report was written" if report is None else f"details in {report}"
        print(one_line(f"failed: {type(error).__name__}: {error}; {where}"), file=sys.stderr)
        self.exit_code = 1
        return True


def report_crash(config: SigmaConfig, error: Exception) -> Path | None:
    """The crash report of what failed before the first step."""
    from training.runtime.crash_report import write_crash_report
    from training.runtime.environment import config_hash

    if not config.run.crash_report_enabled:
        return None
    return write_crash_report(
        Path(config.run.output_dir),
        step=0,
        error=error,
        last_metrics={},
        feature_state={},
        config_hash=config_hash(config),
    )


def default_arguments(directory: Path) -> list[str]:
    """What a start without any argument (a double-click) runs; [] when the person chose to quit.

    The args file beside the program if there is one, else what is chosen from a menu of profiles;
    without a terminal to ask on, its default.
    """
    args_file = directory / "train_sigma_args.txt"
    if args_file.is_file():
        return [f"@{args_file}"]
    profiles = list_profiles(directory / "profiles")
    if not profiles:
        raise ConfigError(
            "no arguments, and neither train_sigma_args.txt nor profiles beside the program: give "
            "@profile.txt or flags; --help lists them"
        )
    chosen = profiles[0]
    if is_interactive():
        chosen = choose_profile(profiles, read_line=read_line, show=print)
    return [f"@{chosen.path}"] if chosen else []


def program_directory() -> Path:
    """Folder of the program: of the EXE when frozen."""
    frozen = getattr(sys, "frozen", False)
    return Path(sys.executable if frozen else __file__).resolve().parent


def refuse(message: str) -> int:
    """Say on stderr, in one line, what is wrong, and return the exit code for wrong usage."""
    print(one_line(f"error: {message}"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    prepare_frozen()
    with HeldWindow() as window:
        window.exit_code = main(sys.argv[1:])
    sys.exit(window.exit_code)
