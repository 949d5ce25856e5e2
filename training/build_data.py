"""Wiring of what is trained on: tokenizer, corpus, probe text and stream (see build.py)."""

from __future__ import annotations

from training.config.sigma_config import ConfigError, SigmaConfig
from training.data import TokenCorpus, TokenStream, tokenize_corpus
from training.evaluation import read_eval_file
from training.hidden_eval import read_manifest
from training.runtime.environment import (
    CACHE_DIRECTORY,
)
from training.sources.embedded import EmbeddedCorpus
from training.sources.registry import source_specs
from training.stream.batch import BatchStream
from training.stream.contamination import ContaminationIndex
from training.stream.open_stream import open_stream
from training.tokenizer import Tokenizer

TOKEN_CACHE = CACHE_DIRECTORY / "tokens"
SPOOL = CACHE_DIRECTORY / "spool"


def build_tokenizer(config: SigmaConfig) -> Tokenizer:
    """ValueError for a file that cannot be read or is no tokenizer of this kind."""
    return Tokenizer.from_name(config.data.tokenizer_name)


def build_corpus(config: SigmaConfig, tokenizer: Tokenizer) -> TokenCorpus:
    """The embedded corpus in tokens, out of the token cache where this tokenizer has met it
    before."""
    return tokenize_corpus(EmbeddedCorpus(), tokenizer, cache_dir=TOKEN_CACHE)


def build_stream(config: SigmaConfig, tokenizer: Tokenizer, corpus: TokenCorpus) -> BatchStream:
    """The stream of `--data-backend`; other backends than embedded ask their sources here."""
    if config.stream.data_backend != "embedded" or source_specs(config.stream, seed=0):
        return open_stream(
            config,
            tokenizer=tokenizer,
            corpus=corpus,
            spool_directory=SPOOL,
            evaluation=build_evaluation_index(config),
        )
    if config.adaptive.enable_adaptive_sources:
        raise ConfigError(
            "--aux-enable-adaptive-sources needs sources to choose from: use --data-backend "
            "local, hf, commoncrawl or hybrid"
        )
    return TokenStream(
        corpus,
        seed=config.run.seed,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
    )


def build_evaluation_index(config: SigmaConfig) -> ContaminationIndex | None:
    """What a run is judged by and may not read: the validation split, the hidden questions and
    `--eval-file`; None without `--contamination-check`."""
    if not config.stream.contamination_check:
        return None
    texts = [EmbeddedCorpus().validation_text().decode()]
    if content := read_eval_file(config.generate.eval_file):
        texts.append(content.decode("utf-8", "replace"))
    hidden = read_manifest(config.integrity.integrity_hidden_eval_manifest)
    return ContaminationIndex(texts, passages=hidden.passages)
