"""`--mode chat`: take turns with the newest checkpoint, in one growing text.

A model trained from scratch on plain text knows no roles and no chat format. So nothing is put
around what is typed: each line goes on where the text stands, the model goes on from there, and
both are what it reads in the next turn, until it ends the text or the person begins a new one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from model.generation import iter_generate
from model.sigma_llm import SigmaLLM
from training.build import build_autocast
from training.build_inference import load_for_inference
from training.config.sections import GenerateConfig
from training.config.sigma_config import SigmaConfig
from training.modes.generate import stream_text
from training.runtime.console import is_interactive, read_line
from training.runtime.environment import configure_threads, resolve_device
from training.runtime.text import printable
from training.tokenizer import Tokenizer

RESTART = "/new"
END = "/quit"
PROMPT = "> "


class Conversation:
    """One text that a person and a model write in turns.

    The model reads its newest `max_context` tokens (the length it was trained with) at each turn.
    `ended` tells whether the model ended the text; what is typed next then begins another.
    """

    def __init__(
        self,
        model: SigmaLLM,
        tokenizer: Tokenizer,
        settings: GenerateConfig,
        *,
        max_context: int,
        seed: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._max_context = max_context
        self._device = next(model.parameters()).device
        self._generator = torch.Generator(device=self._device).manual_seed(seed)
        self._tokens: list[int] = []
        self.ended = False
        self.restart()

    def restart(self) -> None:
        """Begin a new text, with --prompt as its beginning."""
        tokenizer = self._tokenizer
        self._tokens = [tokenizer.end_id, *tokenizer.encode(self._settings.prompt)]
        self.ended = False

    def answer(self, text: str) -> Iterator[str]:
        """Append `text` and yield its continuation in pieces of whole characters.

        What was yielded until the caller stops is part of the conversation.
        """
        if self.ended:
            self.restart()
        self._tokens += self._tokenizer.encode(text)
        context = torch.tensor([self._tokens[-self._max_context :]], device=self._device)
        tokens = iter_generate(
            self._model,
            context,
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            top_k=self._settings.top_k,
            generator=self._generator,
            stop_id=self._tokenizer.end_id,
        )
        return stream_text(self._remember(tokens), tokenizer=self._tokenizer)

    def _remember(self, tokens: Iterator[int]) -> Iterator[int]:
        limit = len(self._tokens) + self._settings.max_new_tokens
        for token in tokens:
            self._tokens.append(token)
            yield token
        self.ended = len(self._tokens) < limit


def run(config: SigmaConfig) -> int:
    """Answer every line of stdin until it ends; with --json one object a turn."""
    device = resolve_device(config)
    configure_threads()
    loaded = load_for_inference(config)
    conversation = Conversation(
        loaded.model,
        loaded.tokenizer,
        config.generate,
        max_context=loaded.config.data.seq_len,
        seed=config.run.seed,
    )
    if is_interactive() and not config.run.json:
        print(f"Checkpoint of step {loaded.step}. It goes on from what you type, and on an empty")
        print(f"line from where it stopped. Ctrl+C stops an answer, {RESTART} begins a new text,")
        print(f"{END} ends.")
    with build_autocast(config, device)():
        for line in _typed_lines():
            if line == RESTART:
                conversation.restart()
            elif config.run.json:
                text = "".join(conversation.answer(line))
                row = {"checkpoint_step": loaded.step, "typed": line, "text": text}
                print(json.dumps(row | {"ended": conversation.ended}), flush=True)
            else:
                _show(conversation.answer(line))
                if conversation.ended and is_interactive():
                    print("(end of this text)")
    return 0


def _typed_lines() -> Iterator[str]:
    """Lines of stdin until its end, `/quit`, or Ctrl+C while waiting for one."""
    asks = is_interactive()
    while True:
        if asks:
            print(PROMPT, end="", flush=True)
        try:
            line = read_line(None)
        except (EOFError, KeyboardInterrupt):
            line = END
            if asks:
                print()
        if line is None or line.strip() == END:
            return
        yield line.strip() if line.strip() == RESTART else line


def _show(pieces: Iterator[str]) -> None:
    """Write pieces as they come; Ctrl+C ends the answer, not the program."""
    clean = printable if sys.stdout.isatty() else str
    try:
        for piece in pieces:
            sys.stdout.write(clean(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
    sys.stdout.flush()
