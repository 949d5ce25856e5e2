"""Guards of a run's honesty: nothing changed under way, nothing enabled was idle, nothing leaked.

- Fingerprints: sha256 of every source file and asset, the resolved settings and the seeds go to
  `<output_dir>/integrity_manifest.json` and are compared at every checkpoint and on resume, against
  the files that the run began with.
- Feature usage: a run too short for an enabled feature is refused at its start; an enabled feature
  that never had an effect fails it at its end.
- The hidden evaluation is started from here, in another process (hidden_process.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from training.config.presets import to_dict, without_secrets
from training.config.sigma_config import SigmaConfig
from training.hidden_process import COLUMNS, HiddenEvalProcess
from training.runtime.atomic_io import FileOps, replace_file
from training.runtime.environment import PROJECT_ROOT, config_hash, versions
from training.runtime.manifest import is_leftover

SCHEMA = 1
MANIFEST_NAME = "integrity_manifest.json"
SOURCES = ("train_sigma.py", "model", "training", "evolution", "research")
ASSETS = ("assets", "training/hidden_eval_manifest.json")


class TamperedSource(RuntimeError):
    """A file of the program is not what the run began with."""


@dataclass(slots=True, kw_only=True, frozen=True)
class Change:
    """A tracked file with the sha256 it should have and the one it has; "" = there is none."""

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return (
            f"{self.file} was changed: expected sha256 {self.expected or 'none (a new file)'}, "
            f"found {self.found or 'no file'}"
        )


def fingerprint_files(root: Path = PROJECT_ROOT) -> dict[str, str]:
    """sha256 of every source file and asset by its path relative to `root`, sorted.

    Line ends of source files do not count. A frozen program has no sources: its executable stands
    for them.
    """
    found: dict[str, str] = {}
    if getattr(sys, "frozen", False):
        with Path(sys.executable).open("rb") as file:
            found[Path(sys.executable).name] = hashlib.file_digest(file, "sha256").hexdigest()
    for name, pattern in [*((name, "*.py") for name in SOURCES), *((name, "*") for name in ASSETS)]:
        path = root / name
        for file in [path] if path.is_file() else path.rglob(pattern):
            if file.is_file() and not is_leftover(file.name):
                found[file.relative_to(root).as_posix()] = _file_hash(file)
    return dict(sorted(found.items()))


def changes_between(expected: dict[str, str], found: dict[str, str]) -> list[Change]:
    """Files that differ, are missing or are new."""
    return [
        Change(file=name, expected=expected.get(name, ""), found=found.get(name, ""))
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


class SourceGuard:
    """The integrity manifest of a run directory.

    strict: a changed file is an error and not only a 0 in `integrity_source_match`.
    """

    def __init__(
        self,
        config: SigmaConfig,
        *,
        seeds: dict[str, Any],
        root: Path = PROJECT_ROOT,
    ) -> None:
        self.path = Path(config.run.output_dir) / MANIFEST_NAME
        self._root = root
        self._strict = config.integrity.strict_runtime_audit
        self._expected = fingerprint_files(root)
        self._changes: list[Change] = []
        self._document: dict[str, Any] = {
            "schema": SCHEMA,
            "created_utc": _now(),
            "config_hash": config_hash(config),
            "config": to_dict(without_secrets(config)),
            "seeds": seeds,
            "versions": versions(),
        }

    @property
    def matches(self) -> bool:
        return not self._changes

    def expect_beginning(self) -> None:
        """Compare with the files a resumed run began with; call before anything is written.

        TamperedSource when one differs and the audit is strict; ValueError when the manifest is
        damaged. A run without a manifest begins now.
        """
        try:
            began = json.loads(self.path.read_text(encoding="utf-8"))
            files, created = dict(began["files"]), began["created_utc"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} cannot be read ({error}); restore it, remove it to begin a new "
                "record, or use another --output-dir"
            ) from error
        self._changes = changes_between(files, self._expected)
        self._expected = files
        self._document["created_utc"] = created
        self._refuse_changes(
            "restore it, start anew with --no-resume, or accept the change with "
            "--no-strict-runtime-audit"
        )

    def write(self, *, step: int) -> None:
        """Replace the manifest; `verification` is the result of the latest comparison."""
        document = {
            **self._document,
            "files": self._expected,
            "verification": {
                "step": step,
                "time_utc": _now(),
                "source_match": self.matches,
                "changed": [str(change) for change in self._changes],
            },
        }
        content = json.dumps(document, indent=1, sort_keys=True) + "\n"
        replace_file(FileOps(), self.path, content.encode())

    def verify(self, step: int) -> None:
        """Compare the files on disk again; TamperedSource if the audit is strict."""
        self._changes = changes_between(self._expected, fingerprint_files(self._root))
        try:
            self.write(step=step)
        finally:  # also where that cannot be written down
            self._refuse_changes(
                "restore it and resume, or resume with --no-strict-runtime-audit to accept it"
            )

    def _refuse_changes(self, advice: str) -> None:
        if not self._changes or not self._strict:
            return
        more = len(self._changes) - 1
        others = f" and {more} more" if more else ""
        raise TamperedSource(f"{self._changes[0]}{others}; {advice}")


class IntegrityGuards:
    """All guards of one run behind the interface that the trainer knows (training/audit.py).

    sources, hidden: None where their flags switch them off.
    """

    def __init__(
        self,
        config: SigmaConfig,
        *,
        sources: SourceGuard | None,
        hidden: HiddenEvalProcess | None,
        message: Callable[[str], object],
    ) -> None:
        self._proof = config.run.proof_mode
        self._strict_usage = config.integrity.strict_feature_usage
        self._sources = sources
        self._hidden = hidden
        self._message = message

    def open(self) -> None:
        """Write the manifest; called once the run directory is locked."""
        if self._sources is not None:
            self._sources.write(step=0)

    def observe(self, step: int, model: nn.Module) -> None:
        if self._hidden is not None:
            self._hidden.observe(step, model)

    def metrics(self) -> dict[str, Any]:
        hidden = {"hidden_eval_step": None, **dict.fromkeys(COLUMNS)}
        return {
            "integrity_guards_enabled": int(self._sources is not None),
            "integrity_source_match": None if self._sources is None else int(self._sources.matches),
            **(hidden if self._hidden is None else self._hidden.metrics()),
        }

    def verify(self, step: int) -> None:
        if self._sources is None:
            return
        try:
            self._sources.verify(step)
        except OSError as error:
            # A full disk or a busy file is no tampering, and must not cost the run.
            self._message(f"{MANIFEST_NAME} not written: {error}")

    def judge(self, idle_features: list[str]) -> None:
        """An enabled feature that never acted is a finding; here it may be an error."""
        if not idle_features:
            return
        finding = f"enabled features without a single effect: {', '.join(idle_features)}"
        if self._proof:
            raise RuntimeError(f"proof mode: {finding} (0 effective calls)")
        if self._strict_usage:
            raise RuntimeError(
                f"strict feature usage: {finding} (0 effective calls); switch them off, or accept "
                "it with --no-strict-feature-usage"
            )
        self._message(f"finding: {finding}")

    def state_dict(self) -> dict[str, Any]:
        return {} if self._hidden is None else {"hidden": self._hidden.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, step: int, model: nn.Module) -> None:
        if self._hidden is not None and "hidden" in state:
            self._hidden.load_state_dict(state["hidden"], step=step, model=model)

    def close(self) -> None:
        if self._hidden is not None:
            self._hidden.close()


def check_steps(first_steps: dict[str, int], *, steps: int) -> None:
    """RuntimeError when a run ends before an enabled feature can start."""
    late = {name: needed for name, needed in first_steps.items() if needed > steps}
    if late:
        listed = ", ".join(f"{name} (needs {needed})" for name, needed in late.items())
        raise RuntimeError(
            f"--steps {steps} is too small for enabled features: {listed}; give --steps "
            f"{max(late.values())} or more, switch them off, or add --no-strict-feature-usage"
        )


def _file_hash(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".py":
        content = content.replace(b"\r\n", b"\n")
    return hashlib.sha256(content).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
