"""Models whose answers are known: what the controls of the hidden evaluation are made of."""

from types import SimpleNamespace

import torch
from torch import nn

from training.hidden_eval import Question


class KnowingModel(nn.Module):
    """Finds every text of `liked` likelier than any other of the same length and start.

    It looks its own input up: after each prefix of a liked text the next token gets all the mass.
    """

    def __init__(self, tokenizer, liked):
        super().__init__()
        self.vocab_size = tokenizer.vocab_size
        self.following = {}
        for prompt, continuation in liked:
            tokens = [tokenizer.end_id, *tokenizer.encode(prompt)]
            for token in tokenizer.encode(continuation):
                self.following.setdefault(tuple(tokens), set()).add(token)
                tokens.append(token)

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, tokens in enumerate(input_ids.tolist()):
            for place in range(len(tokens)):
                for token in self.following.get(tuple(tokens[: place + 1]), ()):
                    logits[row, place, token] = 30.0
        return SimpleNamespace(logits=logits)


class UnigramModel(nn.Module):
    """Knows how likely tokens are and nothing of their context."""

    def __init__(self, vocab_size, *, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = 3.0 * torch.randn(vocab_size, generator=generator)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def true_choice(question: Question) -> str:
    """The answer, found as anyone may who runs the hash on every choice."""
    (found,) = [choice for choice in question.choices if question.is_answered_by(choice)]
    return found
