"""No connection but to the allowed host, by what the interpreter itself reports of sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
reached = set()
def watch(event, args):
    if event == "socket.connect":
        reached.add(str(args[1][0]))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        reached.add(str(args[0]))
sys.addaudithook(watch)

from tests.fakeworld.clients import drain, random_faults
from tests.fakeworld.faults import FINAL
from tests.fakeworld.server import FakeWorld
from tests.training.sources import test_network_faults as trials

with FakeWorld() as world:
    trials.serve_crawl(world, files=2, pages=3)
    files = {"train-0.parquet": trials.parquet_bytes(trials.make_rows("f", 9))}
    trials.FakeHub(world).datasets["own/edu"] = trials.FakeDataset(files=files)
    given = 0
    for make_source in (trials.make_crawl, trials.make_hub):
        for kind in (None, *FINAL):
            for seed in range(3):
                faults = random_faults(str(kind), seed=seed)
                with world.planned(faults if kind else lambda seen: None):
                    source = make_source(world)
                    given += len(drain(source)[0])
                    source.close()
    assert given > 20, given
if len(sys.argv) > 1:  # the control
    import socket
    try:
        socket.create_connection(("127.0.0.2", 9), timeout=1)
    except OSError:
        pass
print(sorted(reached))
"""


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_the_allowed_address_is_reached():
    assert run() == "['127.0.0.1']"


def test_control_another_address_would_be_seen():
    assert run("control") == "['127.0.0.1', '127.0.0.2']"
