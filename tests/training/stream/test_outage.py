"""Failures cost time and turns, are counted and said, and never change what a source gives."""

import json
import threading

import pytest

from tests.training.fake_sources import FakeClock, FakeSource, permanent, transient
from tests.training.mixed import digest, mixed_stream, take, three_sources
from training.runtime.state_tree import join_state, split_state
from training.stream.shards import SpoolStore

HOUR_S = 3600.0


def saved(stream):
    tensors, plain = split_state(stream.state_dict())
    return join_state(tensors, json.loads(json.dumps(plain)))


def sometimes(rate, *, seed):
    """A failure of that share of calls, by a counter of its own."""
    calls = iter(range(10**9))

    def fails(source):
        draw = (next(calls) * 2_654_435_761 + seed * 97) % 1000
        return transient("http_503") if draw < 1000 * rate else None

    return fails


# With threads the pauses are real: only a low rate is fit for that.
@pytest.mark.parametrize(("workers", "rate"), [(0, 0.02), (0, 0.3), (2, 0.02)])
def test_failed_reads_that_come_back_change_no_token(workers, rate):
    with mixed_stream(three_sources()) as stream:
        expected = digest(take(stream, 120))
    sources = three_sources()
    for number, source in enumerate(sources.values()):
        source.fails = sometimes(rate, seed=number)
    clock = None if workers else FakeClock()
    with mixed_stream(sources, workers=workers, clock=clock) as stream:
        assert digest(take(stream, 120)) == expected
        assert stream.metrics()["data_timeouts"] == 0
        assert any(stream._readers[key].error for key in sources)


def warm(stream):
    """Let every reader work until its spool is full."""
    for reader in stream._readers.values():
        while reader.step() == 0.0:
            pass


def spools(tmp_path, *, max_bytes=256 << 10):
    def make(key):
        (tmp_path / key).mkdir(exist_ok=True)
        return SpoolStore(tmp_path / key, max_bytes=max_bytes)

    return make


def test_an_hour_without_network_delays_no_step_once_the_spool_is_warm(tmp_path):
    clock = FakeClock()
    sources = three_sources()
    options = {"reader": {"shard_documents": 32}}
    with mixed_stream(three_sources(), **options) as stream:
        expected = [digest([batch]) for batch in take(stream, 420)]
    with mixed_stream(sources, clock=clock, store=spools(tmp_path), **options) as stream:
        found = [digest([batch]) for batch in take(stream, 20)]
        warm(stream)
        for source in sources.values():
            source.fails = lambda source: transient() if clock.now < begin + HOUR_S else None
        begin = clock.now
        slept = clock.slept
        calls = sum(source.calls for source in sources.values())
        for _ in range(360):  # a step every ten seconds
            found.append(digest([stream.next_batch()]))
            clock.now += 10.0
            for reader in stream._readers.values():
                reader.step()
        assert clock.now >= begin + HOUR_S and clock.slept == slept
        metrics = stream.metrics()
        assert metrics["data_timeouts"] == metrics["data_fallbacks"] == 0
        asked = sum(source.calls for source in sources.values()) - calls
        assert asked < 3 * (HOUR_S / 60 + 20)  # the breaker leaves a dead source alone
        found += [digest([stream.next_batch()]) for _ in range(40)]
    assert found == expected


def test_without_a_spool_the_same_outage_is_felt(tmp_path):
    """Negative control of the hour above."""
    clock = FakeClock()
    sources = three_sources()
    with mixed_stream(sources, clock=clock, bootstrap_on_failure=True) as stream:
        take(stream, 20)
        warm(stream)
        for source in sources.values():
            source.fails = lambda source: transient()
        for _ in range(360):
            stream.next_batch()
            clock.now += 10.0
        assert stream.metrics()["data_timeouts"] > 0
        assert stream.bootstrap_tokens > 0


def test_a_silent_source_gives_its_turns_to_the_others_and_returns():
    clock = FakeClock()
    sources = three_sources()
    down = {"edu": False}
    sources["edu"].fails = lambda source: transient() if down["edu"] else None
    with mixed_stream(sources, clock=clock, read_timeout_s=2.5) as stream:
        take(stream, 30)
        down["edu"] = True
        take(stream, 150)
        metrics = stream.metrics()
        assert metrics["data_source_stalled_edu"] == 1
        assert metrics["data_timeouts"] == 1  # later draws do not wait for it again
        assert metrics["data_fallbacks"] > 20
        assert any("edu has nothing to give" in text for text in stream.take_messages())
        before = stream.served_tokens["edu"]
        down["edu"] = False
        clock.now += 120.0
        take(stream, 200)
        assert stream.served_tokens["edu"] > before + 1000
        assert stream.metrics()["data_source_stalled_edu"] == 0
        assert any("edu delivers again" in text for text in stream.take_messages())
        assert stream.metrics()["bootstrap_batches_used"] == 0


def test_nothing_of_a_source_is_lost_or_repeated_by_an_outage():
    clock = FakeClock()
    source = FakeSource("hf", key="edu", size=60)
    other = FakeSource("local", key="files", size=60)
    down = [False]
    source.fails = lambda source: transient() if down[0] else None
    texts = []
    with mixed_stream({"edu": source, "files": other}, clock=clock) as stream:
        original = stream._document
        stream._document = lambda key, shard: (
            texts.append((key, stream.cursors[key].record)) or (original(key, shard))
        )
        for round_number in range(12):
            down[0] = round_number % 2 == 1
            clock.now += 100.0
            take(stream, 20)
        places = [
            (cursor.number, cursor.documents, cursor.fallbacks)
            for cursor in stream.cursors.values()
        ]
    assert places[0][2] > 0
    with mixed_stream({"edu": FakeSource("hf", key="edu", size=60)}) as stream:
        opened = []
        plain = stream._document
        stream._document = lambda key, shard: (
            opened.append(stream.cursors[key].record) or (plain(key, shard))
        )
        take(stream, 400)
    records = [record for key, record in texts if key == "edu"]
    assert records == opened[: len(records)]


@pytest.mark.parametrize("workers", [0, 1])
def test_with_the_network_off_a_run_trains_on_the_embedded_text_at_once(workers):
    clock = FakeClock() if workers == 0 else None
    sources = three_sources()
    for source in sources.values():
        source.fails = lambda source: transient("unreachable")
    with mixed_stream(
        sources, workers=workers, clock=clock, bootstrap_on_failure=True, read_timeout_s=0.5
    ) as stream:
        stream.start(patience_s=5.0)
        batches = take(stream, 20)
        assert stream.bootstrap_tokens == sum(batch.input_ids.numel() for batch in batches)
        assert stream.metrics()["bootstrap_batches_used"] == 20
        assert stream.metrics()["data_source_fraction_bootstrap"] == 1.0
        messages = stream.take_messages()
        assert any("training on the embedded text" in text for text in messages)
        assert len(messages) == 4  # one per source and one for the fallback, not one per draw


def test_halt_names_every_source_and_what_to_do():
    clock = FakeClock()
    sources = three_sources()
    for source in sources.values():
        source.fails = lambda source: transient("unreachable")
    with mixed_stream(sources, clock=clock, start_timeout_s=240.0, bootstrap_batches=3) as stream:
        assert all(len(batch.input_ids) == 2 for batch in take(stream, 3))
        with pytest.raises(RuntimeError) as failure:
            stream.next_batch()
    assert clock.now >= 240.0
    for word in (*sources, "unreachable", "--on-all-sources-failed bootstrap", "resumes"):
        assert word in str(failure.value)


def test_a_source_that_turns_permanent_is_left_out_and_the_rest_goes_on():
    sources = three_sources()
    sources["edu"].fails = lambda source: permanent("gone: 404") if source.calls > 60 else None
    with mixed_stream(sources) as stream:
        take(stream, 300)
        assert stream.cursors["edu"].ended == "gone: 404"
        assert any("edu is left out: gone: 404" in text for text in stream.take_messages())


def test_a_state_saved_in_an_outage_resumes_in_it_and_after_it():
    clock = FakeClock()
    sources = three_sources()
    down = [True]
    sources["web"].fails = lambda source: transient() if down[0] else None
    with mixed_stream(sources, clock=clock) as stream:
        take(stream, 40)
        assert stream.cursors["web"].stalled
        state = saved(stream)
        following = digest(take(stream, 60))
    with mixed_stream(sources, clock=clock) as resumed:
        resumed.load_state_dict(state)
        assert resumed.cursors["web"].stalled
        assert digest(take(resumed, 60)) == following
    down[0] = False
    with mixed_stream(sources, clock=clock) as resumed:
        resumed.load_state_dict(state)
        clock.now += 120.0
        take(resumed, 150)
        assert resumed.served_tokens["web"] > 1000


def test_hub_documents_come_first_and_only_while_they_come():
    clock = FakeClock()
    options = {"first_sources": ("edu",), "first_documents": 30}
    with mixed_stream(three_sources(), clock=clock, **options) as stream:
        while stream.cursors["edu"].documents < 30:
            stream.next_batch()
            assert stream.served_tokens["web"] == 0
        take(stream, 60)
        assert stream.served_tokens["web"] > 0
    sources = three_sources()
    sources["edu"].fails = lambda source: transient()
    with mixed_stream(sources, clock=clock, **options) as stream:
        take(stream, 10)
        assert stream.served_tokens["web"] > 0


def test_a_fault_of_the_program_in_a_reader_reaches_the_trainer():
    sources = three_sources()

    def breaks(source):
        raise ZeroDivisionError("a mistake in a source")

    sources["web"].fails = breaks
    hook, threading.excepthook = threading.excepthook, lambda arguments: None
    try:
        with mixed_stream(sources, workers=1) as stream:
            with pytest.raises(RuntimeError, match="reader of source web failed") as failure:
                take(stream, 50)
    finally:
        threading.excepthook = hook
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_closing_stops_every_reader_and_closes_every_source():
    sources = three_sources()
    running = threading.active_count()
    with mixed_stream(sources, workers=2) as stream:
        take(stream, 5)
        assert threading.active_count() > running
    assert threading.active_count() == running
    assert all(source.closed for source in sources.values())


def test_a_read_that_outlasts_the_end_of_the_run_ends_in_silence(monkeypatch):
    monkeypatch.setattr("training.stream.prefetch.CLOSE_S", 0.01)
    begun, leave, said = threading.Event(), threading.Event(), []
    sources = three_sources()

    def waits(source):
        if source.calls > 3:
            begun.set()
            leave.wait(60.0)

    sources["web"].fails = waits
    monkeypatch.setattr(threading, "excepthook", said.append)
    with mixed_stream(sources, workers=1, reader={"chunk_documents": 1}) as stream:
        reader = stream._readers["web"]
        reader.start()
        assert begun.wait(60.0)
    leave.set()
    reader._thread.join(60.0)
    assert not reader._thread.is_alive() and said == []
