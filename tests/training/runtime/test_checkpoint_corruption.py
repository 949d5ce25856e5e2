"""Suite R6: 5,000 damaged checkpoints, each found, set aside, and the one before it resumed."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.runtime.faults import assert_is_example, open_store, save_steps
from training.runtime.checkpoint import CheckpointStore

FLIPS = 1000
NEWEST, BEFORE = "checkpoint_step_00000020", "checkpoint_step_00000010"
ZEROED_BYTES = 64

Damage = Callable[[Path, random.Random], None]


def pick(directory: Path, rng: random.Random, *, by_size: bool = False) -> Path:
    files = sorted(directory.iterdir())
    weights = [path.stat().st_size if by_size else 1 for path in files]
    return rng.choices(files, weights)[0]


def flip_bit(directory: Path, rng: random.Random) -> None:
    """Any bit of the checkpoint, all equally likely."""
    path = pick(directory, rng, by_size=True)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_bit_of_any_file(directory: Path, rng: random.Random) -> None:
    """Small files, the manifest among them, are hit as often as large ones."""
    path = pick(directory, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(directory: Path, rng: random.Random) -> None:
    path = pick(directory, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def extend(directory: Path, rng: random.Random) -> None:
    path = pick(directory, rng)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 40)))


def zero_page(directory: Path, rng: random.Random) -> None:
    path = pick(directory, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = min(len(data), start + ZEROED_BYTES)
    if not any(data[start:end]):
        data[start] = 1  # zeros already: a page of something else
    else:
        data[start:end] = bytes(end - start)
    path.write_bytes(data)


def stale_file(directory: Path, rng: random.Random) -> None:
    """A file of the checkpoint before, as after a write that never arrived."""
    name = pick(directory, rng).name
    shutil.copyfile(directory.parent / BEFORE / name, directory / name)


def swapped_files(directory: Path, rng: random.Random) -> None:
    first, second = rng.sample(sorted(directory.iterdir()), 2)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def edited_manifest(directory: Path, rng: random.Random) -> None:
    """Another digit somewhere: a step, a size, a hash."""
    path = directory / "MANIFEST.json"
    data = bytearray(path.read_bytes())
    place = rng.choice([i for i, byte in enumerate(data) if chr(byte).isdigit()])
    data[place] = ord(str((int(chr(data[place])) + rng.randrange(1, 10)) % 10))
    path.write_bytes(data)


def added_file(directory: Path, rng: random.Random) -> None:
    (directory / f"extra_{rng.randrange(10)}.safetensors").write_bytes(b"")


def removed_file(directory: Path, rng: random.Random) -> None:
    rng.choice([path for path in directory.iterdir() if path.name != "MANIFEST.json"]).unlink()


def renamed_file(directory: Path, rng: random.Random) -> None:
    path = rng.choice([path for path in directory.iterdir() if path.name != "MANIFEST.json"])
    path.rename(path.with_name(f"{path.name}.bak"))


OTHER_DAMAGE = (
    flip_bit_of_any_file,
    truncate,
    extend,
    zero_page,
    stale_file,
    swapped_files,
    edited_manifest,
    added_file,
    removed_file,
    renamed_file,
)


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


class DamagedStore:
    """Two checkpoints, of which the newest is damaged anew in every trial."""

    def __init__(self, directory: Path) -> None:
        save_steps(directory, 10, 20)
        self.directory = directory
        self.store = open_store(directory)
        found = self.store.load_newest()
        assert found is not None and found.step == 20  # undamaged, it is the one resumed
        self._sound = {p.name: p.read_bytes() for p in (directory / NEWEST).iterdir()}

    def survives(self, damage: Damage, rng: random.Random) -> bool:
        """Whether damage was found, the directory set aside and step 10 resumed instead."""
        before = self.store.quarantine_count
        damage(self.directory / NEWEST, rng)
        found = self.store.load_newest()
        aside = list((self.directory / "quarantine").glob("*"))
        gone = not (self.directory / NEWEST).exists()
        for path in aside:
            shutil.rmtree(path)
        shutil.rmtree(self.directory / NEWEST, ignore_errors=True)
        (self.directory / NEWEST).mkdir()
        for name, data in self._sound.items():
            (self.directory / NEWEST / name).write_bytes(data)
        if found is None or found.step != 10 or not gone:
            return False
        assert_is_example(found)
        assert aside[0].name.startswith(f"{NEWEST}-") and len(aside) == 1
        return self.store.quarantine_count == before + 1


def test_a_thousand_single_bit_flips_are_found(ram_path: Path) -> None:
    trials, rng = DamagedStore(ram_path), random.Random(0)
    assert sum(trials.survives(flip_bit, rng) for _ in range(FLIPS)) == FLIPS
    trials.store.close()


@pytest.mark.parametrize("damage", OTHER_DAMAGE, ids=lambda damage: damage.__name__)
def test_other_damage_is_found(ram_path: Path, damage: Damage) -> None:
    trials, rng, count = DamagedStore(ram_path), random.Random(1), 4000 // len(OTHER_DAMAGE)
    assert sum(trials.survives(damage, rng) for _ in range(count)) == count
    trials.store.close()


def test_every_bit_of_a_manifest_matters(ram_path: Path) -> None:
    """All of them, by verdict: upper case for lower case in a hash is a flip too."""
    trials = DamagedStore(ram_path)
    path = ram_path / NEWEST / "MANIFEST.json"
    sound = path.read_bytes()
    for place in range(0, len(sound)):
        data = bytearray(sound)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        found = CheckpointStore.newest_for_inference(ram_path)
        assert found is not None and found.step == 10, place
    trials.store.close()


@pytest.mark.parametrize("name", [".DS_Store", "._model.safetensors", "._MANIFEST.json"])
def test_what_a_file_browser_leaves_is_no_damage(ram_path: Path, name: str) -> None:
    """Nor what an archive or a disk of a Mac, or the index of a storage box, adds to every file."""
    trials = DamagedStore(ram_path)
    (ram_path / NEWEST / name).write_bytes(b"x")
    (ram_path / NEWEST / "@eaDir").mkdir()
    found = trials.store.load_newest()
    assert found is not None and found.step == 20
    trials.store.close()


def test_without_hashes_the_flips_get_through(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: sizes alone let most flips pass, so the suite above sees the hashes."""
    from training.runtime import manifest

    def believe(ops, path, *, limit):
        record = manifest.read_manifest(ops, path.parent).files[path.name]
        return min(path.stat().st_size, limit), record.sha256

    monkeypatch.setattr(manifest, "hash_file", believe)
    trials, rng, found = DamagedStore(ram_path), random.Random(0), 0
    for _ in range(50):
        try:
            found += trials.survives(last_byte_flipped, rng)
        except AssertionError:
            continue
    assert found == 0
    trials.store.close()


def last_byte_flipped(directory: Path, rng: random.Random) -> None:
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1 - rng.randrange(30)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_with_all_damaged_the_answer_is_none_and_all_are_kept_aside(ram_path: Path) -> None:
    save_steps(ram_path, 10, 20)
    for name in (BEFORE, NEWEST):
        flip_bit(ram_path / name, random.Random(3))
    store = open_store(ram_path)
    assert store.load_newest() is None
    assert store.quarantine_count == 2
    assert len(list((ram_path / "quarantine").iterdir())) == 2
    store.close()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_thousand_corruptions_are_found(ram_path: Path, seed: int) -> None:
    trials, rng, kinds = DamagedStore(ram_path), random.Random(seed), (flip_bit, *OTHER_DAMAGE)
    assert sum(trials.survives(rng.choice(kinds), rng) for _ in range(5000)) == 5000
    trials.store.close()
