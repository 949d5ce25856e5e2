"""The hidden evaluation: can the model tell the true continuation from three others?

The questions were drawn by `scripts/build_hidden_eval.py` from a seed that is not in the project;
`hidden_eval_manifest.json` keeps its sha256 (so that whoever holds the seed can prove that nothing
was picked by hand), the questions in packed form, and of each answer a salted hash only. The model
answers in two ways. Ranked: of four continuations the one with the highest log likelihood per byte
is hashed and compared; guessing gives 25 %. Greedy: what the model would write, the most likely
token after each, is compared; guessing gives nothing. Greedy decoding is what
is meant, but a small model writes no right answer for millions of tokens, and a figure that
does not move measures nothing, so the ranked share is the headline and both are recorded. Greedy
costs no second pass: a model writes exactly a given text if and only if each of its tokens is the
most likely one after those before, and no choice is the beginning of another.

The hashes keep answers out of texts, searches and accidents. They are no secret from someone who
runs this file on every choice; what keeps a run honest is that nothing that trains can import it,
which a test proves.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training.tokenizer import Tokenizer

SCHEMA = 2  # 2: passages are hashed as training text is (training/stream/contamination.py)
DEFAULT_MANIFEST = Path(__file__).with_name("hidden_eval_manifest.json")
MAX_MANIFEST_BYTES = 8 * 2**20
FORWARD_TOKENS = 1024  # the logits of one forward: 128 MiB with 32k tokens of vocabulary
Z_95 = 1.959963984540054


@dataclass(slots=True, kw_only=True, frozen=True)
class Question:
    """A prompt with its continuations; which one is true only the hash in `sealed` knows."""

    family: str
    prompt: str
    choices: tuple[str, ...]
    salt: bytes
    sealed: bytes

    def is_answered_by(self, choice: str) -> bool:
        """Whether a continuation is the true one; it need not be one of `choices`."""
        return answer_hash(choice, salt=self.salt, prompt=self.prompt) == self.sealed


@dataclass(slots=True, kw_only=True, frozen=True)
class HiddenManifest:
    """The questions in their fixed order, and `passages`: the runs of words in all of them, by
    which training text is checked (`training.stream.contamination.passages_of`)."""

    generator: str
    seed_commitment: str
    questions: tuple[Question, ...]
    passages: np.ndarray

    @property
    def chance(self) -> float:
        return sum(1 / len(q.choices) for q in self.questions) / len(self.questions)


@dataclass(slots=True, kw_only=True)
class HiddenResult:
    """Share of questions answered rightly, its 95 % Wilson interval, and how many were asked;
    `greedy`: the share whose right answer is what the model would write."""

    hidden_eval_pass: float
    hidden_eval_ci_low: float
    hidden_eval_ci_high: float
    hidden_eval_n: int
    hidden_eval_greedy_pass: float


def answer_hash(choice: str, *, salt: bytes, prompt: str) -> bytes:
    """16 bytes that tie a continuation to its question."""
    content = json.dumps([prompt, choice]).encode()
    return hashlib.blake2b(content, key=salt, digest_size=16).digest()


def encode_manifest(manifest: HiddenManifest) -> str:
    """Text of the manifest file; `decode_manifest` reads back exactly this value."""
    listed = [[q.family, q.prompt, list(q.choices)] for q in manifest.questions]
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "generator": manifest.generator,
        "seed_commitment": manifest.seed_commitment,
        "num_questions": len(listed),
        "families": dict(sorted(Counter(q.family for q in manifest.questions).items())),
        "chance": manifest.chance,
        "questions": _pack(json.dumps(listed, separators=(",", ":")).encode()),
        "answers": [f"{q.salt.hex()}:{q.sealed.hex()}" for q in manifest.questions],
        "passages": _pack(manifest.passages.astype("<u8").tobytes()),
    }
    return json.dumps({**body, "sha256": _body_hash(body)}, indent=1) + "\n"


def decode_manifest(text: str) -> HiddenManifest:
    """Inverse of `encode_manifest`; ValueError says what is wrong with the text."""
    try:
        document = json.loads(text)
        claimed = document.pop("sha256")
        if document["schema"] != SCHEMA:
            raise ValueError(f"has schema {document['schema']!r}, this program knows {SCHEMA}")
        if claimed != _body_hash(document):
            raise ValueError("does not match its own sha256")
        listed = json.loads(_unpack(document["questions"]))
        sealed = [bytes.fromhex(part) for line in document["answers"] for part in line.split(":")]
        questions = tuple(
            Question(family=family, prompt=prompt, choices=tuple(choices), salt=salt, sealed=answer)
            for (family, prompt, choices), salt, answer in zip(
                listed, sealed[::2], sealed[1::2], strict=True
            )
        )
        passages = np.frombuffer(_unpack(document["passages"]), dtype="<u8")
    except (KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise ValueError(f"is not a hidden evaluation manifest ({error})") from error
    return HiddenManifest(
        generator=document["generator"],
        seed_commitment=document["seed_commitment"],
        questions=questions,
        passages=passages.astype(np.uint64),
    )


def read_manifest(name: str) -> HiddenManifest:
    """The manifest at a path, or the shipped one for ""; ValueError names the flag and the mend."""
    path = Path(name) if name else DEFAULT_MANIFEST
    flag = f"--integrity-hidden-eval-manifest {path}"
    try:
        with path.open("rb") as file:
            return decode_manifest(file.read(MAX_MANIFEST_BYTES).decode())
    except OSError as error:
        cause = error.strerror or error
        raise ValueError(f"{flag}: {cause}; leave the flag empty for the shipped one") from error
    except ValueError as error:
        raise ValueError(f"{flag}: {error}; restore the file or leave the flag empty") from error


def choose_questions(manifest: HiddenManifest, count: int) -> tuple[Question, ...]:
    """The first `count` questions: the same ones in every evaluation, families in turn."""
    if count > len(manifest.questions):
        raise ValueError(
            f"--integrity-hidden-eval-tasks {count}: the manifest holds "
            f"{len(manifest.questions)}; ask for at most that many"
        )
    return manifest.questions[:count]


def evaluate_hidden(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> HiddenResult:
    """Let the model answer; deterministic, leaves every module's mode as it was.

    `model(input_ids (B, T)).logits` must be (B, T, V) with logits[t] for token t + 1.
    """
    texts = [(q.prompt, choice) for q in questions for choice in q.choices]
    read = iter(read_continuations(model, tokenizer, texts, device=device, autocast=autocast))
    passed = written = 0
    for question in questions:
        ranked = [(*next(read), choice) for choice in question.choices]
        best = max(range(len(ranked)), key=lambda place: ranked[place][0])
        passed += question.is_answered_by(ranked[best][2])
        # Two choices can be written only where tokens tie; then the first one is.
        answer = next((choice for _, greedy, choice in ranked if greedy), None)
        written += answer is not None and question.is_answered_by(answer)
    low, high = wilson_interval(passed, len(questions))
    return HiddenResult(
        hidden_eval_pass=passed / len(questions),
        hidden_eval_ci_low=low,
        hidden_eval_ci_high=high,
        hidden_eval_n=len(questions),
        hidden_eval_greedy_pass=written / len(questions),
    )


@torch.no_grad()
def read_continuations(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, str]],
    *,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> list[tuple[float, bool]]:
    """Of each continuation after its prompt: log likelihood in nats per byte, and whether it is
    what greedy decoding writes there."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    rows = []
    for prompt, continuation in texts:
        before = [tokenizer.end_id, *tokenizer.encode(prompt)]
        rows.append((before, tokenizer.encode(continuation), len(continuation.encode())))
    order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]) + len(rows[place][1]))
    found = [(0.0, False)] * len(rows)
    try:
        for group in _groups(order, rows):
            with (autocast or nullcontext)():
                values = _score_rows(model, [rows[place] for place in group], device=device)
            for place, value in zip(group, values, strict=True):
                found[place] = value
    finally:
        for module in training_modules:
            module.training = True
    return found


def wilson_interval(passed: int, total: int, *, z: float = Z_95) -> tuple[float, float]:
    """Interval of a share that also holds at 0 and 1 (Wilson 1927)."""
    if total <= 0:
        raise ValueError("an interval needs at least one question")
    share, spread = passed / total, z * z / total
    middle = share + spread / 2
    width = z * math.sqrt((share * (1 - share) + spread / 4) / total)
    return max(0.0, (middle - width) / (1 + spread)), min(1.0, (middle + width) / (1 + spread))


def as_columns(result: HiddenResult) -> dict[str, float]:
    """The figures by column name, as --mode eval prints them and a metrics row shows them."""
    return asdict(result)


Row = tuple[list[int], list[int], int]


def _groups(order: list[int], rows: list[Row]) -> list[list[int]]:
    """Rows of similar length together, at most FORWARD_TOKENS with padding."""
    groups: list[list[int]] = [[]]
    for place in order:
        length = len(rows[place][0]) + len(rows[place][1])
        if groups[-1] and (len(groups[-1]) + 1) * length > FORWARD_TOKENS:
            groups.append([])
        groups[-1].append(place)
    return groups


def _score_rows(
    model: nn.Module, rows: list[Row], *, device: torch.device | str
) -> list[tuple[float, bool]]:
    """Padding stands behind the text, where a causal model cannot see it."""
    width = max(len(before) + len(after) for before, after, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    for place, (before, after, _) in enumerate(rows):
        tokens[place, : len(before) + len(after)] = torch.tensor(before + after)
    logits = model(tokens.to(device)).logits.float()
    scores = []
    for place, (before, after, num_bytes) in enumerate(rows):
        span = slice(len(before) - 1, len(before) + len(after) - 1)
        likely = logits[place, span].log_softmax(dim=-1)
        own = torch.tensor(after, device=likely.device)
        chosen = likely.gather(1, own[:, None])
        greedy = bool((likely.argmax(dim=-1) == own).all())
        scores.append((float(chosen.double().sum()) / num_bytes, greedy))
    return scores


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _pack(content: bytes) -> str:
    return base64.b85encode(zlib.compress(content, 9)).decode()


def _unpack(text: str) -> bytes:
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b85decode(text), MAX_MANIFEST_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError("is far larger than a hidden evaluation")
    return content
