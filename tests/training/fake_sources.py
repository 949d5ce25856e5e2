"""Sources in memory whose failures are scripted, and a clock that only the test moves."""

from collections import Counter

import numpy as np

from training.sources.base import Document, SourceError, SourceExhausted

WORDS = ["table", "index", "Größe", "lord", "commit", "42", "returns", "the", "\n\n", "stream"]


class FakeClock:
    """Time that passes when somebody sleeps."""

    def __init__(self):
        self.now = 0.0
        self.slept = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds


class FakeSource:
    """`size` documents an epoch, each a function of (name, epoch, index); `fails(source)` may say
    that this call fails, by returning the error to raise."""

    def __init__(self, name="local", *, key=None, size=200, fails=None, words=(1, 60), prefix=""):
        self.name = name
        self.key = key or name
        self.size = size
        self.fails = fails
        self.words = words
        self.prefix = prefix
        self.rejected = Counter()
        self.epoch = self.index = 0
        self.calls = self.loads = 0
        self.closed = False

    def identity(self):
        return {"key": self.key, "size": self.size}

    def next_document(self):
        self.calls += 1
        error = self.fails(self) if self.fails else None
        if error is not None:
            raise error
        if self.index >= self.size:
            raise SourceExhausted
        document = self.document(self.epoch, self.index)
        self.index += 1
        return document

    def document(self, epoch, index):
        seed = sum(self.key.encode()) * 1_000_003 + epoch * 10_007 + index
        generator = np.random.default_rng(seed)
        count = int(generator.integers(*self.words))
        text = f"{self.prefix}{self.key} {epoch} {index}: " + " ".join(
            generator.choice(WORDS, count)
        )
        return Document(id=f"{self.key}/{index}", source=self.name, text=text)

    def state_dict(self):
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state):
        self.loads += 1
        self.epoch, self.index = state["epoch"], state["index"]

    def rewind(self, *, epoch):
        self.epoch, self.index = epoch, 0

    def close(self):
        self.closed = True


def transient(reason="timeout"):
    return SourceError(f"the fake source says {reason}", reason=reason, transient=True)


def permanent(message="401 for this dataset: set HF_TOKEN"):
    return SourceError(message, reason="http_401", transient=False)
