"""What is said of sources before the first batch: of hopeless ones and of those that may come."""

import pytest

from tests.training.fake_sources import FakeClock, FakeSource, permanent, transient
from tests.training.mixed import mixed_stream, take, three_sources
from tests.training.small_corpus import TOKENIZER
from training.stream.pipeline import DocumentPipeline


def test_a_wrong_name_is_told_before_the_first_batch():
    sources = three_sources()
    sources["edu"].fails = lambda source: permanent()
    for workers in (0, 1):
        with mixed_stream(sources, workers=workers) as stream:
            with pytest.raises(ValueError, match="set HF_TOKEN"):
                stream.start(patience_s=30.0)


def test_an_empty_source_is_told_before_the_first_batch():
    with mixed_stream({"web": FakeSource(size=0)}) as stream:
        with pytest.raises(ValueError, match="web holds no usable document"):
            stream.start(patience_s=30.0)


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 1), (40, 1)])
def test_so_is_one_of_which_nothing_is_kept(size, workers):
    """Also where it takes more than one shard to see that."""
    pipeline = DocumentPipeline(tokenizer=TOKENIZER, before_window=[lambda text: "dull"])
    source = {"local": FakeSource(size=size)}
    with mixed_stream(source, workers=workers, pipeline=pipeline) as stream:
        with pytest.raises(ValueError, match=r"^--local-path: .*dull.*--no-quality-filter"):
            stream.start(patience_s=30.0)


def test_one_that_fails_for_now_is_told_and_waited_for():
    sources = three_sources()
    sources["edu"].fails = lambda source: transient() if source.calls < 3 else None
    with mixed_stream(sources, clock=FakeClock(), bootstrap_batches=2) as stream:
        stream.start(patience_s=30.0)
        assert [text for text in stream.take_messages() if "edu does not deliver yet: " in text]
        take(stream, 40)
        assert stream.served_tokens["edu"] > 0


def test_a_source_told_at_the_start_is_told_again_only_when_it_has_delivered_since():
    clock, down = FakeClock(), {"edu": True}
    sources = three_sources()
    sources["edu"].fails = lambda source: transient() if down["edu"] else None
    with mixed_stream(sources, clock=clock, read_timeout_s=2.5) as stream:

        def told(steps):
            take(stream, steps)
            return [text for text in stream.take_messages() if "source edu" in text]

        stream.start(patience_s=5.0)
        (first,) = told(60)
        assert "edu does not deliver yet" in first
        down["edu"] = False
        clock.now += 120.0
        assert told(60) == ["source edu delivers again"]
        down["edu"] = True
        (again,) = told(150)
        assert "edu has nothing to give now" in again
