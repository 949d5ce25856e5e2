"""Wiring of the adapters per domain: sources, learner, service (see build.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from model.sigma_llm import SigmaLLM
from training.build_rl import build_rl_autocast, count_real_batches
from training.config.sigma_config import ConfigError, SigmaConfig
from training.data import TokenCorpus
from training.hydra.domain import AdapterSettings
from training.hydra.dpo import DPOSettings
from training.hydra.gate import GateSettings
from training.hydra.learner import Hydra, HydraSettings
from training.hydra.merge import MergeSettings
from training.hydra.sources import Source, TaskSource, TextSource
from training.hydra_service import HydraService
from training.rl.symbolic import SYMPY
from training.rl.tasks import TaskSampler
from training.rl.verifier import Verifier
from training.runtime.clock import PhaseClock
from training.stream.batch import BatchStream
from training.tokenizer import Tokenizer


def build_hydra(
    config: SigmaConfig,
    model: SigmaLLM,
    tokenizer: Tokenizer,
    *,
    corpus: TokenCorpus,
    stream: BatchStream,
    clock: PhaseClock,
) -> HydraService | None:
    """The service of the adapters; None without `--hydra-enable`, and then nothing is built.

    ConfigError for the code domain where no sandbox can be had.
    """
    if not config.hydra.enable:
        return None
    sources: dict[str, Source] = {}
    for name in config.hydra.domain_names():
        if name == "text":
            sources[name] = text_source(config, tokenizer, corpus)
        else:
            sources[name] = task_source(config, name)
    require_gate_items(config, sources)
    learner = Hydra(
        model,
        tokenizer,
        sources,
        hydra_settings(config),
        seed=config.run.seed,
        autocast=build_rl_autocast(config, model.embed.weight.device),
    )
    return HydraService(
        learner=learner,
        real_batches=count_real_batches(config, stream),
        timed=lambda: clock("hydra"),
        directory=Path(config.run.output_dir) / "hydra",
    )


def require_gate_items(config: SigmaConfig, sources: Mapping[str, Source]) -> None:
    """ConfigError where a domain has fewer items than its gates and merges look at."""
    own = config.hydra
    if not (own.rollback_interval or own.steps_per_phase):
        return
    for name, source in sources.items():
        if (found := len(source.gate_items(own.gate_tasks))) < own.gate_tasks:
            for each in sources.values():
                each.close()
            raise ConfigError(
                f"--hydra-gate-tasks {own.gate_tasks}: {name} has only {found} items for its gate; "
                f"give --hydra-gate-tasks {found} or fewer"
            )


def task_source(config: SigmaConfig, domain: str) -> TaskSource:
    """Those of --ttrl-task-families that are of the domain, with a verifier of their own."""
    seed, is_code = config.run.seed, domain == "code"
    families = config.ttrl.families(math=not is_code, code=is_code)
    if not families:
        raise ConfigError(f"--hydra-domains {domain}: --ttrl-task-families has no task of it")
    engine = config.verifier.symbolic_engine if "symbolic" in families else SYMPY
    try:
        verifier = Verifier(code=is_code, timeout_ms=config.verifier.timeout_ms, engine=engine)
    except RuntimeError as error:
        left = ",".join(name for name in config.hydra.domain_names() if name != "code")
        mend = f"--hydra-domains {left}" if left else "--no-hydra-enable"
        reason = str(error).partition(";")[0]
        raise ConfigError(f"--hydra-domains code: {reason}; {mend} goes without it") from error
    return TaskSource(
        TaskSampler(families, seed=seed), TaskSampler(families, split="val", seed=seed), verifier
    )


def text_source(config: SigmaConfig, tokenizer: Tokenizer, corpus: TokenCorpus) -> TextSource:
    """Passages of the embedded training text."""
    split = corpus.splits["train"]

    def read(number: int) -> str:
        tokens = split.tokens[split.starts[number] : split.starts[number + 1]]
        return tokenizer.decode(token for token in tokens.tolist() if token != corpus.end_id)

    return TextSource(
        read, split.num_documents, cap=config.hydra.unverified_cap_text, seed=config.run.seed
    )


def hydra_settings(config: SigmaConfig) -> HydraSettings:
    """Settings of all domains; sampling follows the --ttrl flags."""
    own, ttrl, merge = config.hydra, config.ttrl, config.merge
    return HydraSettings(
        tasks=own.tasks,
        candidates=own.n_candidates,
        max_new_tokens=ttrl.max_new_tokens,
        temperature=ttrl.temperature,
        top_k=ttrl.top_k,
        gate_tasks=own.gate_tasks,
        placebo=own.placebo,
        fold=merge.fold_into_backbone,
        adapter=AdapterSettings(rank=own.lora_rank, alpha=own.lora_alpha, lr=own.lora_lr),
        dpo=DPOSettings(
            beta=own.dpo_beta,
            verbosity=own.sampo_verbosity_weight,
            max_len=ttrl.max_new_tokens,
        ),
        gate=GateSettings(threshold=own.rollback_threshold),
        merge=MergeSettings(method=merge.method, density=merge.density),
    )
