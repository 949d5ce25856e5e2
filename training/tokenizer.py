"""Byte-level BPE, lossless on any bytes.

Text is split by a GPT-style pattern (words with their leading space, digits in groups of at most
three, runs of white space), mapped byte by byte to printable characters, and merged (Sennrich et
al. 2016, Radford et al. 2019). Bytes that are not UTF-8 become single-byte tokens, so every file
can be scored and restored exactly.

The one special token, `<|endoftext|>`, opens every document. It is never produced from text: the
same characters in a document are encoded as ordinary text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from training.sources.base import ASSETS_DIRECTORY

END_OF_TEXT = "<|endoftext|>"
ASSET_NAMES = {
    "assets": "tokenizer_32k.json",
    "assets-32k": "tokenizer_32k.json",
    "assets-4k": "tokenizer_4k.json",
}
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")


def _byte_characters() -> dict[int, str]:
    """The stand-in of each byte (Radford et al. 2019): itself where printable, else from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> str:
    """Train a tokenizer and return its JSON. The same texts give the same bytes."""
    tokenizer = FastTokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=0) + "\n"


class Tokenizer:
    """A tokenizer.json with byte-level tokens and `<|endoftext|>`."""

    def __init__(self, content: bytes) -> None:
        """`content` is the JSON file's bytes; ValueError says what makes it unfit."""
        try:
            self._fast = FastTokenizer.from_buffer(content)
        except ValueError as error:
            raise ValueError(f"this is not a tokenizer.json: {error}") from error
        end_id = self._fast.token_to_id(END_OF_TEXT)
        if end_id is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT} token")
        # Without this, the characters of the special token inside a document would end it.
        self._fast.encode_special_tokens = True
        self._fast.no_padding()
        self._fast.no_truncation()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.end_id: int = end_id
        self.vocab_size: int = self._fast.get_vocab_size()
        self._token_bytes = self._read_token_bytes()
        self.token_byte_lengths = np.array(
            [len(token) for token in self._token_bytes], dtype=np.int32
        )
        self._byte_ids = self._read_byte_ids()

    @classmethod
    def from_name(cls, name: str) -> "Tokenizer":
        """`assets` (the 32k one), `assets-32k`, `assets-4k`, or the path of a tokenizer.json."""
        path = ASSETS_DIRECTORY / ASSET_NAMES[name] if name in ASSET_NAMES else Path(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            known = ", ".join(ASSET_NAMES)
            raise ValueError(
                f"--tokenizer-name {name}: {error.strerror or error}; use one of {known} "
                "or the path of a tokenizer.json"
            ) from error
        try:
            return cls(content)
        except ValueError as error:
            raise ValueError(f"--tokenizer-name {name}: {error}") from error

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of a text; never contains `end_id`. Any bytes are allowed."""
        if isinstance(text, str):
            try:
                return self._fast.encode(text, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError):
                text = text.encode(
                    "utf-8", "surrogatepass"
                )  # lone surrogates are no UTF-8: kept as bytes
        ids: list[int] = []
        for index, piece in enumerate(
            _INVALID_BYTES.split(text.decode("utf-8", "surrogateescape"))
        ):
            if index % 2:
                ids += [self._byte_ids[ord(character) - 0xDC00] for character in piece]
            elif piece:
                ids += self._fast.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, in threads that do not hold Python's lock."""
        try:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that `ids` stand for; special tokens stand for none."""
        return b"".join([self._token_bytes[token] for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text: what is not UTF-8 is shown as the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def pieces(self) -> list[str]:
        """The text of every token, by id; with the replacement character where it is no UTF-8."""
        return [self.decode([token]) for token in range(self.vocab_size)]

    def to_json(self) -> str:
        """What a tokenizer.json of these tokens holds."""
        return self._fast.to_str()

    def _read_token_bytes(self) -> list[bytes]:
        values = {character: byte for byte, character in _byte_characters().items()}
        special = {
            token_id
            for token_id, token in self._fast.get_added_tokens_decoder().items()
            if token.special
        }
        special.add(self.end_id)
        table = [b""] * self.vocab_size
        for token, token_id in self._fast.get_vocab(with_added_tokens=True).items():
            if token_id >= self.vocab_size:
                raise ValueError(
                    f"the token ids have gaps: id {token_id} of {self.vocab_size} tokens"
                )
            if token_id in special:
                continue
            if any(character not in values for character in token):
                raise ValueError(f"the tokenizer is not byte-level: token {token!r}")
            table[token_id] = bytes(values[character] for character in token)
        return table

    def _read_byte_ids(self) -> list[int]:
        ids = []
        for byte, character in sorted(_byte_characters().items()):
            token_id = self._fast.token_to_id(character)
            if token_id is None:
                raise ValueError(f"the tokenizer has no token for byte 0x{byte:02x}")
            ids.append(token_id)
        return ids
