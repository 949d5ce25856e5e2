"""What a hub says about a dataset: its commit and its parquet files, or one clear line why not.

Where the files of a split are no parquet, the hub's own conversion is taken, which it keeps in a
branch of the dataset as `<config>/<split>/0000.parquet`. Source: the hub's HTTP interface.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from training.sources.base import SourceError
from training.sources.hub_files import choose_config, files_of_split
from training.sources.net import HttpClient, HttpStatusError

CONVERTED_REVISION = "refs/convert/parquet"
MAX_LISTING_BYTES = 128 << 20
_TOKEN_ADVICE = "put a token into HF_TOKEN (or name its variable with --hf-token-env-var)"


@dataclass(slots=True, kw_only=True, frozen=True)
class Listing:
    """The files of one split at one commit, in their natural order."""

    revision: str
    is_converted: bool
    files: list[str]


class HubDataset:
    """One dataset of a hub. `headers` go to the endpoint alone."""

    def __init__(
        self, name: str, *, endpoint: str, client: HttpClient, headers: Mapping[str, str]
    ) -> None:
        self.name = name
        self.headers = headers
        self.client = client
        self._endpoint = endpoint.rstrip("/")

    def url_of(self, path: str, *, revision: str) -> str:
        """Where a file is read."""
        place = f"{quote(revision, safe='')}/{quote(path)}"
        return f"{self._endpoint}/datasets/{self.name}/resolve/{place}"

    def list_files(
        self, *, config: str | None, split: str, revision: str | None, is_converted: bool
    ) -> Listing:
        """The parquet files of a split. `is_converted`: the revision is one of the conversion."""
        if is_converted:
            return self._list_converted(config, split, revision or CONVERTED_REVISION)
        info = self._read_info(revision or "main")
        paths = _paths_of(info)
        files: list[str] = []
        if any(path.endswith(".parquet") for path in paths):
            entry = choose_config(info.get("cardData") or {}, dataset=self.name, config=config)
            files = files_of_split(paths, entry, dataset=self.name, split=split)
            files = [path for path in files if path.endswith(".parquet")]
        if files:
            return Listing(revision=str(info["sha"]), is_converted=False, files=files)
        if revision is not None:
            raise SourceError(
                f"dataset {self.name} has no parquet files at revision {revision}",
                reason="no_parquet",
                transient=False,
            )
        return self._list_converted(config, split, CONVERTED_REVISION)

    def user_error(self, error: SourceError) -> SourceError:
        """An answer of the hub in words that name the mend."""
        if not isinstance(error, HttpStatusError) or error.transient:
            return error
        code = error.headers.get("x-error-code", "")
        host = urlsplit(self._endpoint).hostname
        if code == "GatedRepo" or error.status == 403:
            line = self._gated_line()
        elif error.status == 401 and self.headers and code != "RepoNotFound":
            line = f"{host} does not accept the token in HF_TOKEN; make a new one or leave it out"
        elif code == "RevisionNotFound":
            line = f"dataset {self.name} has no such revision"
        elif error.status in (401, 404) and code in ("", "RepoNotFound"):
            line = f"no dataset {self.name} on {host}; check its name, or if it is private "
            line += _TOKEN_ADVICE
        else:
            return error
        return SourceError(line, reason=error.reason, transient=False)

    def _gated_line(self) -> str:
        return (
            f"dataset {self.name} is gated: accept its terms on its page at {self._endpoint}, "
            f"then {_TOKEN_ADVICE}"
        )

    def _list_converted(self, config: str | None, split: str, revision: str) -> Listing:
        try:
            info = self._read_info(revision)
        except SourceError as error:
            if error.transient or error.reason != "http_404":
                raise
            raise SourceError(
                f"dataset {self.name} has no parquet files, and the hub has none converted; "
                "download it and read it from --data-path",
                reason="no_parquet",
                transient=False,
            ) from error
        parts = [path.split("/") for path in _paths_of(info) if path.endswith(".parquet")]
        names = sorted({place[0] for place in parts if len(place) == 3})
        card = {"configs": [{"config_name": name} for name in names]}
        chosen = choose_config(card, dataset=self.name, config=config).get("config_name")
        found: dict[str, list[str]] = {}
        for place in sorted(place for place in parts if len(place) == 3 and place[0] == chosen):
            found.setdefault(place[1].removeprefix("partial-"), []).append("/".join(place))
        if split not in found:
            raise SourceError(
                f"dataset {self.name} has no split {split!r}; it has: "
                f"{', '.join(sorted(found)) or 'no data files'}",
                reason="wrong_split",
                transient=False,
            )
        return Listing(revision=str(info["sha"]), is_converted=True, files=found[split])

    def _read_info(self, revision: str) -> dict[str, Any]:
        """Commit, card and list of files at a revision."""
        url = f"{self._endpoint}/api/datasets/{self.name}/revision/{quote(revision, safe='')}"
        try:
            reply = self.client.read(url, max_bytes=MAX_LISTING_BYTES, headers=self.headers)
        except SourceError as error:
            raise self.user_error(error) from error
        try:
            info = json.loads(reply.body)
            if not isinstance(info["sha"], str) or not isinstance(info["siblings"], list):
                raise TypeError("of another shape")
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(
                f"{url} does not describe a dataset", reason="bad_index", transient=True
            ) from error
        if info.get("gated") and not self.headers:
            raise SourceError(self._gated_line(), reason="gated", transient=False)
        return info


def _paths_of(info: dict[str, Any]) -> list[str]:
    return [str(sibling["rfilename"]) for sibling in info["siblings"]]
