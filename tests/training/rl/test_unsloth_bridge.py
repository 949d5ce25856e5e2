"""Loading unsloth and looking at TRL's trainers, with packages that only look like them.

The fakes have the shape of the real ones: trl's trainers in modules of their own, unsloth refusing
to be imported without CUDA and putting generated classes in three places of trl. Each case runs in
a process of its own, for what is loaded first decides everything here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TRAINERS = ("GRPO", "PPO", "SFT", "DPO", "ORPO", "Reward")
FAKE_UNSLOTH = """
import os, sys
if os.environ.get("FAKE_CUDA") != "1":
    raise NotImplementedError("Unsloth: No NVIDIA GPU found?")
assert not {"trl", "transformers", "peft"} & set(sys.modules), "too late"
import trl.trainer
os.makedirs("unsloth_compiled_cache", exist_ok=True)
for name in os.environ["FAKE_PATCHED"].split():
    for kind in ("Trainer", "Config"):
        module = getattr(trl.trainer, f"{name.lower()}_trainer")
        old = getattr(module, name + kind, None)
        if old is None:
            continue
        new = type(f"Unsloth{name}{kind}", (old,) if kind == "Config" else (), {})
        for place in (trl, trl.trainer, module):
            setattr(place, name + kind, new)
"""


def write_fakes(folder: Path, *, trainers: tuple[str, ...] = TRAINERS, zoo: str = "2025.3.1"):
    """Packages trl, unsloth, transformers and peft, and what is known of their versions."""
    trainer = folder / "trl/trainer"
    trainer.mkdir(parents=True)
    exports = []
    for name in trainers:
        config = f"{name.lower()}_config"
        (trainer / f"{config}.py").write_text(f"class {name}Config: pass\n")
        (trainer / f"{name.lower()}_trainer.py").write_text(
            f"from .{config} import {name}Config\nclass {name}Trainer:\n    original = True\n"
        )
        exports.append(
            f"from .{config} import {name}Config\n"
            f"from .{name.lower()}_trainer import {name}Trainer\n"
        )
    (trainer / "__init__.py").write_text("".join(exports))
    (folder / "trl/__init__.py").write_text("__version__ = '0.24.0'\nfrom .trainer import *\n")
    for name in ("transformers", "peft"):
        (folder / f"{name}.py").write_text("class PrinterCallback: pass\n")
    (folder / "unsloth.py").write_text(FAKE_UNSLOTH)
    about = {"unsloth": "2025.3.3", "unsloth_zoo": zoo}
    for name, version in about.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        needs = "Requires-Dist: unsloth_zoo>=2025.3.1\n" if name == "unsloth" else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )


def run(
    folder: Path, *, code: str = "", required: bool = False, cuda: bool = True, patched=TRAINERS
):
    """What load_unsloth found, or the error; `code` runs before it."""
    program = (
        f"{code}\n"
        "import json, pathlib\n"
        "from training.rl.unsloth_bridge import load_unsloth\n"
        f"cache = pathlib.Path({str(folder / 'cache')!r})\n"
        "try:\n"
        f"    patch = load_unsloth(required={required}, cuda={cuda}, cache_directory=cache)\n"
        "except RuntimeError as error:\n"
        "    print(json.dumps({'error': str(error)}))\n"
        "else:\n"
        "    from training.rl.trl_classes import trl_classes\n"
        "    own = [c.__name__ for c in trl_classes()]\n"
        "    print(json.dumps(patch.metrics() | {'reason': patch.reason, 'own': own}))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))),
        "FAKE_CUDA": "1" if cuda else "0",
        "FAKE_PATCHED": " ".join(patched),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_six_of_six_in_the_right_order(tmp_path):
    write_fakes(tmp_path)
    found = run(tmp_path, required=True)
    assert found["unsloth_bootstrap_imported"] == found["unsloth_trl_patch_active"] == 1.0
    assert found["unsloth_trl_patch_hits"] == found["unsloth_trl_patch_targets"] == 6.0
    assert found["unsloth_preloaded_trl"] == found["unsloth_preloaded_transformers"] == 0.0
    # Its classes were generated in the folder it was given, not where the program runs.
    assert (tmp_path / "cache/unsloth_compiled_cache").is_dir()
    assert not (tmp_path / "unsloth_compiled_cache").exists()
    # Our architecture trains with TRL's own classes all the same.
    assert found["own"][:2] == ["GRPOConfig", "GRPOTrainer"]


def test_a_trl_with_fewer_trainers_has_fewer_targets(tmp_path):
    """trl 0.29 and later have no PPO and ORPO trainer at their top."""
    fewer = tuple(name for name in TRAINERS if name not in ("PPO", "ORPO"))
    write_fakes(tmp_path, trainers=fewer)
    found = run(tmp_path, required=True, patched=fewer)
    assert found["unsloth_trl_patch_targets"] == 4.0 and found["unsloth_trl_patch_active"] == 1.0


def test_one_trainer_that_is_not_patched_is_an_error_where_the_patch_is_required(tmp_path):
    write_fakes(tmp_path)
    found = run(tmp_path, required=True, patched=TRAINERS[:5])
    assert "--require-unsloth-trl-patch" in found["error"] and "5 hits of 6" in found["error"]
    found = run(tmp_path, patched=TRAINERS[:5])
    assert found["unsloth_trl_patch_hits"] == 5.0 and found["unsloth_trl_patch_active"] == 0.0


@pytest.mark.parametrize("module", ["trl", "transformers", "peft"])
def test_too_late_names_what_was_loaded_before(tmp_path, module):
    write_fakes(tmp_path)
    found = run(tmp_path, code=f"import {module}", required=True)
    assert module in found["error"] and "before unsloth" in found["error"]
    found = run(tmp_path, code=f"import {module}")
    assert found[f"unsloth_preloaded_{module}"] == 1.0
    assert found["unsloth_bootstrap_imported"] == found["unsloth_trl_patch_active"] == 0.0


def test_without_cuda_it_is_not_even_imported(tmp_path):
    """The real one raises there; so does the fake, which would end this process."""
    write_fakes(tmp_path)
    found = run(tmp_path, cuda=False)
    assert found["unsloth_bootstrap_imported"] == 0.0 and "CUDA" in found["reason"]
    assert found["unsloth_trl_patch_targets"] == 6.0 and found["unsloth_trl_patch_hits"] == 0.0
    found = run(tmp_path, cuda=False, required=True)
    assert "CUDA" in found["error"] and "--no-require-unsloth-trl-patch" in found["error"]


def test_an_old_companion_is_refused_before_unsloth_would_run_pip(tmp_path):
    write_fakes(tmp_path, zoo="2025.2.9")
    assert "2025.2.9" in run(tmp_path)["reason"]


def test_without_trl_the_message_is_that_of_the_back_end(tmp_path):
    write_fakes(tmp_path)
    code = "import sys; sys.modules['trl'] = None"
    program = (
        f"{code}\nfrom training.rl.trl_classes import trl_classes\n"
        "try:\n    trl_classes()\nexcept RuntimeError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.startswith(
        "GRPO backend is set to 'trl' but TRL GRPO classes are unavailable."
    ), done.stderr
    assert "--grpo-backend trl" in done.stdout and "GRPOTrainer" in done.stdout
