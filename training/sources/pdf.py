"""Folders of PDF files in chunks of 3,000 to 5,000 characters.

A position is a file, a page and a place in the page's text: going on costs one page, however far
in. Pages are read by a child process (pdf_worker.py). Counted and left out: files that are damaged,
encrypted or changed, pages without text (scans) or whose font says not which letters it shows, and
whatever made the child crash, hang or ask for too much memory.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.sources.base import JSON, Document, SourceError, SourceExhausted
from training.sources.file_list import ListedFile, check_same_files, digest_of, list_files
from training.sources.pdf_text import clean_page, cut_place
from training.sources.pdf_worker import PdfWorker, WorkerLost

CHUNK_CHARS = (3000, 5000)
TIMEOUT_S = 20.0
MAX_LOST_WORKERS = 3  # in one file, before its rest is left out


class _FileEnds(Exception):
    """The current file gives nothing more, and why; None when it was simply read to its end."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason


class PdfSource:
    """A DocumentSource of PDF files; see the module. Building it lists the files and starts the
    child once, so that a missing library is told before training.

    chunk_chars: least and most characters of a document; the last of a file may be shorter.
    timeout_s: seconds that a page may take. ValueError in one line for a mistake of the user.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        *,
        chunk_chars: tuple[int, int] = CHUNK_CHARS,
        name: str = "pdf",
        flag: str = "--pdf-path",
        timeout_s: float = TIMEOUT_S,
        worker: PdfWorker | None = None,
    ) -> None:
        self._least, self._most = chunk_chars
        if not 0 < self._least < self._most:
            raise ValueError("chunk_chars: the first number must be below the second and above 0")
        self.name = name
        self.rejected: Counter[str] = Counter()
        self._files, left_out = list_files(paths, kinds=("pdf",), flag=flag)
        self.rejected += left_out
        self._worker = worker or PdfWorker(timeout_s=timeout_s)
        try:
            self._worker.start()
        except OSError as error:
            raise ValueError(f"{flag}: {error}; reinstall the package pypdfium2") from error
        self._identity = {
            "kind": "pdf",
            "files": digest_of(self._files),
            "chunk_chars": [self._least, self._most],
            "library": self._worker.library,
        }
        self._pages: dict[int, str] = {}  # cleaned texts of the current file, a few
        self._num_pages: int | None = None  # None: the current file is not open
        self._place = _start_of(0)

    def identity(self) -> dict[str, JSON]:
        """Names and sizes of the files as a hash, the chunk sizes, the library's version."""
        return dict(self._identity)

    def next_document(self) -> Document:
        """The next chunk. SourceError (transient) when no child can be started."""
        while self._place["file"] < len(self._files):
            file = self._files[self._place["file"]]
            try:
                text = self._next_chunk(file)
            except _FileEnds as end:
                if end.reason:
                    self.rejected[end.reason] += 1
                self._leave_file()
                continue
            except OSError as error:
                raise SourceError(
                    f"{file.path}: {error.strerror or error}", reason="io_error", transient=True
                ) from error
            key = self._place["chunk"]
            self._place["chunk"] += 1
            if text.strip():
                return Document(id=f"{file.name}#{key}", source=self.name, text=text)
        raise SourceExhausted(f"{self.name}: all {len(self._files)} files are read")

    def state_dict(self) -> dict[str, JSON]:
        """File, page, place in the page's text, and what has been left out so far."""
        return {
            "files": self._identity["files"],
            "place": dict(self._place),
            "rejected": dict(self.rejected),
        }

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Go to a saved place. ValueError when it belongs to other files."""
        check_same_files(state, digest=self._identity["files"], name=self.name)
        self._leave_file()
        self._place = dict(state["place"])
        self.rejected.clear()
        self.rejected.update(state["rejected"])

    def rewind(self, *, epoch: int) -> None:
        """Begin at the first file again; every epoch has the same order."""
        self._leave_file()
        self._place = _start_of(0)

    def close(self) -> None:
        self._worker.close()

    def _leave_file(self) -> None:
        self._pages.clear()
        self._num_pages = None
        self._place = _start_of(self._place["file"] + 1)

    def _next_chunk(self, file: ListedFile) -> str:
        """The text up to the next cut; moves the place behind it."""
        num_pages = self._open(file)
        page, offset = self._place["page"], self._place["offset"]
        text, starts = "", []
        while page < num_pages and len(text) <= self._most:
            starts.append((len(text), page, offset))
            if rest := self._page_text(page, file)[offset:]:
                text += rest + "\n"
            page, offset = page + 1, 0
        if not text.strip():
            raise _FileEnds
        size = cut_place(text, least=self._least, most=self._most)
        if size == len(text):
            self._place.update(page=num_pages, offset=0)
        else:
            start, page, offset = next(entry for entry in reversed(starts) if entry[0] <= size)
            self._place.update(page=page, offset=offset + size - start)
        self._forget_pages(before=self._place["page"])
        return text[:size].strip() + "\n"

    def _open(self, file: ListedFile) -> int:
        """Number of pages of the current file, opened in the child if need be."""
        if self._num_pages is not None and self._worker.is_running:
            return self._num_pages
        try:
            if file.path.stat().st_size != file.size:
                raise _FileEnds("changed")
        except FileNotFoundError as error:
            raise _FileEnds("vanished") from error
        except PermissionError as error:
            raise _FileEnds("unreadable") from error
        try:
            answer = self._worker.ask({"open": str(file.path)})
        except WorkerLost as lost:
            raise _FileEnds(lost.reason) from lost
        if reason := answer.get("reason"):
            raise _FileEnds(reason)
        self._num_pages = answer["pages"]
        return answer["pages"]

    def _page_text(self, number: int, file: ListedFile) -> str:
        """The cleaned text of a page, empty when the page is left out (counted once)."""
        if number not in self._pages:
            text, reason = self._read_page(number, file)
            if reason and number >= self._place["counted"]:
                self.rejected[reason] += 1
                self._place["counted"] = number + 1
            self._pages[number] = text
        return self._pages[number]

    def _read_page(self, number: int, file: ListedFile) -> tuple[str, str | None]:
        """Text and None, or nothing and the reason. A page that cost a child is not tried again."""
        if number in self._place["lost"]:
            return "", "pdf_crash"
        self._open(file)
        try:
            answer = self._worker.ask({"page": number})
        except WorkerLost as lost:
            self._place["lost"] = [*self._place["lost"], number]
            if len(self._place["lost"]) >= MAX_LOST_WORKERS:
                raise _FileEnds(lost.reason) from lost
            return "", lost.reason
        reason = answer.get("reason")
        return ("", reason) if reason else clean_page(answer["text"])

    def _forget_pages(self, *, before: int) -> None:
        for number in [number for number in self._pages if number < before]:
            del self._pages[number]


def _start_of(file: int) -> dict[str, Any]:
    """The place before the first page: `counted` is the page from which reasons still count, `lost`
    the pages that cost a child."""
    return {"file": file, "page": 0, "offset": 0, "chunk": 0, "counted": 0, "lost": []}
