"""`--mode eval`: bits per byte of the newest checkpoint, on a file or on the validation split.

With `--ttt-enabled` the text is scored a second time by a model that learns from each chunk after
its score (training/ttt.py). With `--hidden` it answers the hidden evaluation instead; a training
run starts this mode in a process of its own (training/hidden_process.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from training.build import EVAL_BATCH_TOKENS, build_autocast
from training.build_data import build_corpus
from training.build_inference import TrainedModel, load_for_inference
from training.config.sigma_config import ConfigError, SigmaConfig
from training.data import IGNORED_LABEL, Batch, text_batches, validation_batches
from training.evaluation import evaluate_bpb, read_eval_file
from training.hidden_eval import as_columns, choose_questions, evaluate_hidden, read_manifest
from training.hidden_process import end_with_trainer
from training.runtime.environment import configure_threads, resolve_device
from training.ttt import TTTSettings, cut_chunks, evaluate_with_ttt


def run(config: SigmaConfig) -> int:
    """Measure and print; ValueError says in one line what is missing. Reads only."""
    if config.generate.hidden and config.ttt.enabled:
        raise ConfigError("--ttt-enabled learns from a text that is scored: leave out --hidden")
    if config.generate.hidden:
        return _run_hidden(config)
    content = read_eval_file(config.generate.eval_file)
    device = resolve_device(config)
    configure_threads()
    loaded = load_for_inference(config)
    batches = list(_batches(config, loaded, content=content))
    if config.ttt.enabled:
        _require_two_chunks(batches, chunk_tokens=config.ttt.chunk_tokens)
    how = {"device": device, "autocast": build_autocast(config, device)}
    start = time.perf_counter()
    result = evaluate_bpb(loaded.model, batches, **how)
    seconds = time.perf_counter() - start
    report = {
        "checkpoint_step": loaded.step,
        "text": config.generate.eval_file or "validation split",
        **asdict(result),
        "tokens_per_s": result.num_tokens / max(seconds, 1e-9),
    }
    if config.ttt.enabled:
        report |= _learned(config, loaded, batches, **how)
    print(json.dumps(report) if config.run.json else _sentences(report))
    return 0


def _require_two_chunks(batches: list[Batch], *, chunk_tokens: int) -> None:
    """ConfigError when nothing could be learned: the last chunk never is, its score is the end."""
    if len(cut_chunks(batches, num_tokens=chunk_tokens)) > 1:
        return
    seq_len = batches[0].input_ids.shape[1]
    num_labels = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in batches)
    # A chunk is whole rows, and one that holds the end of the text alone is none: -1 is that label.
    rows = -(-(num_labels - 1) // seq_len)
    mend = (
        f"give --ttt-chunk-tokens {rows // 2 * seq_len} or less" if rows > 1 else "give more text"
    )
    raise ConfigError(
        f"--ttt-enabled: the text is one chunk of --ttt-chunk-tokens {chunk_tokens}, and a chunk "
        f"is learned from for the next one only: {mend}"
    )


def _learned(
    config: SigmaConfig, loaded: TrainedModel, batches: list[Batch], **how: Any
) -> dict[str, Any]:
    """What the text costs a model that learns from every chunk once it is scored."""
    own = config.ttt
    settings = TTTSettings(
        chunk_tokens=own.chunk_tokens,
        epochs=own.epochs,
        lr=own.lr,
        momentum=own.momentum,
        grad_clip=own.grad_clip,
        scope=own.scope,
    )
    result = asdict(evaluate_with_ttt(loaded.model, batches, settings=settings, **how))
    score = result.pop("score")
    return {"ttt_bpb": score["bpb"], "ttt_loss": score["loss"], **result}


def _run_hidden(config: SigmaConfig) -> int:
    """Share of hidden questions answered rightly, with its interval."""
    end_with_trainer()
    manifest = read_manifest(config.integrity.integrity_hidden_eval_manifest)
    questions = choose_questions(manifest, config.integrity.integrity_hidden_eval_tasks)
    device = resolve_device(config)
    configure_threads()
    loaded = load_for_inference(config)
    autocast = build_autocast(config, device)
    result = evaluate_hidden(
        loaded.model, loaded.tokenizer, questions, device=device, autocast=autocast
    )
    report = {"checkpoint_step": loaded.step, **as_columns(result), "chance": manifest.chance}
    sentence = (
        f"{result.hidden_eval_pass:.1%} of {result.hidden_eval_n} hidden questions answered "
        f"rightly (95 % interval {result.hidden_eval_ci_low:.1%} to "
        f"{result.hidden_eval_ci_high:.1%}; guessing gives {manifest.chance:.1%}), "
        f"{result.hidden_eval_greedy_pass:.1%} written by greedy decoding, "
        f"checkpoint of step {loaded.step}"
    )
    print(json.dumps(report) if config.run.json else sentence)
    return 0


def _batches(
    config: SigmaConfig, loaded: TrainedModel, *, content: bytes | None
) -> Iterator[Batch]:
    """The text in windows of the length the model was trained with."""
    tokenizer, seq_len = loaded.tokenizer, loaded.config.data.seq_len
    most = min(EVAL_BATCH_TOKENS, config.ttt.chunk_tokens if config.ttt.enabled else 2**62)
    batch_size = max(1, most // seq_len)
    if content is not None:
        return text_batches(content, tokenizer=tokenizer, seq_len=seq_len, batch_size=batch_size)
    return validation_batches(
        build_corpus(loaded.config, tokenizer),
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=config.eval.eval_tokens or None,
    )


def _sentences(report: dict[str, Any]) -> str:
    said = (
        f"{report['bpb']:.4f} bits per byte on {report['text']} "
        f"({report['num_bytes']:,} bytes, {report['num_tokens']:,} tokens)\n"
        f"loss {report['loss']:.4f} nats per token, checkpoint of step "
        f"{report['checkpoint_step']}, {report['tokens_per_s']:,.0f} tokens/s"
    )
    if "ttt_bpb" in report:
        said += (
            f"\n{report['ttt_bpb']:.4f} bits per byte with test-time training: "
            f"{report['ttt_trained_chunks']} of {report['ttt_chunks']} chunks learned after their "
            "score"
        )
    return said
