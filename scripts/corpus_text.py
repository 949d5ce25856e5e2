"""Readers of the documentation formats that a fetched corpus is made of: HTML, reStructuredText,
Perl's POD, manual pages (roff), dictionaries (dictd), API descriptions (JSON).

Each gives paragraphs. What only a formatter needs is dropped; headings become `#` lines and code
stays indented, as in the embedded corpus (assets_html.py).
"""

import gzip
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.assets_html import extract_blocks

_POD_CODE = re.compile(
    r"[BCEFILSXZ]<(?!<)((?:[^<>]|<[^<>]*>)*)>|[BCFILS]<<+\s(.*?)\s>>+", re.DOTALL
)
_ROFF_ESCAPES = (
    (re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)"), ""),
    (re.compile(r"\\s[+-]?\d"), ""),
    (re.compile(r"\\\*?\(em|\\\[em\]"), "--"),
    (re.compile(r"\\\*?\((?:lq|rq|dq)"), '"'),
    (re.compile(r"\\\((?:aq|oq|cq)"), "'"),
    (re.compile(r"\\\(bu"), "*"),
    (re.compile(r"\\\(co"), "(C)"),
    (re.compile(r"\\\*?\((..)|\\\*?\[([^\]]*)\]"), ""),
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\[&/,|^:%]|\\[hv]'[^']*'"), ""),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e|\\\\"), "\\\\"),
)
_ROFF_FONTS = {"B", "I", "R", "SM", "SB", "BR", "RB", "BI", "IB", "IR", "RI"}
_RST_DIRECTIVE = re.compile(r"^\.\. (?:[\w:-]+::|_|\[|\||SPDX)")
_RST_SIGNATURE = re.compile(
    r"^(\s*)\.\. (?:py:|c:)?(?:function|class|method|classmethod|staticmethod|data|attribute"
    r"|exception|decorator|macro|type|option|opcode)::\s+(\S.*)"
)
_RST_ROLE = re.compile(r":[\w:+-]+:`([^`<]*?)\s*(?:<[^`]*>)?`")
_RST_RULE = re.compile(r"([=\-~^\"'#*+.:`_<>])\1{2,}")
_LABEL_CHARS = 40
_TAG = re.compile(r"<[^>]+>")


def read_text(path: Path) -> str:
    """A file as text, unpacked if its name ends in .gz or .dz; bytes that are no UTF-8 are read as
    Latin-1, which old manual pages are in."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def html_blocks(text: str) -> list[str]:
    """Paragraphs of a page in reading order, without its title."""
    return extract_blocks(text)[1]


def _paragraphs(text: str) -> Iterator[str]:
    yield from (part for part in re.split(r"\n[ \t]*\n", text) if part.strip())


def _unwrap(part: str) -> str:
    """One line, unless the paragraph is indented: then it is code or a table."""
    part = part.strip("\n")
    if part[:1].isspace():
        return part.rstrip()
    return " ".join(part.split())


def rst_blocks(text: str) -> list[str]:
    """Prose and code of a reStructuredText source; directives that carry no text are dropped."""
    blocks: list[str] = []
    for part in _paragraphs(_RST_ROLE.sub(r"\1", text.expandtabs(8))):
        lines = [_RST_SIGNATURE.sub(r"\1    \2", line) for line in part.strip("\n").split("\n")]
        rules = [bool(_RST_RULE.fullmatch(line.strip())) for line in lines]
        if len(lines) in (2, 3) and rules[-1] and not rules[-2]:
            blocks.append("# " + lines[-2].strip())
            continue
        if len(lines) > 1 and rules[1] and not rules[0] and len(lines[1]) >= 3:
            blocks.append("# " + lines[0].strip())
            lines = lines[2:]
        lines = [
            line
            for line in lines
            if not (_RST_DIRECTIVE.match(line.lstrip()) or re.match(r"\s*:[\w-]+:( |$)", line))
        ]
        body = "\n".join(lines).replace("``", "")
        if body.strip() and not all(rules):
            blocks.append(_unwrap(re.sub(r"::$", ":", body)))
    return blocks


def _pod_inline(text: str) -> str:
    def shown(match: re.Match[str]) -> str:
        inner = match[1] if match[1] is not None else match[2]
        if match[0][0] in "XZ":
            return ""
        if match[0][0] == "E":
            return {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}.get(inner) or html.unescape(
                f"&{inner};"
            )
        if match[0][0] == "L":
            return inner.split("|")[0].strip('"/')
        return inner

    for _ in range(3):  # codes nest
        text = _POD_CODE.sub(shown, text)
    return text


def pod_blocks(text: str) -> list[str]:
    """The documentation of a .pod file."""
    blocks: list[str] = []
    skipped = ""
    for part in _paragraphs(text.expandtabs(8)):
        command, _, rest = part.strip("\n").partition(" ")
        if part.startswith("=begin") or part.startswith("=for"):
            skipped = "begin" if part.startswith("=begin") else ""
        elif part.startswith("=end"):
            skipped = ""
        elif skipped:
            continue
        elif head := re.fullmatch(r"=head([1-4])", command):
            blocks.append("#" * int(head[1]) + " " + " ".join(_pod_inline(rest).split()))
        elif command == "=item":
            blocks.append("- " + " ".join(_pod_inline(rest).split()).lstrip("* "))
        elif not command.startswith("="):
            blocks.append(part.rstrip() if part[0].isspace() else _unwrap(_pod_inline(part)))
    return [block for block in blocks if block.strip("-# ")]


def _roff_inline(text: str) -> str:
    for pattern, replacement in _ROFF_ESCAPES:
        text = pattern.sub(replacement, text)
    return text


def roff_blocks(text: str) -> list[str]:
    """The text of a manual page written with the man macros; tables and other macros are left."""
    blocks: list[str] = []
    words: list[str] = []
    is_code = is_table = False

    def flush() -> None:
        joined = "\n".join(words) if is_code else " ".join(" ".join(words).split())
        if joined.strip():
            blocks.append(joined)
        words.clear()

    for line in text.split("\n"):
        if line.startswith("'\\\"") or line.startswith('.\\"'):
            continue
        if not line.startswith((".", "'")):
            if not is_table:
                words.append(("    " if is_code else "") + _roff_inline(line))
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        rest = _roff_inline(rest)
        if macro in ("TS", "TE"):
            flush()
            is_table = macro == "TS"
        elif macro in ("nf", "EX", "fi", "EE"):
            flush()
            is_code = macro in ("nf", "EX")
        elif macro in ("SH", "SS"):
            flush()
            is_code = False
            blocks.append(("# " if macro == "SH" else "## ") + rest.replace('"', ""))
        elif macro in _ROFF_FONTS:
            parts = re.findall(r'"([^"]*)"|(\S+)', rest)
            joint = "" if len(macro) == 2 and macro not in ("SM", "SB") else " "
            shown = joint.join(quoted or plain for quoted, plain in parts)
            words.append(("    " if is_code else "") + shown)
        elif macro in ("PP", "P", "LP", "TP", "IP", "HP", "RS", "RE", "sp", "TQ"):
            flush()
    flush()
    return blocks


def dictionary_documents(text: str) -> Iterator[tuple[str, list[str]]]:
    """Entries of a dictd file, those with the same first three letters as one document."""
    groups: dict[str, list[str]] = {}
    key = "front"
    for part in _paragraphs(text):
        if part.strip() == "[1913 Webster]":
            continue
        first = part.lstrip("\n").split("\n")[0]
        if first[:1].isalpha():
            key = re.sub(r"[^a-z]", "", first.lower())[:3] or "front"
        body = re.sub(
            r"\s*\[(?:1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5)(?: \+PJC)?\]", "", part
        )
        groups.setdefault(key, []).append(re.sub(r"[{}]", "", body.strip("\n")).rstrip())
    yield from groups.items()


def api_blocks(description: dict[str, Any]) -> list[str]:
    """The texts under `documentation` or `description` of an API's description, in its order;
    mere labels ("Regional Endpoint") are left out."""
    blocks: list[str] = []
    pending: list[Any] = [description]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            for key in ("documentation", "description"):
                if isinstance(text := node.get(key), str):
                    plain = html.unescape(_TAG.sub(" ", text.replace("</p>", "\n\n")))
                    blocks += [" ".join(part.split()) for part in _paragraphs(plain)]
            pending += [node[key] for key in sorted(node, reverse=True)]
        elif isinstance(node, list):
            pending += reversed(node)
    return [block for block in blocks if len(block) >= _LABEL_CHARS]


def load_json(path: Path) -> dict[str, Any]:
    return json.loads(read_text(path))
