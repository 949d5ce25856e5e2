"""Stores: bounded, whole or absent, and never a shard of another beginning."""

import numpy as np
import pytest

from training.runtime.state_tree import join_state, split_state
from training.stream.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, CircuitBreaker
from training.stream.recent_hashes import RecentHashes
from training.stream.shards import MemoryStore, Shard, SpoolStore, shard_file, snapshot_hash


def make_shard(number, *, documents=3, tokens=50, before="x"):
    generator = np.random.default_rng(number)
    lengths = np.full(documents, tokens)
    return Shard(
        number=number,
        tokens=generator.integers(0, 4000, documents * tokens).astype(np.uint16),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        source_ids=np.full(documents, 9, dtype=np.int16),
        hashes=generator.integers(0, 2**63, documents).astype(np.uint64),
        before=before,
        after={"source": {"index": number}, "epoch": 0, "window": None},
        rejected={"held_out": 1},
        num_read=documents + 1,
    )


def same(left, right):
    arrays = ("tokens", "starts", "source_ids", "hashes")
    plain = ("number", "before", "after", "rejected", "num_read")
    return all(
        np.array_equal(getattr(left, name), getattr(right, name))
        and getattr(left, name).dtype == getattr(right, name).dtype
        for name in arrays
    ) and all(getattr(left, name) == getattr(right, name) for name in plain)


def test_a_shard_survives_the_disk_and_another_life(tmp_path):
    store = SpoolStore(tmp_path, max_bytes=1 << 20)
    shards = [make_shard(number) for number in range(4)]
    for shard in shards:
        store.put(shard)
    later = SpoolStore(tmp_path, max_bytes=1 << 20)
    for shard in shards:
        assert same(later.load(shard.number, before="x"), shard)
    assert later.depth() == 12
    assert later.load(9, before="x") is None


def test_a_shard_of_another_beginning_is_none_and_makes_room(tmp_path):
    store = SpoolStore(tmp_path, max_bytes=1 << 20)
    store.put(make_shard(0))
    assert store.load(0, before="y") is None
    assert not (tmp_path / shard_file(0)).exists()
    memory = MemoryStore(documents=10)
    memory.put(make_shard(0))
    assert memory.load(0, before="y") is None
    assert memory.load(0, before="x") is not None


@pytest.mark.parametrize("where", ["bit", "cut", "empty"])
def test_a_damaged_file_is_none_counted_and_replaced(tmp_path, where):
    store = SpoolStore(tmp_path, max_bytes=1 << 20)
    store.put(make_shard(0))
    path = tmp_path / shard_file(0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"bit": content, "cut": content[:100], "empty": b""}[where])
    assert store.load(0, before="x") is None
    assert store.damaged == 1
    store.put(make_shard(0))
    assert same(store.load(0, before="x"), make_shard(0))


def test_the_spool_stays_within_its_bytes_and_drops_what_was_consumed_first(tmp_path):
    size = len_on_disk(tmp_path / "probe")
    limit = 6 * size + size // 2
    store = SpoolStore(tmp_path, max_bytes=limit)
    produced = consumed = 0
    for _ in range(60):
        while store.has_room(produced):
            store.put(make_shard(produced))
            produced += 1
        on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.shard"))
        assert on_disk <= limit + size
        assert store.load(consumed, before="x") is not None
        consumed += 1
        store.release(consumed)
    assert produced - consumed >= 4
    assert (tmp_path / shard_file(consumed)).exists()
    assert not (tmp_path / shard_file(0)).exists()


def len_on_disk(directory):
    store = SpoolStore(directory, max_bytes=1)
    store.put(make_shard(0))
    return (directory / shard_file(0)).stat().st_size


def test_what_an_earlier_life_left_ahead_does_not_block(tmp_path):
    old = SpoolStore(tmp_path, max_bytes=1 << 20)
    for number in range(8):
        old.put(make_shard(number, before="old"))
    size = (tmp_path / shard_file(0)).stat().st_size
    store = SpoolStore(tmp_path, max_bytes=3 * size)
    for number in range(10):
        assert store.has_room(number)
        assert store.load(number, before="new") is None
        store.put(make_shard(number, before="new"))
        assert store.load(number, before="new") is not None
        store.release(number + 1)


def test_a_disk_that_refuses_keeps_the_shard_in_memory(tmp_path, monkeypatch):
    store = SpoolStore(tmp_path, max_bytes=1 << 20)
    monkeypatch.setattr("training.stream.shards.write_token_file", lambda path, arrays: None)
    store.put(make_shard(0))
    store.put(make_shard(1))
    assert same(store.load(1, before="x"), make_shard(1))
    assert not store.has_room(2)
    store.release(1)
    assert store.load(0, before="x") is None
    assert store.has_room(2)


def test_memory_holds_the_wanted_number_of_documents_and_one_shard_at_least():
    store = MemoryStore(documents=5)
    for number in range(3):
        assert store.has_room(number)
        store.put(make_shard(number))
    assert not store.has_room(3)
    store.release(1)
    assert store.has_room(3)
    small = MemoryStore(documents=1)
    assert small.has_room(0) and small.has_room(1) and small.depth() == 0


def test_the_snapshot_hash_knows_content_not_order():
    assert snapshot_hash({"a": 1, "b": [2]}) == snapshot_hash({"b": [2], "a": 1})
    assert snapshot_hash({"a": 1}) != snapshot_hash({"a": 2})


def test_the_breaker_opens_doubles_its_pause_and_closes():
    breaker = CircuitBreaker()
    now, pauses = 0.0, []
    for _ in range(12):
        assert breaker.wait_s(now) == 0.0
        breaker.fail(now)
        pauses.append(breaker.wait_s(now))
        now += pauses[-1]
    assert pauses[2] == FIRST_PAUSE_S and pauses[3] == pytest.approx(2 * FIRST_PAUSE_S)
    assert pauses[0] < FIRST_PAUSE_S and pauses[-1] == pytest.approx(LONGEST_PAUSE_S)
    assert breaker.is_open and breaker.trips == 10
    breaker.succeed()
    assert not breaker.is_open and breaker.wait_s(now) == 0.0


def test_recent_hashes_are_a_window_and_resume():
    """Against a plain list of the last ones that were let through; all of one source."""
    generator = np.random.default_rng(1)
    window, kept = RecentHashes(50), []
    for step, value in enumerate(generator.integers(0, 120, 3000).tolist()):
        assert window.is_new(value, source=0, epoch=0) == (value not in kept[-50:])
        if value not in kept[-50:]:
            kept.append(value)
        if step in (10, 49, 50, 51, 1234):
            tensors, plain = split_state(window.state_dict())
            window = RecentHashes(50)
            window.load_state_dict(join_state(tensors, plain))
    assert all(RecentHashes(0).is_new(3, source=0, epoch=0) for _ in range(3))


def test_a_source_may_repeat_itself_in_its_next_epoch_only():
    window = RecentHashes(10)
    assert window.is_new(7, source=0, epoch=0)
    assert not window.is_new(7, source=0, epoch=0)
    assert not window.is_new(7, source=1, epoch=0)
    assert window.is_new(7, source=0, epoch=1)
    assert not window.is_new(7, source=0, epoch=1)
    assert not window.is_new(7, source=1, epoch=1)


def test_a_store_that_shrinks_keeps_less_waiting_and_always_the_next():
    store = MemoryStore(documents=64)
    assert store.has_room(0) and store.has_room(5)
    steps = 0
    while store.shrink():
        steps += 1
    assert steps == 7  # 64, 32, ..., 1
    assert store.has_room(1) and not store.has_room(2)
