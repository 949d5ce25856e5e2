"""A compiled model is the model: same losses, same gradients, weights as they are now."""

import torch

from model.config import SigmaModelConfig
from model.opaque import compile_model
from model.sigma_llm import SigmaLLM
from tests.trainable import patched

VOCABULARY = 40
STEPS, MICRO_BATCHES = 3, 2


def small_model():
    config = SigmaModelConfig(
        **{"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2},
        **{"mamba_ratio": 1, "attention_ratio": 1, "kv_latent_dim": 16, "rope_dim": 8},
        **{"mamba_head_dim": 16, "mamba_d_state": 8, "mamba_chunk_len": 8, "mimo_rank": 2},
        **{"d_ff": 48, "n_routed_experts": 4, "router_jitter_noise": 0.0},
    )
    return patched(SigmaLLM(config, seed=0))


def train(model, call):
    """Losses of all micro-batches, and the gradients of the last step."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with model.weights_held():
            for _ in range(MICRO_BATCHES):
                ids = torch.randint(VOCABULARY, (2, 12), generator=generator)
                loss = call(ids, labels=ids.roll(-1, 1)).loss
                loss.backward()
                losses.append(loss.item())
        optimizer.step()
        model.after_optimizer_step()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


def test_training_compiled_is_training_eagerly():
    eager, compiled = small_model(), small_model()
    call = compile_model(compiled, backend="aot_eager", mode="default", dynamic=True)
    losses, gradients = train(eager, eager)
    torch._dynamo.reset()
    compiled_losses, compiled_gradients = train(compiled, call)
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-5, atol=1e-5)
    assert len(set(losses)) == len(losses)
    for name, gradient in gradients.items():
        error = (compiled_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-3, f"{name}: {error}"
