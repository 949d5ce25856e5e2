"""Ways in which a server, or what stands between, fails to give what was asked for.

Each takes the handler and the right answer. `PASSING` ones are over when they stop; `FINAL` ones a
client must not try again; `LYING` ones have right headers and wrong bytes, so that only the
content's own checksums can tell.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fakeworld.server import Answer, Handler

Fault = Callable[["Handler", "Answer"], None]
DRIP_S = 0.02
PRIVATE_URL = "http://10.255.0.1/metadata"
FOREIGN_URL = "http://elsewhere.example/file"


def status(code: int, **headers: str) -> Fault:
    def fail(handler: Handler, answer: Answer) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.answer(replace(answer, status=code, body=b"no", headers=named))

    return fail


def redirect(target: Callable[[Handler], str]) -> Fault:
    def fail(handler: Handler, answer: Answer) -> None:
        handler.answer(replace(answer, status=302, body=b"", headers={"Location": target(handler)}))

    return fail


def reset(handler: Handler) -> None:
    """Close with RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.connection.close()


def reset_before_headers(handler: Handler, answer: Answer) -> None:
    reset(handler)


def close_before_headers(handler: Handler, answer: Answer) -> None:
    handler.close_connection = True


def reset_in_body(handler: Handler, answer: Answer) -> None:
    handler.answer(answer, sent=len(answer.body) // 2)
    reset(handler)


def truncate_body(handler: Handler, answer: Answer) -> None:
    handler.answer(answer, sent=len(answer.body) // 2)
    handler.close_connection = True


def announce_less(handler: Handler, answer: Answer) -> None:
    length = str(max(0, len(answer.body) - 7))
    handler.answer(replace(answer, headers={**answer.headers, "Content-Length": length}))
    handler.close_connection = True


def stall_before_headers(handler: Handler, answer: Answer) -> None:
    handler.wait_for_hang_up()
    handler.close_connection = True


def stall_in_body(handler: Handler, answer: Answer) -> None:
    handler.answer(answer, sent=len(answer.body) // 2)
    handler.wait_for_hang_up()
    handler.close_connection = True


def drip(handler: Handler, answer: Answer) -> None:
    """A byte at a time, each within any read time-out."""
    handler.answer(answer, sent=0)
    for byte in answer.body:
        if handler.wait_for_hang_up(DRIP_S):
            break
        handler.wfile.write(bytes([byte]))
    handler.close_connection = True


def drip_headers(handler: Handler, answer: Answer) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.wait_for_hang_up(DRIP_S):
        handler.wfile.write(b"x")
    handler.close_connection = True


def garble_status_line(handler: Handler, answer: Answer) -> None:
    handler.wfile.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    handler.close_connection = True


def wrong_range(handler: Handler, answer: Answer) -> None:
    """An honest reply to another question."""
    body = answer.body[1:] or b"?"
    handler.answer(
        replace(
            answer,
            status=206,
            body=body,
            headers={**answer.headers, "Content-Range": f"bytes 3-{len(body) + 2}/999999"},
        )
    )


def ignore_range(handler: Handler, answer: Answer) -> None:
    """The whole file, whatever was asked for."""
    del handler.headers["Range"]
    handler.answer(handler.find(handler.path.partition("?")[0]))


def other_version(handler: Handler, answer: Answer) -> None:
    handler.answer(replace(answer, headers={**answer.headers, "ETag": '"another"'}))


def other_size(handler: Handler, answer: Answer) -> None:
    """The file has grown meanwhile."""
    headers = dict(answer.headers)
    if "Content-Range" in headers:
        span, _, size = headers["Content-Range"].partition("/")
        headers["Content-Range"] = f"{span}/{int(size) + 4096}"
    handler.answer(replace(answer, headers=headers))


def corrupt(handler: Handler, answer: Answer) -> None:
    body = bytearray(answer.body)
    for place in range(len(body) // 3, len(body), 97):
        body[place] ^= 0x5A
    handler.answer(replace(answer, body=bytes(body)))


def blank_tail(handler: Handler, answer: Answer) -> None:
    """What a cache makes of a file whose download broke off."""
    half = len(answer.body) // 2
    handler.answer(replace(answer, body=answer.body[:half] + bytes(len(answer.body) - half)))


def garbage(handler: Handler, answer: Answer) -> None:
    """The log-in page of a hotel, with the headers of the file."""
    page = b"<html><body>Please accept our terms.</body></html>"
    times = len(answer.body) // len(page) + 1
    handler.answer(replace(answer, body=(page * times)[: len(answer.body)]))


def shift(handler: Handler, answer: Answer) -> None:
    """The bytes of another range under the headers of the right one."""
    handler.answer(replace(answer, body=answer.body[5:] + answer.body[:5]))


PASSING: dict[str, Fault] = {
    "status_408": status(408),
    "status_429": status(429, Retry_After="1"),
    "status_500": status(500),
    "status_502": status(502),
    "status_503": status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "status_504": status(504),
    "refused": redirect(lambda handler: handler.world.refusing_url),
    "reset_before_headers": reset_before_headers,
    "close_before_headers": close_before_headers,
    "reset_in_body": reset_in_body,
    "truncated_body": truncate_body,
    "short_content_length": announce_less,
    "stalled_headers": stall_before_headers,
    "stalled_body": stall_in_body,
    "drip": drip,
    "drip_headers": drip_headers,
    "garbled_status_line": garble_status_line,
    "redirect_loop": redirect(lambda handler: handler.path),
    "wrong_range": wrong_range,
    "ignored_range": ignore_range,
    "other_version": other_version,
    "other_size": other_size,
}
LYING: dict[str, Fault] = {
    "corrupted": corrupt,
    "blank_tail": blank_tail,
    "garbage": garbage,
    "shifted": shift,
}
FINAL: dict[str, Fault] = {
    "status_401": status(401),
    "status_403": status(403),
    "status_404": status(404),
    "status_410": status(410),
    "redirect_private": redirect(lambda handler: PRIVATE_URL),
    "redirect_foreign": redirect(lambda handler: FOREIGN_URL),
}
FAULTS = {**PASSING, **LYING, **FINAL}
