"""A configuration becomes a stream over real files: the same one with any workers and any spool."""

import functools
import json
import os
from itertools import pairwise

import numpy as np
import pytest

from tests.training.mixed import digest, take
from tests.training.small_corpus import TOKENIZER, SmallCorpus
from training.build_data import build_evaluation_index, build_stream
from training.config.cli import parse_args, write_resolved
from training.config.data_sections import StreamConfig
from training.data import tokenize_corpus
from training.modes.data import preview
from training.runtime.state_tree import join_state, split_state
from training.sources.embedded import EmbeddedCorpus
from training.stream.contamination import ContaminationIndex
from training.stream.open_stream import (
    BEGINNING_LASTS_S,
    chunks_in_flight,
    deciding_flags,
    open_stream,
    prune_spool,
    worker_count,
)
from training.stream.shards import SpoolStore, shard_file

CORPUS = tokenize_corpus(SmallCorpus(), TOKENIZER)
WORDS = "table index lord commit returns stream value error query every night river".split()


@functools.cache
def held_out_index() -> ContaminationIndex:
    return build_evaluation_index(parse_args([]))


def evaluation_index(config):
    return held_out_index() if config.stream.contamination_check else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 files of ordinary sentences, one of noise, one that repeats, one with held-out text."""
    path = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(3)
    for number in range(80):
        sentences = [
            " ".join([f"In file {number}", *generator.choice(WORDS, 9)]) + "."
            for _ in range(int(generator.integers(4, 30)))
        ]
        (path / f"text{number:02}.txt").write_text("\n".join(sentences), encoding="utf-8")
    (path / "noise.txt").write_text("\x01\x02\x03 ab" * 200, encoding="utf-8")
    (path / "text99.txt").write_text((path / "text07.txt").read_text(), encoding="utf-8")
    held_out = EmbeddedCorpus().validation_text().decode()[20_000:24_000]
    (path / "leak.txt").write_text(held_out, encoding="utf-8")
    return path


def opened(folder, spool, *more):
    config = parse_args(
        ["--data-backend", "local", "--local-path", str(folder), "--seq-len", "64",
         "--batch-size", "2", "--source-read-timeout-sec", "60", "--stream-shuffle-buffer", "40",
         "--bootstrap-seed-batches", "0",
         *more]
    )  # fmt: skip
    return open_stream(
        config,
        tokenizer=TOKENIZER,
        corpus=CORPUS,
        spool_directory=spool,
        evaluation=evaluation_index(config),
    )


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    stream = opened(folder, tmp_path_factory.mktemp("spool"), "--num-workers", "0")
    batches = take(stream, 250)
    stream.close()
    return batches


@pytest.mark.parametrize(("workers", "spool_mb"), [(0, 64), (1, 0), (4, 64)])
def test_files_give_the_same_tokens_however_they_are_read(
    folder, tmp_path, expected, workers, spool_mb, monkeypatch
):
    monkeypatch.setattr(
        "training.stream.open_stream.NETWORK_KINDS", ("local",)
    )  # as if they were far
    flags = ("--num-workers", str(workers), "--spool-max-mb", str(spool_mb))
    for _ in range(2):  # the second time from the spool, if there is one
        stream = opened(folder, tmp_path, *flags)
        assert digest(take(stream, 250)) == digest(expected)
        stream.close()
    assert bool(list(tmp_path.glob("*/*.shard"))) == (spool_mb > 0)


def test_resume_over_real_files(folder, tmp_path, expected):
    stream = opened(folder, tmp_path / "one")
    states = []
    for _ in range(120):
        tensors, plain = split_state(stream.state_dict())
        states.append(join_state(tensors, json.loads(json.dumps(plain))))
        stream.next_batch()
    stream.close()
    for index in (0, 17, 119):
        resumed = opened(folder, tmp_path / f"other{index}", "--num-workers", str(index % 3))
        resumed.load_state_dict(states[index])
        assert digest(take(resumed, 100)) == digest(expected[index : index + 100])
        resumed.close()


@pytest.mark.parametrize("spool_mb", [0, 1])
def test_a_reader_that_has_read_ahead_can_be_sent_anywhere(
    folder, tmp_path, expected, spool_mb, monkeypatch
):
    """A resumed run opens its stream, which reads ahead from the start, and then goes on far in:
    what fills the store by then must not keep it from the shards that are wanted."""
    monkeypatch.setattr("training.stream.open_stream.NETWORK_KINDS", ("local",) * spool_mb)
    monkeypatch.setattr(SpoolStore, "has_room", lambda store, number: number <= store._current + 1)
    flags = ("--source-prefetch", "1", "--spool-max-mb", str(spool_mb), "--num-workers")
    stream = opened(folder, tmp_path / "one", *flags, "0")
    take(stream, 200)
    state = stream.state_dict()
    stream.close()
    resumed = opened(folder, tmp_path / "two", *flags, "1", "--first-batch-timeout-sec", "20")
    reader = resumed._readers["local"]
    with reader._changed:  # until it has nothing more to do
        assert reader._changed.wait_for(lambda: not reader.store.has_room(reader._number), 60.0)
    assert state["cursors"]["local"]["number"] > reader._number
    resumed.load_state_dict(state)
    assert digest(take(resumed, 50)) == digest(expected[200:250])
    resumed.close()


def test_changed_files_are_another_source(folder, tmp_path):
    stream = opened(folder, tmp_path / "spool")
    take(stream, 40)
    state = stream.state_dict()
    stream.close()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    other = opened(copy, tmp_path / "spool")
    with pytest.raises(ValueError, match="source settings"):
        other.load_state_dict(state)
    other.close()


def test_the_preview_tells_shares_speed_and_what_was_left_out(folder, tmp_path):
    stream = opened(folder, tmp_path, "--source-max-epochs", "1")
    report = preview(stream, TOKENIZER, batches=20)
    stream.close()
    assert report["tokens"] == 20 * 2 * 64
    assert report["share"] == {"local": 1.0} and report["tokens_per_s"] > 0
    assert all("In file" in entry["text"] for entry in report["excerpts"][:1])
    assert json.loads(json.dumps(report)) == report
    stream = opened(folder, tmp_path / "all", "--source-max-epochs", "1")
    with pytest.raises(RuntimeError, match="used up"):
        take(stream, 10_000)
    rejected = stream.source_report()["local"]["rejected"]
    stream.close()
    assert rejected["not_text"] == rejected["contaminated"] == 1
    assert rejected["exact_duplicate"] == 1 and rejected["held_out"] >= 1


@pytest.mark.parametrize(
    ("off", "reason"),
    [
        ("--no-quality-filter", "not_text"),
        ("--no-contamination-check", "contaminated"),
    ],
)
def test_a_filter_that_is_off_leaves_nothing_out(folder, tmp_path, off, reason):
    stream = opened(folder, tmp_path, "--source-max-epochs", "1", off)
    with pytest.raises(RuntimeError, match="used up"):
        take(stream, 10_000)
    assert reason not in stream.source_report()["local"]["rejected"]
    stream.close()


def test_settings_that_decide_the_stream_are_in_the_fingerprint_of_a_checkpoint():
    assert deciding_flags(parse_args([])) == {}
    base = ["--data-backend", "hf"]
    flags = deciding_flags(parse_args(base))
    assert flags["--data-backend"] == "hf" and flags["--fineweb-ratio"] == "0.7"
    for more in (["--near-dedup-window", "5"], ["--fineweb-ratio", "0.2"], ["--languages", ""]):
        assert deciding_flags(parse_args(base + more)) != flags
    for same in (["--num-workers", "3"], ["--spool-max-mb", "5"], ["--hf-token", "x"]):
        assert deciding_flags(parse_args(base + same)) == flags


def test_the_token_is_not_written_to_the_run_directory(tmp_path):
    write_resolved(parse_args(["--hf-token", "hf_secret"]), tmp_path)
    for path in tmp_path.iterdir():
        assert "hf_secret" not in path.read_text(encoding="utf-8")


def test_old_spools_make_room_and_the_ones_in_use_stay(tmp_path):
    for number in range(5):
        (tmp_path / f"s{number}").mkdir()
        (tmp_path / f"s{number}" / shard_file(0)).write_bytes(b"x" * 100)
        os.utime(tmp_path / f"s{number}", (number, number))
    prune_spool(tmp_path, keep={tmp_path / "s0"}, max_bytes=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s0", "s4"]
    prune_spool(tmp_path / "none", keep=set(), max_bytes=0)


def test_own_files_need_no_spool(folder, tmp_path):
    stream = opened(folder, tmp_path)
    take(stream, 30)
    stream.close()
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_does_not_begin_with_an_old_spool(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("training.stream.open_stream.NETWORK_KINDS", ("local",))
    stream = opened(folder, tmp_path)
    take(stream, 30)
    stream.close()
    shards = sorted(tmp_path.glob("*/*.shard"))
    before = shards[0].stat().st_mtime - 2 * BEGINNING_LASTS_S
    for path in shards:
        os.utime(path, (before, before))
    stream = opened(folder, tmp_path, "--num-workers", "0")
    take(stream, 3)
    stream.close()
    made = [path.stat().st_mtime for path in shards]
    assert made[0] > before + BEGINNING_LASTS_S
    assert all(later == before for later in made[2:])


def test_workers_follow_the_machine_unless_told():
    assert worker_count(0) == 0 and worker_count(7) == 7
    assert 1 <= worker_count(-1) <= 4
    assert [a <= b for a, b in pairwise(map(worker_count, range(5)))] == [True] * 4


def test_fewer_raw_documents_may_wait_than_the_workers_could_take():
    base = {"prefetch_factor": 4, "stream_tokenize_batch_size": 64}
    for prefetch, workers, chunks in ((2048, 2, 8), (2048, 100, 32), (128, 2, 2), (1, 2, 1)):
        options = StreamConfig(**base, stream_sample_prefetch=prefetch)
        assert chunks_in_flight(options, workers=workers) == chunks
    assert chunks_in_flight(StreamConfig(**base), workers=0) == 1


def test_synthetic_tasks_alone_are_read_when_asked_for(tmp_path):
    config = parse_args(["--synthetic-data", "--data-backend", "hybrid", "--seq-len", "64"])
    stream = build_stream(config, TOKENIZER, CORPUS)
    batches = take(stream, 12)
    stream.close()
    assert {int(number) for batch in batches for number in batch.source_ids.unique()} == {4}
    assert stream.metrics()["data_source_fraction_synthetic"] == 1.0
    assert stream.metrics()["data_rejected"] <= 6  # the held-out ones
    assert deciding_flags(config)["--synthetic-data"] == "True"
