"""No damaged checkpoint is accepted: it goes to quarantine and the one before it is resumed."""

import errno
import random
import shutil

import pytest
import torch

from training.runtime.checkpoint import (
    CheckpointError,
    CheckpointStore,
    IncompatibleCheckpoint,
)

FINGERPRINT = {"--d-model": "8"}


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(9, 7, generator=generator)},
        "optimizer": {"step": torch.tensor(float(step)), "codes": torch.arange(5).to(torch.int8)},
    }


def store(directory, **changes):
    settings = {"max_checkpoints": 5, "fingerprint": FINGERPRINT} | changes
    return CheckpointStore(directory, **settings)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    writer = store(directory)
    for step in (1, 2):
        writer.save(step, tensors(step), {"step": step, "rate": 0.1}, block=True)
    writer.close()
    return directory


def assert_falls_back(directory, *, damaged):
    reader = store(directory)
    loaded = reader.load_newest()
    reader.close()
    assert loaded is not None and loaded.step == 1 and reader.quarantine_count == 1
    assert torch.equal(loaded.tensors["model"]["weight"], tensors(1)["model"]["weight"])
    quarantined = [path.name for path in (directory / "quarantine").iterdir()]
    assert len(quarantined) == 1 and quarantined[0].startswith(damaged)


def copy_of(pristine, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(pristine, target)
    return target, target / "checkpoint_step_00000002"


@pytest.mark.parametrize(
    "seed", [*range(4), *[pytest.param(s, marks=pytest.mark.soak) for s in range(4, 400)]]
)
def test_every_single_bit_flip_is_found(two_checkpoints, tmp_path, seed):
    """250 flips a seed, spread over all files of the newest checkpoint by size."""
    draw = random.Random(seed)
    names = sorted(p.name for p in (two_checkpoints / "checkpoint_step_00000002").iterdir())
    sizes = [(two_checkpoints / "checkpoint_step_00000002" / n).stat().st_size for n in names]
    for _ in range(250):
        directory, newest = copy_of(two_checkpoints, tmp_path / "checkpoints")
        path = newest / draw.choices(names, weights=sizes)[0]
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert_falls_back(directory, damaged=newest.name)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "zero", "stale", "missing", "empty", "longer"])
def test_other_damage_is_found(two_checkpoints, tmp_path, name, damage):
    directory, newest = copy_of(two_checkpoints, tmp_path / "checkpoints")
    path = newest / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "truncate": content[:-3],
                "zero": bytes(len(content)),
                "stale": (directory / "checkpoint_step_00000001" / name).read_bytes(),
                "empty": b"",
                "longer": content + b"\0",
            }[damage]
        )
    assert_falls_back(directory, damaged=newest.name)


def test_an_undamaged_checkpoint_is_accepted(two_checkpoints, tmp_path):
    """Control for all of the above: the same reader takes the same files when nothing is wrong."""
    directory, _ = copy_of(two_checkpoints, tmp_path / "checkpoints")
    reader = store(directory)
    loaded = reader.load_newest()
    reader.close()
    assert loaded is not None and loaded.step == 2 and loaded.state == {"step": 2, "rate": 0.1}
    for group, values in tensors(2).items():
        for name, value in values.items():
            assert torch.equal(loaded.tensors[group][name], value)
    assert not (directory / "quarantine").exists()


def test_without_hashes_the_flips_get_through(two_checkpoints, tmp_path, monkeypatch):
    """Negative control: safetensors alone loads a flipped weight without a word."""
    from safetensors.torch import load_file

    _, newest = copy_of(two_checkpoints, tmp_path / "checkpoints")
    path = newest / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not torch.equal(load_file(path)["weight"], tensors(2)["model"]["weight"])


def test_other_settings_stop_and_name_the_difference(two_checkpoints, tmp_path):
    directory, _ = copy_of(two_checkpoints, tmp_path / "checkpoints")
    reader = store(directory, fingerprint={"--d-model": "16"})
    with pytest.raises(IncompatibleCheckpoint, match="--d-model"):
        reader.load_newest()
    reader.close()
    assert not (directory / "quarantine").exists()


def test_a_full_disk_keeps_the_older_checkpoints(two_checkpoints, tmp_path, monkeypatch):
    directory, _ = copy_of(two_checkpoints, tmp_path / "checkpoints")
    writer = store(directory)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.runtime.checkpoint.write_file", full)
    with pytest.raises(CheckpointError, match="disk full"):
        writer.save(3, tensors(3), {}, block=True)
    monkeypatch.undo()
    loaded = writer.load_newest()
    assert loaded is not None and loaded.step == 2
    writer.save(3, tensors(3), {}, block=True)
    assert writer.last_saved_step == 3
    writer.close()


def test_retention_keeps_the_newest(tmp_path):
    writer = store(tmp_path, max_checkpoints=3)
    for step in range(1, 8):
        writer.save(step, tensors(step), {}, block=True)
    writer.close()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint_step_*"))
    assert kept == [f"checkpoint_step_{step:08d}" for step in (5, 6, 7)]


def test_tensor_files_are_plain_safetensors(two_checkpoints):
    from safetensors import safe_open

    path = two_checkpoints / "checkpoint_step_00000002" / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert list(file.keys()) == ["weight"]
        assert (file.get_tensor("weight") == tensors(2)["model"]["weight"].numpy()).all()
