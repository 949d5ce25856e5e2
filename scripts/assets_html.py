"""Turn a documentation page in HTML into plain, readable text.

One converter serves Sphinx, DocBook and hand-written pages: the text keeps what helps a reader
(headings as `#` lines, lists, indented code, table rows) and drops what only a browser needs.
Paragraphs are unwrapped to one line, because the line breaks of the sources are an accident of
somebody's editor.
"""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
_BLOCKS = {
    "p",
    "div",
    "section",
    "blockquote",
    "table",
    "hr",
    "center",
    "body",
    "details",
    "figure",
    "caption",
    "figcaption",
    "address",
    "main",
    "thead",
    "tbody",
    "tfoot",
    "form",
    "aside",
}
_SKIPPED_TAGS = {"script", "style", "svg", "button", "form", "head", "nav", "select", "img"}
_VOID_TAGS = {
    "br",
    "hr",
    "img",
    "input",
    "meta",
    "link",
    "col",
    "area",
    "base",
    "wbr",
    "embed",
    "source",
}
_SKIPPED_CLASSES = {
    "nosearch",
    "navheader",
    "navfooter",
    "toc",
    "headerlink",
    "toctree-wrapper",
    "sphinxsidebar",
    "related",
    "contents",
    "imgcontainer",
    "indextable",
    "footer",
    "clearer",
    "list-of-tables",
    "list-of-figures",
    "list-of-examples",
    "sourcelink",
    "viewcode-link",
    "topic-contents",
}
_TYPOGRAPHY = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u00a0": " ",
        "\u2026": "...",
        "\u2010": "-",
        "\u2011": "-",
        "\u2212": "-",
        "\u200b": None,
        "\u00ad": None,
        "\ufeff": None,
        "\u2003": " ",
        "\u2002": " ",
        "\u2009": " ",
        "\u202f": " ",
        "\r": None,
        "\x0c": None,
    }
)
_SECTION_NUMBER = re.compile(
    r"^(?:(?:Chapter|Appendix|Part)\s+[\dA-Z]+\.\s+|(?:[\dA-Z]{1,2}\.)(?:\d+\.)*\s+)"
)
_SPACE = re.compile(r"\s+")


@dataclass(slots=True)
class _Table:
    """Cells of the row being read; every cell is a list of finished paragraphs."""

    row: list[list[str]] = field(default_factory=list)
    in_cell: bool = False


@dataclass(slots=True)
class _List:
    """An open list: `counter` numbers the items of an ordered one, None marks bullets."""

    counter: int | None
    indent: int


class TextExtractor(HTMLParser):
    """Collects `blocks`, the paragraphs of one page, in reading order.

    `main_class` names the class of the element that holds the page's own text; without it
    everything in the body counts. Unclosed `<p>`, `<li>`, `<dt>`, `<dd>`, `<td>` and `<tr>`, which
    HTML permits, are closed by the tags that follow them.
    """

    def __init__(self, *, main_class: str | None = None) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.title = ""
        self._main_class = main_class
        self._main_depth = 0 if main_class else 1
        self._skip: list[str] = []  # open elements of a skipped region, outermost first
        self._pre = 0
        self._in_title = False
        self._heading = 0
        self._prefix = ""
        self._indents: list[int] = [0]
        self._lists: list[_List] = []
        self._tables: list[_Table] = []
        self._buffer: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        classes = set((values.get("class") or "").split())
        if tag == "title":
            self._in_title = True
        if self._skip:
            if tag not in _VOID_TAGS and tag == self._skip[0]:
                self._skip.append(tag)
            return
        if tag in _SKIPPED_TAGS or classes & _SKIPPED_CLASSES:
            if tag not in _VOID_TAGS:
                self._skip.append(tag)
            return
        if self._main_class and tag == "div":
            if self._main_depth:
                self._main_depth += 1
            elif self._main_class in classes:
                self._main_depth = 1
        if self._main_depth:
            self._open(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # `<div />` in XHTML closes itself: an open and a close, so that depths stay right.
        self.handle_starttag(tag, attrs)
        if tag not in _VOID_TAGS:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        if self._skip:
            if tag == self._skip[0]:
                self._skip.pop()
            return
        if not self._main_depth:
            return
        self._close(tag)
        if self._main_class and tag == "div":
            self._main_depth -= 1

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        if self._skip or not self._main_depth:
            return
        self._buffer.append(data.translate(_TYPOGRAPHY))

    def close(self) -> None:
        """Take what is still open as the last paragraph; `blocks` is complete only after this."""
        super().close()
        self._flush()

    def _open(self, tag: str) -> None:
        if tag == "br":
            self._buffer.append("\n" if self._pre else " ")
        elif tag == "pre":
            self._flush()
            self._pre += 1
        elif tag in _HEADINGS:
            self._flush()
            self._heading = _HEADINGS[tag]
        elif tag in ("ul", "ol"):
            self._flush()
            counter = 0 if tag == "ol" else None
            self._lists.append(_List(counter, self._indents[-1]))
            self._indents.append(self._indents[-1])
        elif tag == "li":
            self._open_item()
        elif tag == "dl":
            self._flush()
            self._indents.append(self._indents[-1])
            self._lists.append(_List(None, self._indents[-1]))
        elif tag in ("dt", "dd"):
            self._flush()
            base = self._lists[-1].indent if self._lists else 0
            self._indents[-1] = base + (4 if tag == "dd" else 0)
        elif tag == "table":
            self._flush()
            self._tables.append(_Table())
        elif tag == "tr":
            self._end_row()
        elif tag in ("td", "th") and self._tables:
            self._flush()
            self._tables[-1].row.append([])
            self._tables[-1].in_cell = True
        elif tag in _BLOCKS:
            self._flush()

    def _open_item(self) -> None:
        self._flush()
        if not self._lists:
            self._prefix = "- "
            return
        current = self._lists[-1]
        if current.counter is None:
            self._prefix = "- "
        else:
            current.counter += 1
            self._prefix = f"{current.counter}. "
        self._indents[-1] = current.indent + len(self._prefix)

    def _close(self, tag: str) -> None:
        if tag == "pre":
            self._flush()
            self._pre = max(0, self._pre - 1)
        elif tag in _HEADINGS:
            self._flush()
            self._heading = 0
        elif tag in ("ul", "ol", "dl"):
            self._flush()
            self._prefix = ""
            if self._lists:
                self._lists.pop()
                self._indents.pop()
        elif tag == "table":
            self._end_row()
            if self._tables:
                self._tables.pop()
        elif tag == "tr":
            self._end_row()
        elif tag in ("li", "dt", "dd", "td", "th") or tag in _BLOCKS:
            self._flush()

    def _end_row(self) -> None:
        self._flush()
        if not self._tables:
            return
        table = self._tables[-1]
        cells = [cell for cell in table.row if cell]
        table.row = []
        table.in_cell = False
        if len(cells) == 1:  # a row of one cell is a little text of its own
            for paragraph in cells[0]:
                self._emit(paragraph)
        elif cells:
            self._emit(" | ".join(_SPACE.sub(" ", " ".join(cell)).strip() for cell in cells))

    def _flush(self) -> None:
        raw = "".join(self._buffer)
        self._buffer.clear()
        if self._pre:
            self._emit_code(raw)
            return
        text = _SPACE.sub(" ", raw).strip()
        if not text:
            return
        if self._heading:
            text = "#" * self._heading + " " + _SECTION_NUMBER.sub("", text)
        if self._tables and self._tables[-1].in_cell:
            self._tables[-1].row[-1].append(text)
        else:
            self._emit(text)

    def _emit(self, text: str) -> None:
        indent = 0 if text.startswith("#") and self._heading else self._indents[-1]
        lead = " " * max(0, indent - len(self._prefix)) + self._prefix
        self._prefix = ""
        self.blocks.append(lead + text)

    def _emit_code(self, raw: str) -> None:
        lines = [line.rstrip() for line in raw.expandtabs(8).split("\n")]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if not lines:
            return
        if self._tables and self._tables[-1].in_cell:
            self._tables[-1].row[-1].append(" ".join(line.strip() for line in lines))
            return
        margin = min(len(line) - len(line.lstrip()) for line in lines if line)
        pad = " " * (self._indents[-1] + 4)
        self._prefix = ""
        self.blocks.append("\n".join(pad + line[margin:] if line else "" for line in lines))


def extract_blocks(page: str, *, main_class: str | None = None) -> tuple[str, list[str]]:
    """The title and the paragraphs of an HTML page given as text."""
    extractor = TextExtractor(main_class=main_class)
    extractor.feed(page)
    extractor.close()
    title = _SPACE.sub(" ", extractor.title.translate(_TYPOGRAPHY)).strip()
    return title, extractor.blocks
