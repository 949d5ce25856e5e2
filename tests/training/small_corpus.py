"""A corpus of random words, small enough for every test to tokenize."""

import hashlib

import numpy as np
import torch

from training.sources.base import Document
from training.tokenizer import END_OF_TEXT, Tokenizer

TOKENIZER = Tokenizer.from_name("assets-4k")
WORDS = ["table", "index", "Größe", "lord", "commit", "42", "returns", "the", END_OF_TEXT, "\n\n"]


class SmallCorpus:
    """Documents of random words, drawn from a seed."""

    def __init__(self, *, seed=0, num_documents=60):
        generator = np.random.default_rng(seed)
        self.fingerprint = hashlib.sha256(str(seed).encode()).hexdigest()
        self.reads = 0
        self._documents = [
            Document(
                id=f"doc/{number}",
                source=("python-docs", "king-james-bible")[number % 2],
                text=f"document {number}: "
                + " ".join(generator.choice(WORDS, size=int(generator.integers(1, 90)))),
            )
            for number in range(num_documents)
        ]

    def documents(self):
        self.reads += 1
        return iter(self._documents)


def assert_same(left, right):
    assert torch.equal(left.input_ids, right.input_ids)
    assert torch.equal(left.labels, right.labels)
    assert torch.equal(left.reset_mask, right.reset_mask)
    assert torch.equal(left.source_ids, right.source_ids)
    assert left.num_bytes == right.num_bytes
