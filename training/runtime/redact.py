"""Removal of secrets from text that leaves the process.

Three nets, because no single one holds: the values of environment variables whose names sound
secret, strings in the well-known shapes of tokens, and whatever stands behind a secret-sounding
name (`password: ...`, `--api-key ...`, `?token=...`). Too much removed is harmless here.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MARK = "[redacted]"
MIN_VALUE_CHARS = 4

_NAME = (
    r"(?:api[_-]?key|access[_-]?key|private[_-]?key|secret|passw(?:or)?d|passphrase|"
    r"credentials?|auth[_-]?token|token)"
)
# "token" must not catch tokens_total or TOKENIZERS_PARALLELISM.
_SECRET_NAME = re.compile(
    rf"{_NAME}(?![a-z])|passw(?:or)?d|secret|api_?key|[_-](?:key|auth|pat)$", re.IGNORECASE
)
_COMMON_VALUES = frozenset({"true", "false", "none", "null", "auto", "default"})

_PATTERNS = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S),
        # Sixteen characters and more: hf_config and sk-learn are words, not tokens.
        (r"(?<![A-Za-z0-9])(?:hf|api_org|gh[pousr]|npm|r8|dop_v1)_[A-Za-z0-9]{16,}", 0),
        (r"(?<![A-Za-z0-9])github_pat_\w{16,}", 0),
        (r"(?<![A-Za-z0-9])(?:sk|rk|pk|glpat|pypi)[-_][A-Za-z0-9_-]{16,}", 0),
        (r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}", 0),
        (r"\bAIza[A-Za-z0-9_-]{20,}", 0),
        (r"\bya29\.[A-Za-z0-9_-]{8,}", 0),
        (r"\bxox[a-z]-[A-Za-z0-9-]{6,}", 0),
        (r"\beyJ[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*){1,4}", 0),
    )
)
_AUTHORIZATION = re.compile(
    r"\b(bearer|basic|digest|negotiate)(\s+|%20|\+)[A-Za-z0-9._~+/=%-]{4,}", re.IGNORECASE
)
# The whole of a header, whatever its scheme; in JSON its quotes may be escaped.
_HEADER = re.compile(
    r"((?:authorization|cookie)\\*[\"']?\s*[:=]\s*\\*[\"']?)[^\s\"'\\][^\r\n\"'\\]*", re.IGNORECASE
)
_URL_LOGIN = re.compile(r"\b([a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\"<>]*@", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"://[^\s:/@]*:([^\s/@]+)@")
_VALUE = r"(?:b?\"(?:[^\"\\]|\\.)*\"|b?'(?:[^'\\]|\\.)*'|[^\s,;&\"'}\])]+)"
_IS = r"[\"']?\s*[:=]\s*"
_ASSIGNMENT = re.compile(
    r"((?:(?:api|access|private)[_-]?key|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:auth|access|api|refresh|session|bearer|hub|hf)[_-]?token"
    rf"|[?&][\w.-]{{0,40}}?(?:token|key|sig|signature)){_IS}"
    rf"|(?:passw(?:or)?d|passphrase|secret|api[ _-]?key)\s+(?:is|was)\s+){_VALUE}",
    re.IGNORECASE,
)
# Language models are full of tokens that are no secret: `next_token = logits.argmax()`.
_UPPER_TOKEN = re.compile(rf"(TOKEN{_IS}){_VALUE}")
_LONG_TOKEN = re.compile(rf"(token{_IS}[\"']?)(?=[\w.~+/=-]*\d)[\w.~+/=-]{{16,}}")
_OPTION = re.compile(rf"((?<![\w-])--[\w-]{{0,40}}?{_NAME}\s+)(?!-)\S+", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a variable, key or flag of this name holds a secret: HF_TOKEN, --api-key, ..."""
    return _SECRET_NAME.search(name) is not None


@dataclass(slots=True, kw_only=True)
class Redactor:
    """Replaces secrets in text; `values` are literal secrets, longest first."""

    values: tuple[str, ...]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Redactor:
        """Knows the values of all secret-sounding variables, in their usual encodings."""
        values: set[str] = set()
        for name, value in environment.items():
            for password in _URL_PASSWORD.findall(value):
                values |= _spellings(password) if len(password) >= MIN_VALUE_CHARS else set()
            stripped = value.strip()
            if len(stripped) < MIN_VALUE_CHARS or stripped.lower() in _COMMON_VALUES:
                continue
            if is_secret_name(name):
                values |= _spellings(stripped)
        return cls(values=tuple(sorted(values, key=len, reverse=True)))

    def clean(self, text: str) -> str:
        """The text with MARK in the place of everything that may be a secret."""
        for value in self.values:
            text = text.replace(value, MARK)
        for pattern in _PATTERNS:
            text = pattern.sub(MARK, text)
        text = _URL_LOGIN.sub(rf"\1{MARK}@", text)
        text = _HEADER.sub(rf"\1{MARK}", text)
        text = _AUTHORIZATION.sub(rf"\1 {MARK}", text)
        for pattern in (_ASSIGNMENT, _UPPER_TOKEN, _LONG_TOKEN, _OPTION):
            text = pattern.sub(rf"\1{MARK}", text)
        return text

    def clean_argv(self, argv: Sequence[str]) -> list[str]:
        """A command line without the values of secret flags, in either spelling."""
        cleaned, hide_next = [], False
        for argument in argv:
            flag, equals, _ = argument.partition("=")
            secret_flag = argument.startswith("-") and is_secret_name(flag)
            if hide_next and not argument.startswith("-"):
                cleaned.append(MARK)
            elif secret_flag and equals:
                cleaned.append(f"{self.clean(flag)}={MARK}")
            else:
                cleaned.append(self.clean(argument))
            hide_next = secret_flag and not equals
        return cleaned


def _spellings(value: str) -> set[str]:
    """How a value may appear in a message: as it is, in a URL, in a repr, in JSON."""
    return {
        value,
        urllib.parse.quote(value, safe=""),
        urllib.parse.quote(value),
        urllib.parse.quote_plus(value),
        repr(value)[1:-1],
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
    }
