"""The text of a PDF page as a reader would copy it out, and where to cut it.

A PDF holds glyphs at places, so its text is a guess: lines end where the page's did, words broken
at a line end lose their hyphen, formulas come out as rows of symbols, and a font without a map to
Unicode gives nonsense. What can be mended from the page alone is mended here; every function
depends on the page only, so that a saved position stays true.
"""

import re

MAX_UNMAPPED_SHARE = 0.1
_LIGATURES = {
    "\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl",
    "\ufb05": "st", "\ufb06": "st", "\u00ad": "", "\ufffe": "", "\u00a0": " ", "\u200b": "",
}  # fmt: skip
_TABLE = str.maketrans(_LIGATURES)
_LEADERS = re.compile(r"(?:[ \t]?\.){5,}[ \t]*")
_NUMBER = r"(?:\d{1,4}|[ivxlcIVXLC]{1,7})"
_NUMBER_LINE = re.compile(rf"[-–— ]*{_NUMBER}[-–— ]*")
_HEADER_LINE = re.compile(rf"{_NUMBER}\s+(?P<after>\D.*)|(?P<before>.*\S)\s+{_NUMBER}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Controls, private use and the replacement character stand for no letter.
_UNMAPPED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ue000-\uf8ff\ufffd]")
_SENTENCE_END = re.compile(r"[.!?:][\"')\]]?\s")


def clean_page(text: str) -> tuple[str, str | None]:
    """The page's text and None, or nothing and the reason: `no_text`, `unmapped_text`."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    num_visible = sum(map(len, text.split()))
    if not num_visible:
        return "", "no_text"
    if len(_UNMAPPED.findall(text)) > MAX_UNMAPPED_SHARE * num_visible:
        return "", "unmapped_text"
    text = _CONTROL.sub("", text.translate(_TABLE))
    lines = [_LEADERS.sub(" ... ", line).rstrip() for line in text.split("\n")]
    lines = _without_page_furniture([line for line in lines if line])
    text = "\n".join(_unwrapped(lines))
    return (text, None) if text else ("", "no_text")


def _without_page_furniture(lines: list[str]) -> list[str]:
    """Drop page numbers on lines of their own and a running head in capitals with one."""
    while lines and _NUMBER_LINE.fullmatch(lines[-1]):
        lines = lines[:-1]
    while lines and _NUMBER_LINE.fullmatch(lines[0]):
        lines = lines[1:]
    if lines and len(lines[0]) <= 90 and (found := _HEADER_LINE.fullmatch(lines[0])):
        title = found["after"] or found["before"]
        if title.upper() == title and any(character.isalpha() for character in title):
            lines = lines[1:]
    return lines


def _unwrapped(lines: list[str]) -> list[str]:
    """Join a full line with a next one that goes on in lower case; all else keeps its break."""
    if not lines:
        return []
    full = 0.75 * sorted(map(len, lines))[len(lines) * 9 // 10]
    joined = [lines[0]]
    last_length = len(lines[0])
    for line in lines[1:]:
        if line[0].islower() and last_length >= full and not joined[-1].endswith(("}", ";")):
            joined[-1] += " " + line
        else:
            joined.append(line)
        last_length = len(line)
    return joined


def cut_place(text: str, *, least: int, most: int) -> int:
    """Where to end a chunk of `least` to `most` characters: at the end of a sentence that ends a
    line, of a sentence, of a line, of a word. A text of at most `most` is one chunk."""
    if len(text) <= most:
        return len(text)
    ends = [match.end() for match in _SENTENCE_END.finditer(text, least, most)]
    at_line = [end for end in ends if text[end - 1] == "\n"]
    if at_line or ends:
        return (at_line or ends)[-1]
    for mark in ("\n", " "):
        if (end := text.rfind(mark, least, most)) >= 0:
            return end + 1
    return most
