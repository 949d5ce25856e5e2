"""Suite R3 in small: real file systems over a recorded disk survive losses of power."""

import itertools

import pytest

from tests.training.runtime.real_disks import FILE_SYSTEMS, obstacle, try_states

EXT4 = FILE_SYSTEMS[0]


@pytest.fixture
def ext4():
    if reason := obstacle(EXT4):
        pytest.skip(reason)
    return EXT4


def test_states_of_ext4_after_a_power_loss(ram_path, ext4):
    found = list(try_states(ram_path, ext4, seed=0, every=16))
    assert len(found) > 36 and set(found) == {""}


def test_saves_that_never_flush_are_noticed(ram_path, ext4):
    """Negative control: `flushed` false leaves out every fsync."""
    found = try_states(ram_path, ext4, seed=0, flushed=False, every=6)
    assert any("acknowledged" in wrong or "lost" in wrong for wrong in itertools.islice(found, 40))


@pytest.mark.soak
@pytest.mark.parametrize("system", FILE_SYSTEMS, ids=lambda system: system.name)
def test_states_of_every_file_system(ram_path, system):
    if reason := obstacle(system):
        pytest.skip(reason)
    assert set(try_states(ram_path, system, seed=1, every=4)) == {""}
