"""The client's replies are right or it says why not: every fault, and where it may go."""

from __future__ import annotations

import random
import threading

import pytest

from tests.fakeworld.clients import first_requests, make_client
from tests.fakeworld.faults import FINAL, LYING, PASSING
from tests.fakeworld.server import Answer, FakeWorld
from training.sources.base import SourceError
from training.sources.connection import allow_hosts
from training.sources.net import FileVersion, HttpClient, retry_after_s

CONTENT = random.Random(7).randbytes(300_000)
SLOW = {"stalled_headers", "stalled_body", "drip", "drip_headers"}
# What can be seen only by one who asks for a part, or who knows what the file was before.
OF_RANGES = {"ignored_range", "other_version", "other_size", "short_content_length"}


@pytest.fixture(scope="module")
def world():
    with FakeWorld() as world:
        world.resources["/file"] = CONTENT
        yield world


@pytest.mark.parametrize("kind", sorted(PASSING))
def test_a_passing_fault_is_survived(world, kind):
    client = make_client()
    _, version = client.read_range(world.url + "/file", start=0, stop=1)
    with world.planned(first_requests(kind, count=2)) as seen:
        content, _ = client.read_range(
            world.url + "/file", start=1000, stop=60_000, version=version
        )
    assert content == CONTENT[1000:60_000]
    assert [request.fault for request in seen[:2]] == [kind, kind]
    # Two redirects to itself are no loop yet.
    assert client.counts["retries"] >= 1 or kind == "redirect_loop"


@pytest.mark.parametrize("kind", sorted(PASSING.keys() - OF_RANGES))
def test_whole_documents_survive_it_too(world, kind):
    with world.planned(first_requests(kind, count=2)):
        assert make_client().read(world.url + "/file", max_bytes=1 << 20).body == CONTENT


@pytest.mark.parametrize("kind", sorted(PASSING))
def test_a_lasting_fault_is_named_as_passing(world, kind):
    client = make_client()
    _, version = client.read_range(world.url + "/file", start=0, stop=1)
    with world.planned(lambda seen: kind) as seen, pytest.raises(SourceError) as caught:
        client.read_range(world.url + "/file", start=10, stop=2000, version=version)
    assert caught.value.transient and caught.value.reason
    # Five attempts; a redirect loop is one of six requests, and a kept connection may be stale.
    assert len(seen) <= 5 * (6 if kind == "redirect_loop" else 2)


@pytest.mark.parametrize("kind", sorted(FINAL))
def test_a_final_answer_is_asked_for_once(world, kind):
    with world.planned(lambda seen: kind) as seen, pytest.raises(SourceError) as caught:
        make_client().read_range(world.url + "/file", start=0, stop=100)
    assert not caught.value.transient
    assert len(seen) == 1


def test_what_came_before_a_fault_is_not_asked_for_again(world):
    for kind in ("truncated_body", "reset_in_body", "stalled_body"):
        with world.planned(first_requests(kind, count=1)) as seen:
            content, _ = make_client().read_range(world.url + "/file", start=100, stop=200_100)
        assert content == CONTENT[100:200_100]
        first, second = (int(str(request.range)[6:].split("-")[0]) for request in seen)
        assert first == 100
        if kind != "reset_in_body":  # a reset may overtake what was sent before it
            assert second == 100_100


def test_progress_is_not_counted_as_failure(world):
    """A line that breaks after every 100 kB still delivers a file that needs more than `retries`
    attempts."""
    client = make_client(retries=0)
    with world.planned(first_requests("truncated_body", count=2)):
        content, _ = client.read_range(world.url + "/file", start=0, stop=300_000)
    assert content == CONTENT and client.counts["truncated"] == 2


def test_a_range_beyond_the_end_is_shortened(world):
    content, version = make_client().read_range(world.url + "/file", start=299_000, stop=400_000)
    assert content == CONTENT[299_000:] and version.size == len(CONTENT)
    with pytest.raises(SourceError, match="416"):
        make_client().read_range(world.url + "/file", start=300_000, stop=400_000)


def test_a_replaced_file_is_noticed(world):
    client = make_client()
    version = FileVersion(size=len(CONTENT), tag='"what it was"')
    with pytest.raises(SourceError) as caught:
        client.read_range(world.url + "/file", start=0, stop=10, version=version)
    assert caught.value.reason == "changed"


def test_a_file_replaced_within_a_range_is_read_anew(world):
    """Half of the old file and half of the new one are no file."""
    world.resources["/replaced"] = b"a" * 200_000
    replaced = threading.Event()

    def plan(seen):
        if seen.number == 1 and not replaced.is_set():
            world.resources["/replaced"] = b"b" * 200_000
            replaced.set()
        return "truncated_body" if seen.number == 0 else None

    with world.planned(plan):
        content, _ = make_client().read_range(world.url + "/replaced", start=0, stop=200_000)
    assert content == b"b" * 200_000


def test_lies_pass_and_are_the_contents_own_business(world):
    """Control for the fault suites: right headers with wrong bytes cannot be seen at this level."""
    for kind in LYING:
        with world.planned(lambda seen, kind=kind: kind):
            content, _ = make_client().read_range(world.url + "/file", start=0, stop=5000)
        assert content != CONTENT[:5000] and len(content) == 5000


def test_too_large_a_document_is_refused_before_it_is_read(world):
    client = make_client()
    with pytest.raises(SourceError, match="more than 1000 bytes") as caught:
        client.read(world.url + "/file", max_bytes=1000)
    assert caught.value.reason == "too_large" and not caught.value.transient

    def endless(handler):
        handler.close_connection = True
        return Answer(body=CONTENT, headers={"Transfer-Encoding": "identity"})

    world.resources["/endless"] = endless
    with pytest.raises(SourceError, match="more than 1000 bytes"):
        client.read(world.url + "/endless", max_bytes=1000)


def test_connections_are_kept_and_a_stale_one_is_replaced(world):
    ports = []
    world.resources["/port"] = lambda handler: (
        ports.append(handler.client_address[1]) or Answer(body=b"x")
    )
    client = make_client(retries=0)
    for _ in range(3):
        client.read(world.url + "/port", max_bytes=10)
    assert len(set(ports)) == 1

    def close_after(handler):
        handler.close_connection = True
        return Answer(body=b"y")

    world.resources["/last"] = close_after
    client.read(world.url + "/last", max_bytes=10)
    assert client.read(world.url + "/port", max_bytes=10).body == b"x"
    client.close()


def test_pauses_double_and_obey_the_server(world):
    pauses: list[float] = []
    client = make_client(retries=3, backoff_s=1.0, sleep=pauses.append)
    with world.planned(first_requests("status_500", count=3)):
        client.read(world.url + "/file", max_bytes=1 << 20)
    assert pauses == [1.0, 2.0, 4.0]
    pauses.clear()
    client = make_client(backoff_s=0.25, sleep=pauses.append)
    with world.planned(first_requests("status_429", count=1)):
        client.read(world.url + "/file", max_bytes=1 << 20)
    assert pauses == [1.0]


def test_a_long_pause_is_left_to_the_caller(world):
    world.resources["/busy"] = lambda handler: Answer(status=429, headers={"Retry-After": "3600"})
    pauses: list[float] = []
    with pytest.raises(SourceError) as caught:
        make_client(sleep=pauses.append).read(world.url + "/busy", max_bytes=10)
    assert caught.value.transient and caught.value.reason == "http_429" and not pauses


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("Sat, 21 Nov 2026 08:00:09 GMT", 9.0),
        ("Sat, 21 Nov 2026 07:00:00 GMT", 0.0),
        ("soon", 0.0),
        ("-3", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after(value, seconds):
    headers = {"retry-after": value, "date": "Sat, 21 Nov 2026 08:00:00 GMT"}
    assert retry_after_s(headers) == seconds


def test_redirects_go_to_allowed_hosts_only(world):
    """The name localhost leads to this very server, and is still not asked."""
    port = world.url.rpartition(":")[2]
    asked = []
    world.resources["/secret"] = lambda handler: asked.append(1) or Answer(body=b"secret")
    for target in (
        f"http://localhost:{port}/secret",
        "http://10.0.0.1/x",
        "file:///etc/hostname",
        "ftp://127.0.0.1/x",
        "http://127.0.0.1:99999/",
        "http://[::1/",
    ):
        world.resources["/away"] = lambda handler, target=target: Answer(
            status=302, headers={"Location": target}
        )
        with pytest.raises(SourceError) as caught:
            make_client().read(world.url + "/away", max_bytes=100)
        assert caught.value.reason == "forbidden_host" and not caught.value.transient, target
    assert not asked


def test_an_allowed_name_that_leads_home_is_refused(world):
    """DNS may say anything; a public name with a private address is not contacted."""
    port = world.url.rpartition(":")[2]
    client = make_client(allow=allow_hosts("localhost"))
    with world.planned(lambda seen: None) as seen, pytest.raises(SourceError) as caught:
        client.read(f"http://localhost:{port}/file", max_bytes=100)
    assert caught.value.reason == "forbidden_address" and not seen


def test_a_token_stays_with_its_host(world):
    with FakeWorld() as other:
        other.resources["/there"] = b"content"
        world.resources["/here"] = lambda handler: Answer(
            status=302, headers={"Location": other.url + "/there"}
        )
        client = make_client()
        with world.planned(lambda seen: None) as seen:
            reply = client.read(
                world.url + "/here", max_bytes=100, headers={"Authorization": "Bearer x"}
            )
        assert reply.body == b"content" and reply.url == other.url + "/there"
        assert [request.authorization for request in seen] == ["Bearer x"]
        assert [request.authorization for request in other.seen] == [None]


def test_an_error_does_not_repeat_a_signature(world):
    with pytest.raises(SourceError) as caught:
        make_client().read(world.url + "/none?Signature=s3cret", max_bytes=100)
    assert "s3cret" not in str(caught.value) and "/none answered 404" in str(caught.value)


def test_many_threads_share_a_client(world):
    client = make_client()
    spans = [(start, start + 5000) for start in range(0, 200_000, 5000)]
    results: dict[int, bytes] = {}

    def read(start: int, stop: int) -> None:
        results[start] = client.read_range(world.url + "/file", start=start, stop=stop)[0]

    threads = [threading.Thread(target=read, args=span) for span in spans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[start] == CONTENT[start:stop] for start, stop in spans)


class BelievingClient(HttpClient):
    """Takes any reply for what it asked for."""

    def read_range(self, url, *, start, stop, version=None, headers=None):
        exchange = self._open(url, {"Range": f"bytes={start}-{stop - 1}"})
        body = bytearray()
        self._fill(exchange, body, limit=stop - start)
        return bytes(body), FileVersion(size=len(CONTENT), tag="")


@pytest.mark.parametrize("kind", ["wrong_range", "truncated_body", "ignored_range"])
def test_control_a_client_that_believes_gets_wrong_bytes(world, kind):
    client = BelievingClient(read_timeout_s=0.05, allow=allow_hosts("127.0.0.1"))
    with world.planned(first_requests(kind, count=1)):
        content, _ = client.read_range(world.url + "/file", start=1000, stop=60_000)
    assert content != CONTENT[1000:60_000]
