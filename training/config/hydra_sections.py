"""Settings of the adapters per domain and of their merge."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import ConfigError, flag

DOMAINS = ("math", "code", "text")
MERGE_METHODS = ("ties", "dare_ties")
HYDRA_PLACEBOS = ("none", "permuted")


@dataclass(slots=True, kw_only=True)
class HydraConfig:
    """Sampling is that of --ttrl-temperature, --ttrl-top-k and --ttrl-max-new-tokens."""

    enable: bool = flag(False, "Teach an adapter per domain by preferences, gate and merge them.")
    domains: str = flag("math,code,text", "Domains, separated by commas: math, code, text.")
    steps_per_phase: int = flag(5000, "Steps between merges; 0 = no merge.", minimum=0)
    n_candidates: int = flag(
        4, "Samples per task of an update, besides a greedy one.", minimum=1, maximum=4096
    )
    tasks: int = flag(1, "Tasks per update.", minimum=1, maximum=4096)
    unverified_cap_text: float = flag(
        0.20, "Most that text without a right answer can earn.", minimum=0.0, maximum=1.0
    )
    rollback_interval: int = flag(200, "Steps between gates; 0 = no gate.", minimum=0)
    rollback_threshold: float = flag(
        0.01, "Fall of the pass rate up to which nothing is undone.", minimum=0.0, maximum=1.0
    )
    gate_tasks: int = flag(200, "Items of each domain's gate.", minimum=1, maximum=10**6)
    update_interval: int = flag(16, "Steps between updates, domain after domain.", minimum=1)
    dpo_beta: float = flag(0.1, "Beta of DPO.", above=0.0)
    sampo_verbosity_weight: float = flag(
        0.02, "Weight of the difference in length inside DPO's sigmoid.", minimum=0.0
    )
    lora_rank: int = flag(8, "Rank of the adapters.", minimum=1, maximum=2**16)
    lora_alpha: float = flag(16.0, "An adapter is scaled by this / rank.", above=0.0)
    lora_lr: float = flag(1e-4, "Step size of the adapters (AdamW).", above=0.0, maximum=1.0)
    placebo: str = flag(
        "none", "Placebo: deal the two rewards of a pair out anew.", choices=HYDRA_PLACEBOS
    )

    def domain_names(self) -> list[str]:
        """The domains in their order; ConfigError for an unknown or a repeated one, or for none."""
        names = [name.strip() for name in self.domains.split(",")]
        if len(set(names)) < len(names) or not set(names) <= set(DOMAINS):
            raise ConfigError(
                f"--hydra-domains takes {', '.join(DOMAINS)}, each at most once, "
                f"not {self.domains!r}"
            )
        return names


@dataclass(slots=True, kw_only=True)
class MergeConfig:
    method: str = flag(
        "ties", "How the adapters' products are merged; dare_ties drops entries at random first.",
        choices=MERGE_METHODS,
    )  # fmt: skip
    density: float = flag(
        1.0, "Share of entries kept: the largest (ties), or by chance.", above=0.0, maximum=1.0
    )
    fold_into_backbone: bool = flag(
        False,
        "Add a merge to the model's weights by which the domains gain in sum and none loses more "
        "than --hydra-rollback-threshold.",
    )
