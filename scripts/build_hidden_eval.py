"""Draw a new hidden evaluation: `training/hidden_eval_manifest.json`.

`python -m scripts.build_hidden_eval --seed-file FILE` reads 32 bytes, or makes them in a file that
does not exist yet. Keep that file out of the project and of every corpus: with it the questions can
be drawn again and compared (`--check`), without it nobody can tell which answer is the true one but
by the hashes. A new seed gives a new evaluation; figures before and after do not compare.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
from pathlib import Path

from scripts.hidden_items import GENERATOR_VERSION, Draw, HiddenItem, generate_items
from training.hidden_eval import (
    DEFAULT_MANIFEST,
    HiddenManifest,
    Question,
    answer_hash,
    decode_manifest,
    encode_manifest,
)
from training.stream.contamination import passages_of

NUM_QUESTIONS = 400
SEED_BYTES = 32


def build_manifest(seed: bytes, *, num_questions: int = NUM_QUESTIONS) -> HiddenManifest:
    """The manifest that belongs to a seed of 32 bytes."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes, not {len(seed)}")
    items = generate_items(seed, num_questions)
    salts = Draw(hashlib.sha256(b"salts" + seed).digest())
    return HiddenManifest(
        generator=GENERATOR_VERSION,
        seed_commitment=hashlib.sha256(seed).hexdigest(),
        questions=tuple(_seal(item, salt=salts.salt()) for item in items),
        # Over all choices alike, or the index would tell which of them is the true one.
        passages=passages_of(item.prompt + choice for item in items for choice in item.choices),
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw a new hidden evaluation.")
    parser.add_argument("--seed-file", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=DEFAULT_MANIFEST)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    chosen = parser.parse_args(arguments)
    if not chosen.check and not chosen.seed_file.exists():
        chosen.seed_file.write_bytes(secrets.token_bytes(SEED_BYTES))
    text = encode_manifest(build_manifest(chosen.seed_file.read_bytes()))
    if chosen.check:
        # Packed again here: another zlib may pack the same questions into other bytes.
        stored = decode_manifest(chosen.output.read_text(encoding="utf-8"))
        same = encode_manifest(stored) == text
        print(f"{chosen.output} {'is' if same else 'is NOT'} what the seed gives")
        return 0 if same else 1
    chosen.output.write_text(text, encoding="utf-8", newline="\n")
    print(f"{chosen.output}: {NUM_QUESTIONS} questions, {len(text):,} bytes")
    return 0


def _seal(item: HiddenItem, *, salt: bytes) -> Question:
    truth = item.choices[item.truth]
    return Question(
        family=item.family,
        prompt=item.prompt,
        choices=item.choices,
        salt=salt,
        sealed=answer_hash(truth, salt=salt, prompt=item.prompt),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
