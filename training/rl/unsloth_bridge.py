"""Whether unsloth has replaced TRL's trainers by its own, and loading it so that it can.

unsloth patches trl, transformers and peft while it is imported: after them it comes too late,
and without CUDA its import raises. So it is imported here only, after asking for CUDA, before
the others, and only when a TRL back end is wanted. It puts generated classes in the place of
trainers; a class whose name begins with "Unsloth" is a hit. Names alone prove little (of the pinned
versions, the patched GRPO calls a method that trl renamed), so `scripts/prove_trl_steps.py` takes a
real SFT and a real GRPO step with whatever classes are there.

unsloth cannot accelerate Sigma's own architecture; everything runs without it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

TRAINERS = (
    "GRPOTrainer",
    "PPOTrainer",
    "SFTTrainer",
    "DPOTrainer",
    "ORPOTrainer",
    "RewardTrainer",
)
PATCHED_LIBRARIES = ("trl", "transformers", "peft")
PREFIX = "Unsloth"
FLAG = "--require-unsloth-trl-patch"


@dataclass(slots=True, kw_only=True, frozen=True)
class UnslothPatch:
    """What was found. targets: trainers that this trl has; hits: those that are unsloth's.

    preloaded: libraries that were there before unsloth could be. reason: why it was not imported.
    """

    imported: bool
    targets: tuple[str, ...] = ()
    hits: tuple[str, ...] = ()
    preloaded: tuple[str, ...] = ()
    reason: str = ""

    @property
    def active(self) -> bool:
        """Every trainer that is there is patched."""
        return bool(self.targets) and self.hits == self.targets

    def metrics(self) -> dict[str, float]:
        """Constant columns of a run: 0 or 1, and two counts."""
        return {
            "unsloth_bootstrap_imported": float(self.imported),
            "unsloth_trl_patch_active": float(self.active),
            "unsloth_trl_patch_hits": float(len(self.hits)),
            "unsloth_trl_patch_targets": float(len(self.targets)),
            **{
                f"unsloth_preloaded_{name}": float(name in self.preloaded)
                for name in PATCHED_LIBRARIES
            },
        }


def load_unsloth(*, required: bool, cuda: bool, cache_directory: Path) -> UnslothPatch:
    """Import unsloth if it can be imported here, and look at TRL's trainers.

    cuda: whether there is a GPU. cache_directory: where unsloth writes the classes it generates; it
    is made if unsloth is imported. RuntimeError if the patch is required and not active, naming
    what was loaded too early, or why unsloth was not imported, or the hits and targets.
    """
    preloaded = modules_before_unsloth(sys.modules)
    reason = _obstacle(cuda=cuda, preloaded=preloaded)
    if reason and required:
        raise RuntimeError(_refusal(UnslothPatch(imported=False, preloaded=preloaded), reason))
    if not reason:
        with _inside(cache_directory):
            import unsloth  # noqa: F401
    targets, hits = patched_trainers()
    patch = UnslothPatch(
        imported=not reason, targets=targets, hits=hits, preloaded=preloaded, reason=reason
    )
    if required and not patch.active:
        raise RuntimeError(_refusal(patch, "some trainers are TRL's own"))
    return patch


def modules_before_unsloth(modules: Mapping[str, Any]) -> tuple[str, ...]:
    """Libraries it patches that are loaded while it is not."""
    if "unsloth" in modules:
        return ()
    return tuple(name for name in PATCHED_LIBRARIES if name in modules)


def patched_trainers() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Trainers that this trl has, and those of them that unsloth has put there; imports trl."""
    try:
        import trl
    except ImportError:
        return (), ()
    classes: dict[str, type] = {}
    for name in TRAINERS:
        try:
            classes[name] = getattr(trl, name)
        except (AttributeError, ImportError, RuntimeError):
            continue  # newer versions have fewer; a lazy import that fails is a missing class too
    return tuple(classes), tuple(name for name in classes if is_patched(classes[name]))


def is_patched(trainer: type) -> bool:
    """Whether the class is one that unsloth generated, told by its name."""
    return trainer.__name__.startswith(PREFIX)


def original_grpo() -> tuple[Any, Any]:
    """TRL's GRPOConfig and GRPOTrainer as they were before unsloth replaced them.

    The replacement leaves no name that leads to them, so their module is loaded a second time,
    from the same file, under another name.
    """
    import trl.trainer.grpo_config
    import trl.trainer.grpo_trainer

    source = trl.trainer.grpo_trainer.__file__
    spec = importlib.util.spec_from_file_location("trl.trainer._grpo_trainer_original", source)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"TRL's own GRPOTrainer cannot be read from {source}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return trl.trainer.grpo_config.GRPOConfig, module.GRPOTrainer


def _obstacle(*, cuda: bool, preloaded: tuple[str, ...]) -> str:
    """Why unsloth cannot be imported now; "" if it can."""
    if preloaded:
        return f"{', '.join(preloaded)} were loaded before unsloth, which is too late for it"
    if not cuda:
        return "unsloth needs CUDA, and there is none here"
    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed"
    return _old_zoo()


def _old_zoo() -> str:
    """unsloth would run pip by itself if its companion were too old; that is never wanted."""
    for line in importlib.metadata.requires("unsloth") or ():
        wanted = Requirement(line)
        if wanted.name.replace("_", "-") != "unsloth-zoo" or wanted.marker is not None:
            continue
        try:
            found = importlib.metadata.version("unsloth-zoo")
        except importlib.metadata.PackageNotFoundError:
            return "unsloth-zoo, which unsloth needs, is not installed"
        if not wanted.specifier.contains(found, prereleases=True):
            return f"unsloth needs {line}, and {found} is installed"
    return ""


def _refusal(patch: UnslothPatch, reason: str) -> str:
    return (
        f"unsloth's patch of TRL is required by {FLAG} and not active: {len(patch.hits)} hits of "
        f"{len(patch.targets) or len(TRAINERS)} targets ({reason}); install what the lockfile pins "
        f"on a machine with CUDA, or add {FLAG.replace('--', '--no-', 1)}"
    )


@contextmanager
def _inside(directory: Path) -> Iterator[None]:
    """Work in `directory`, which is made; unsloth writes to the current folder and imports it."""
    directory.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(directory)
    sys.path.insert(0, str(directory.resolve()))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(directory.resolve()))
