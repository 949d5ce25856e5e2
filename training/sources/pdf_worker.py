"""PDF pages read in a child process, so that a crash, a hang or an appetite of the PDF library
costs a page and not the training run.

The child is asked one thing at a time over a pipe: JSON both ways, capped, because what parses
hostile files must not send objects. It has a limit of memory and of time per question; a child that
breaks either, or dies, is replaced.
"""

import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

ANSWER_BYTES = 64 << 20
MEMORY_BYTES = 1 << 30
PAGE_CHARS = 2_000_000
_POLL_S = 0.2


class WorkerLost(Exception):
    """The child is gone or was ended; `reason` is the word that is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def serve_pdf(connection: Connection, memory_bytes: int) -> None:
    """The child's loop: answer questions until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C in the terminal is for the parent
    _limit_process(memory_bytes)
    try:
        import pypdfium2
    except ImportError:
        connection.send_bytes(json.dumps({"reason": "no_library"}).encode())
        return
    reader = _PdfReader(pypdfium2)
    versions = f"{pypdfium2.PYPDFIUM_INFO}, {pypdfium2.PDFIUM_INFO}"
    connection.send_bytes(json.dumps({"library": versions}).encode())
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        answer = json.dumps(reader.answer(question), ensure_ascii=True).encode()
        connection.send_bytes(answer)


class _PdfReader:
    """One open document. Lives in the child, for as long as the child does."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._document: Any = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """`{"open": path}` gives `pages`, `{"page": number}` gives `text`; or a `reason`."""
        try:
            if "open" in question:
                return self._open(question["open"])
            return self._read_page(question["page"])
        except FileNotFoundError:
            return {"reason": "vanished"}
        except MemoryError:
            return {"reason": "pdf_memory"}
        except self._library.PdfiumError as error:
            if "assword" in str(error) or "ecurity" in str(error):
                return {"reason": "encrypted_pdf"}
            return {"reason": "bad_pdf" if "open" in question else "bad_page"}
        except (OSError, ValueError, OverflowError):
            return {"reason": "bad_pdf" if "open" in question else "bad_page"}

    def _open(self, path: str) -> dict[str, Any]:
        if self._document is not None:
            self._document.close()
            self._document = None
        self._document = self._library.PdfDocument(path)
        return {"pages": len(self._document)}

    def _read_page(self, number: int) -> dict[str, Any]:
        page = self._document[number]
        try:
            text_page = page.get_textpage()
            try:
                if text_page.count_chars() > PAGE_CHARS:
                    return {"reason": "too_long"}
                # PDFium can hand out halves of surrogate pairs.
                text = text_page.get_text_range(errors="replace")
                return {"text": text.encode("utf-8", "replace").decode()}
            finally:
                text_page.close()
        finally:
            page.close()


def _limit_process(memory_bytes: int) -> None:
    """Cap address space and forbid core files; Windows has neither call, the parent watches."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS accepts the limit and does not keep it
        resource.setrlimit(resource.RLIMIT_AS, (2 * memory_bytes, 2 * memory_bytes))


class PdfWorker:
    """The parent's end: `ask` starts the child when there is none.

    timeout_s: wall-clock seconds that one question may take. serve: what the child runs.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        memory_bytes: int = MEMORY_BYTES,
        serve: Callable[[Connection, int], None] = serve_pdf,
    ) -> None:
        self.library = ""
        self.num_started = 0
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._serve = serve
        self._process: Any = None
        self._connection: Any = None

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start the child. ValueError when it has no PDF library, OSError when it does not live."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=self._serve, args=(theirs, self._memory_bytes), name="sigma-pdf", daemon=True
        )
        self._process.start()
        theirs.close()
        self.num_started += 1
        try:
            hello = self._receive(limit_s=max(60.0, self._timeout_s))
        except WorkerLost as lost:
            raise OSError(f"the PDF reading process did not start ({lost.reason})") from lost
        if hello.get("reason") == "no_library":
            self.close()
            raise ValueError(
                "PDF files need the package pypdfium2: python -m pip install pypdfium2"
            )
        self.library = hello["library"]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The child's answer. WorkerLost: `pdf_crash`, `pdf_timeout`, `pdf_memory`; OSError when
        no child can be started."""
        if not self.is_running:
            self.start()
        try:
            self._connection.send_bytes(json.dumps(question).encode())
        except OSError as error:
            self.close()
            raise WorkerLost("pdf_crash") from error
        return self._receive(limit_s=self._timeout_s)

    def close(self) -> None:
        """End the child, whatever it is doing."""
        if self._process is None:
            return
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()
        self._process = None

    def _receive(self, *, limit_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit_s
        try:
            while not self._connection.poll(_POLL_S):
                if time.monotonic() > deadline:
                    raise WorkerLost("pdf_timeout")
                if self._resident_bytes() > self._memory_bytes:
                    raise WorkerLost("pdf_memory")
            return json.loads(self._connection.recv_bytes(ANSWER_BYTES))
        except WorkerLost:
            self.close()
            raise
        except (EOFError, OSError) as error:
            self.close()
            raise WorkerLost("pdf_crash") from error

    def _resident_bytes(self) -> int:
        try:
            return psutil.Process(self._process.pid).memory_info().rss
        except psutil.Error:  # it has just died; the pipe will say so
            return 0
