"""A small hub: file lists, cards, ranges, tokens and error codes, enough for `datasets` itself."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.fakeworld.server import Answer, FakeWorld, Handler, json_answer

TOKEN = "hf_" + "t" * 20
CONVERTED = "refs/convert/parquet"


@dataclass(kw_only=True)
class FakeDataset:
    """A dataset's files by revision; `main` is where they are read when nothing else is asked."""

    files: Mapping[str, bytes]
    card: dict[str, Any] = field(default_factory=dict)
    converted: Mapping[str, bytes] = field(default_factory=dict)
    needs_token: str = ""  # "", "gated" or "private"

    def sha_of(self, files: Mapping[str, bytes]) -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode())
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        """Commit and files at a branch or commit."""
        for branch, files in (("main", self.files), (CONVERTED, self.converted)):
            if files and revision in (branch, self.sha_of(files)):
                return self.sha_of(files), files
        return None


class FakeHub:
    """Datasets by name, served under `world.url`."""

    def __init__(self, world: FakeWorld, *, redirects: bool = False) -> None:
        self.datasets: dict[str, FakeDataset] = {}
        self.redirects = redirects
        name = r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
        for pattern, route in (
            (rf"/api/datasets/{name}", self.describe),
            (rf"/api/datasets/{name}/revision/(?P<revision>.+)", self.describe),
            (rf"/api/datasets/{name}/paths-info/(?P<revision>[^?]+)", self.tell_paths),
            (rf"/api/datasets/{name}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", self.tree),
            (rf"/datasets/{name}/resolve/(?P<place>.+)", self.resolve),
            (r"/cdn/(?P<name>[\w.-]+/[\w.-]+)/(?P<place>.+)", self.serve_file),
        ):
            world.routes.append((re.compile(pattern), self._routed(pattern, route)))

    def _routed(self, pattern: str, route):
        def answer(handler: Handler) -> Answer:
            path = unquote(handler.path.partition("?")[0])
            match = re.fullmatch(pattern, path)
            assert match is not None
            parts = match.groupdict()
            dataset = self.datasets.get(parts["name"])
            token = handler.headers.get("Authorization")
            if dataset is None or (dataset.needs_token == "private" and not token):
                return refusal(404 if token else 401, "RepoNotFound")
            if token not in (None, f"Bearer {TOKEN}"):
                return json_answer({"error": "Invalid credentials"}, status=401)
            return route(handler, dataset, parts)

        return answer

    def describe(self, handler: Handler, dataset: FakeDataset, parts: dict[str, str]) -> Answer:
        found = dataset.at(parts.get("revision") or "main")
        if found is None:
            return refusal(404, "RevisionNotFound")
        sha, files = found
        return json_answer(
            {
                "_id": sha[:24],
                "id": parts["name"],
                "sha": sha,
                "private": False,
                "gated": "auto" if dataset.needs_token == "gated" else False,
                "cardData": dataset.card,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def entries(self, files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
        """Files and folders below a folder."""
        inside = folder.strip("/") + "/" if folder.strip("/") else ""
        listed: list[dict[str, Any]] = []
        folders: set[str] = set()
        for path, content in sorted(files.items()):
            if path.startswith(inside):
                listed.append(file_entry(path, content))
                below = path.split("/")[:-1]
                folders |= {"/".join(below[: depth + 1]) for depth in range(len(below))}
        kept = {name for name in folders if name.startswith(inside) and name != inside.strip("/")}
        oid = "0" * 40
        return [
            {"type": "directory", "path": n, "oid": oid, "size": 0} for n in sorted(kept)
        ] + listed

    def tree(self, handler: Handler, dataset: FakeDataset, parts: dict[str, str]) -> Answer:
        revision = unquote(parts["revision"])
        found = dataset.at(revision)
        if found is None:
            return refusal(404, "RevisionNotFound")
        entries = self.entries(found[1], parts.get("path") or "")
        if not entries:
            return refusal(404, "EntryNotFound")
        if "recursive=True" not in handler.path and "recursive=true" not in handler.path:
            depth = len([part for part in (parts.get("path") or "").split("/") if part])
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        return json_answer(entries)

    def tell_paths(self, handler: Handler, dataset: FakeDataset, parts: dict[str, str]) -> Answer:
        found = dataset.at(unquote(parts["revision"]))
        if found is None:
            return refusal(404, "RevisionNotFound")
        from urllib.parse import parse_qs

        body = handler.posted.decode()
        wanted = re.findall(r'"([^"]+)"', body) if body.startswith("{") else []
        wanted = wanted or parse_qs(body).get("paths", [])
        told = []
        for path in wanted:
            if path in found[1]:
                told.append(file_entry(path, found[1][path]))
            elif any(name.startswith(path + "/") for name in found[1]):
                told.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return json_answer(told)

    def locate(self, dataset: FakeDataset, place: str) -> tuple[str, bytes] | None:
        """Commit and content of `<revision>/<path>`; a revision may hold slashes."""
        branches = (place[: len(CONVERTED)], place.partition("/")[0])
        for revision in branches:
            found = dataset.at(revision)
            path = place[len(revision) + 1 :]
            if found is not None and path in found[1]:
                return found[0], found[1][path]
        return None

    def resolve(self, handler: Handler, dataset: FakeDataset, parts: dict[str, str]) -> Answer:
        if dataset.needs_token == "gated" and not handler.headers.get("Authorization"):
            return refusal(401, "GatedRepo")
        located = self.locate(dataset, parts["place"])
        if located is None:
            return refusal(404, "EntryNotFound")
        if self.redirects:
            target = f"/cdn/{parts['name']}/{parts['place']}?Signature=s3cret"
            return Answer(status=302, headers={"Location": target})
        return self.serve_file(handler, dataset, parts)

    def serve_file(self, handler: Handler, dataset: FakeDataset, parts: dict[str, str]) -> Answer:
        located = self.locate(dataset, parts["place"])
        if located is None:
            return refusal(404, "EntryNotFound")
        sha, content = located
        return Answer(body=content, headers={"X-Repo-Commit": sha})


def file_entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "oid": oid, "size": len(content)}


def refusal(status: int, code: str) -> Answer:
    return json_answer({"error": code}, status=status, headers={"X-Error-Code": code})


def parquet_bytes(rows: list[dict[str, Any]], *, rows_per_group: int = 10) -> bytes:
    """A parquet file with checksums for every page."""
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        sink,
        row_group_size=rows_per_group,
        compression="zstd",
        write_page_checksum=True,
    )
    return sink.getvalue()


def make_rows(tag: str, count: int) -> list[dict[str, Any]]:
    """Rows with a text, a score that cycles from 0 to 4.5, and question and answer."""
    return [
        {
            "text": f"{tag} {number} " + f"word{number * 7919 % 997} " * 20,
            "id": number,
            "score": number % 10 / 2,
            "question": f"{tag} {number}?",
            "answer": f"{number * number}",
        }
        for number in range(count)
    ]
