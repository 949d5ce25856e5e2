"""A small SigmaLLM on a Markov chain, with C3O on it, for tests of credit."""

import torch

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from tests.trainable import patched
from training.config.c3o_sections import C3OConfig
from training.config.sections import OptimConfig
from training.optimizer import build_optimizer
from training.stream.batch import Batch

VOCAB, LENGTH = 64, 32


def small_model(*, quant_mode="bitnet_1_58", experts=4, seed=0):
    config = SigmaModelConfig(
        vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=2, mamba_ratio=1, attention_ratio=1,
        kv_latent_dim=16, rope_dim=8, mamba_head_dim=16, mamba_d_state=8, mimo_rank=2,
        d_ff=48, n_routed_experts=experts, moe_top_k=min(2, experts) or 1, quant_mode=quant_mode,
    )  # fmt: skip
    return patched(SigmaLLM(config, seed=seed))


def chain_batch(generator, *, rows):
    """Rows of a fixed Markov chain: its transitions are what there is to learn."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
    table = torch.softmax(2.5 * table, -1)
    tokens = torch.zeros(rows, LENGTH + 1, dtype=torch.long)
    tokens[:, 0] = torch.randint(1, VOCAB, (rows,), generator=generator)
    for place in range(LENGTH):
        drawn = torch.multinomial(table[tokens[:, place]], 1, generator=generator)
        tokens[:, place + 1] = drawn.squeeze(1)
    return as_batch(tokens[:, :-1], tokens[:, 1:])


def as_batch(inputs, labels):
    return Batch(
        input_ids=inputs.contiguous(),
        labels=labels.contiguous(),
        reset_mask=torch.zeros(inputs.shape, dtype=torch.bool),
        source_ids=torch.zeros(inputs.shape, dtype=torch.int16),
        num_bytes=inputs.numel(),
    )


def c3o_for(model, *, lr=0.02, adam_lr=0.01, seed=0, **changes):
    settings = OptimConfig(optimizer="c3o", lr=lr, adam_lr=adam_lr, weight_decay=0.0)
    changes = {"credit_enabled": True, **changes}
    return build_optimizer(model, settings, seed=seed, c3o=C3OConfig(**changes))


def backward(model, batch):
    model.train()
    output = model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
    (output.loss + sum(output.aux.values())).backward()
    return output.loss.detach()


def train_step(model, optimizer, batch):
    loss = backward(model, batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.after_optimizer_step()
    optimizer.zero_grad()
    return loss
