"""Which parquet files make up one split of a hub dataset, from its file list and its card.

The rules are those of the `datasets` library: configurations and their patterns stand in the card;
without any, a file belongs to the split whose keyword its path contains, and where no path contains
one all files are the training split. Source: the hub's documentation, "File names and splits" and
"Manual configuration".
"""

import re
from collections.abc import Sequence
from typing import Any

from training.sources.base import SourceError

DEFAULT_CONFIG = "default"
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = r"[ ._\-/\d]"


def choose_config(card: dict[str, Any], *, dataset: str, config: str | None) -> dict[str, Any]:
    """The card's entry for a configuration; an empty one where the card has none.

    Without a name it is the only one, the one marked as default, or the one called so.
    """
    entries = [entry for entry in card.get("configs") or [] if isinstance(entry, dict)]
    by_name = {str(entry.get("config_name", DEFAULT_CONFIG)): entry for entry in entries}
    if not by_name and config in (None, DEFAULT_CONFIG):
        return {}
    if config is None:
        marked = [name for name, entry in by_name.items() if entry.get("default")]
        config = next(iter(marked), DEFAULT_CONFIG)
        if len(by_name) == 1:
            config = next(iter(by_name))
    if config not in by_name:
        names = ", ".join(sorted(by_name)) or DEFAULT_CONFIG
        raise SourceError(
            f"dataset {dataset} has no configuration {config!r}; choose one of: {names}",
            reason="wrong_config",
            transient=False,
        )
    return by_name[config]


def files_of_split(
    paths: Sequence[str], entry: dict[str, Any], *, dataset: str, split: str
) -> list[str]:
    """The files of a split in their natural order; SourceError names the splits there are."""
    folder = str(entry.get("data_dir") or "").strip("/.")
    inside = [path for path in paths if not folder or path.startswith(folder + "/")]
    inside = [path for path in inside if not any(part[0] in "._" for part in path.split("/"))]
    by_split = _split_by_patterns(inside, entry, folder) or _split_by_names(inside)
    if not by_split.get(split):
        names = ", ".join(sorted(name for name, files in by_split.items() if files))
        raise SourceError(
            f"dataset {dataset} has no split {split!r}; it has: {names or 'no data files'}",
            reason="wrong_split",
            transient=False,
        )
    return by_split[split]


def _split_by_patterns(
    paths: list[str], entry: dict[str, Any], folder: str
) -> dict[str, list[str]]:
    """The files that the card's own patterns name, by split; empty when it names none."""
    stated = entry.get("data_files")
    if not stated:
        return {}
    if isinstance(stated, dict):
        stated = [{"split": split, "path": path} for split, path in stated.items()]
    elif isinstance(stated, str) or all(isinstance(item, str) for item in stated):
        stated = [{"split": "train", "path": stated}]
    found: dict[str, list[str]] = {}
    for item in stated:
        patterns = [item["path"]] if isinstance(item["path"], str) else item["path"]
        files = found.setdefault(str(item.get("split", "train")), [])
        for pattern in patterns:
            pattern = f"{folder}/{pattern}" if folder else pattern
            expression = glob_expression(pattern.removeprefix("./"))
            files += [path for path in paths if expression.match(path) and path not in files]
    return found


def _split_by_names(paths: list[str]) -> dict[str, list[str]]:
    data = [path for path in paths if path.endswith(".parquet")]
    found = {
        split: [path for path in data if _has_keyword(path, words)]
        for split, words in _KEYWORDS.items()
    }
    return found if any(found.values()) else {"train": data}


def _has_keyword(path: str, words: tuple[str, ...]) -> bool:
    return bool(re.search(rf"(?:^|{_SEPARATOR})(?:{'|'.join(words)})(?:{_SEPARATOR}|$)", path))


def glob_expression(pattern: str) -> re.Pattern[str]:
    """A path pattern as an expression: `*` and `?` stay within a folder, `**` does not."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]*])", pattern)
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = ""
    for piece in pieces:
        if piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
            expression += "[^" + piece[2:] if piece[1] == "!" else piece
        else:
            expression += meanings.get(piece) or re.escape(piece)
    return re.compile(expression + r"\Z")
