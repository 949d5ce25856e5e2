"""Text that is always there: the documents of the embedded corpus, while no source delivers."""

from __future__ import annotations

from training.data import TokenCorpus, permutation
from training.stream.packing import OpenDocument

BOOTSTRAP = "bootstrap"  # the key under which its tokens are counted
_ORDER_STREAM = 7


class BootstrapDocuments:
    """The training documents of a corpus, each epoch in an order of its own; endless.

    The position is a number: document `index` of the sequence of all epochs.
    """

    def __init__(self, corpus: TokenCorpus, *, seed: int) -> None:
        self._split = corpus.splits["train"]
        self._seed = seed
        self._epoch = -1
        self.size = self._split.num_documents

    def document(self, index: int) -> OpenDocument:
        """Document `index` (0-based) of the endless sequence; its tokens are a view of the
        corpus."""
        epoch, place = divmod(index, self.size)
        if epoch != self._epoch:
            self._order = permutation(self.size, seed=self._seed, epoch=epoch, stream=_ORDER_STREAM)
            self._epoch = epoch
        number = self._order[place]
        split = self._split
        return OpenDocument(
            key=BOOTSTRAP,
            tokens=split.tokens[split.starts[number] : split.starts[number + 1]],
            source_id=int(split.source_ids[number]),
        )
