"""Records of merges on a disk that is full for a while."""

import errno
import json
import os
from contextlib import nullcontext

from training.hydra_service import HydraService
from training.runtime.atomic_io import FileOps


class SilentLearner:
    closed = False

    def close(self) -> None:
        self.closed = True


def refuse(self, descriptor, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def recorded(directory):
    paths = sorted(directory.glob("merge_step_*.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["step"] for path in paths]


def test_records_of_merges_wait_for_a_full_disk(tmp_path, monkeypatch, caplog):
    learner, directory = SilentLearner(), tmp_path / "hydra"
    service = HydraService(
        learner=learner,  # pyright: ignore[reportArgumentType]
        real_batches=lambda step: step,
        timed=nullcontext,
        directory=directory,
    )
    with monkeypatch.context() as patch:
        patch.setattr(FileOps, "write", refuse)
        service.write_merge(1, {"method": "ties"})
    assert recorded(directory) == [] and "steps 1 not written" in caplog.text
    service.write_merge(2, {"method": "ties"})
    assert recorded(directory) == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(FileOps, "write", refuse)
        service.write_merge(3, {"method": "ties"})
    service.close()
    assert recorded(directory) == [1, 2, 3] and learner.closed
