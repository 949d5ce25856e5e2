"""The peer must be a sound GPT, or beating it means nothing."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import polar
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import baseline_gpt
from scripts.baseline_gpt import (
    Muon,
    Run,
    build_optimizers,
    build_parser,
    orthogonalize,
    rate_factor,
)
from scripts.plain_gpt import PlainGPT, PlainGPTConfig, document_mask
from training.data import TokenCorpus, TokenSplit, TokenStream

END, VOCAB = 0, 24
CONFIG = PlainGPTConfig(vocab_size=VOCAB, d_model=32, layers=2, heads=2, d_ff=48)
FLAGS = (
    "--d-model 32 --layers 2 --heads 2 --seq-len 16 --batch-size 8 --warmup-steps 5 --seed 3"
).split()


def tokens_of(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, shape, generator=generator)


def counting_corpus() -> TokenCorpus:
    """Documents that count upwards from a random token: learnable in a few steps."""
    rng = np.random.default_rng(0)
    splits = {}
    for side, documents in (("train", 200), ("validation", 20)):
        pieces = []
        for _ in range(documents):
            run = (rng.integers(0, VOCAB - 1) + np.arange(rng.integers(5, 40))) % (VOCAB - 1)
            pieces.append(np.append(END, 1 + run))
        lengths = [len(piece) for piece in pieces]
        splits[side] = TokenSplit(
            tokens=np.concatenate(pieces).astype(np.uint16),
            starts=np.append(0, np.cumsum(lengths)).astype(np.int64),
            source_ids=np.zeros(documents, dtype=np.int16),
        )
    byte_lengths = np.full(VOCAB, 2, dtype=np.int32)
    byte_lengths[END] = 0
    return TokenCorpus(
        splits=splits,
        fingerprint="f",
        tokenizer_sha256="t",
        end_id=END,
        byte_lengths=byte_lengths,
    )


def test_equals_transformers_llama_with_the_same_weights():
    model = PlainGPT(CONFIG, seed=1)
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            rms_norm_eps=CONFIG.norm_eps,
            rope_theta=CONFIG.rope_theta,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )
    weights = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
    }
    for number, block in enumerate(model.blocks):
        layer = f"model.layers.{number}."
        q, k, v = block.attention.qkv.weight.chunk(3)
        gate, up = block.mlp.gate_up.weight.chunk(2)
        weights |= {
            layer + "self_attn.q_proj.weight": q,
            layer + "self_attn.k_proj.weight": k,
            layer + "self_attn.v_proj.weight": v,
            layer + "self_attn.o_proj.weight": block.attention.out.weight,
            layer + "mlp.gate_proj.weight": gate,
            layer + "mlp.up_proj.weight": up,
            layer + "mlp.down_proj.weight": block.mlp.down.weight,
            layer + "input_layernorm.weight": block.attention_norm.weight,
            layer + "post_attention_layernorm.weight": block.mlp_norm.weight,
        }
    weights["lm_head.weight"] = model.embed.weight
    peer.load_state_dict(weights)
    tokens = tokens_of(2, 3, 13)
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, peer(tokens).logits, atol=1e-5)


def test_the_future_does_not_reach_the_past():
    model = PlainGPT(CONFIG, seed=4)
    tokens = tokens_of(5, 2, 20)
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[:, 0] = True
    resets[1, 9] = True
    changed = tokens.clone()
    changed[:, 12:] = tokens_of(6, 2, 8)
    with torch.no_grad():
        one = model(tokens, reset_mask=resets).logits
        other = model(changed, reset_mask=resets).logits
    assert torch.equal(one[:, :12], other[:, :12])
    assert not torch.allclose(one[:, 12:], other[:, 12:])


def test_documents_in_a_row_do_not_see_each_other():
    model = PlainGPT(CONFIG, seed=7)
    tokens = tokens_of(8, 1, 20)
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[0, 11] = True
    changed = tokens.clone()
    changed[:, :11] = tokens_of(9, 1, 11)
    with torch.no_grad():
        one = model(tokens, reset_mask=resets).logits
        other = model(changed, reset_mask=resets).logits
        without = model(changed).logits
    assert torch.equal(one[:, 11:], other[:, 11:])
    assert not torch.allclose(one[:, 11:], without[:, 11:], atol=1e-4)


def test_document_mask_of_a_small_row():
    mask = document_mask(torch.tensor([[True, False, True]]))
    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert mask is not None and torch.equal(mask[0, 0], expected)


def test_loss_is_the_mean_over_counted_labels():
    model = PlainGPT(CONFIG, seed=10)
    tokens, labels = tokens_of(11, 2, 6), tokens_of(12, 2, 6)
    labels[0, 2:] = -100
    with torch.no_grad():
        logits, loss = model(tokens).logits, model(tokens, labels=labels).loss
    picked = logits.double().log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    assert float(loss) == pytest.approx(-float(picked[labels != -100].mean()), rel=1e-6)


def test_a_fresh_model_guesses_and_its_seed_decides_its_weights():
    tokens = tokens_of(13, 4, 16)
    loss = PlainGPT(CONFIG, seed=14)(tokens, labels=tokens_of(15, 4, 16)).loss
    assert float(loss.detach()) == pytest.approx(math.log(VOCAB), abs=0.1)
    same, other = PlainGPT(CONFIG, seed=14), PlainGPT(CONFIG, seed=15)
    reference = PlainGPT(CONFIG, seed=14)
    assert torch.equal(same.embed.weight, reference.embed.weight)
    assert not torch.equal(other.embed.weight, reference.embed.weight)


def test_parameter_count_by_hand():
    per_block = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert PlainGPT(CONFIG).num_parameters() == VOCAB * 32 + 2 * per_block + 32
    assert PlainGPTConfig(vocab_size=9, d_model=256).d_ff == 704


def test_newton_schulz_flattens_the_singular_values():
    generator = torch.Generator().manual_seed(16)
    for shape in ((24, 24), (64, 16), (16, 64)):
        matrix = torch.randn(*shape, generator=generator)
        result = orthogonalize(matrix) / math.sqrt(max(1.0, shape[0] / shape[1]))
        values = torch.linalg.svdvals(result)
        # Five quintic steps leave singular values between 0.7 and 1.2 (Jordan et al. 2024); the
        # smallest of a square Gaussian matrix may lag behind.
        assert float(values.max()) < 1.3 and float(values.median()) > 0.65
        exact = torch.from_numpy(polar(matrix.double().numpy())[0]).float()
        alignment = float((result * exact).sum() / (result.norm() * exact.norm()))
        assert alignment > 0.95


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_moves(optimizer):
    options = build_parser().parse_args([*FLAGS, "--steps", "1", "--optimizer", optimizer])
    model = PlainGPT(CONFIG, seed=17)
    optimizers = build_optimizers(model, options)
    grouped = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(tokens_of(18, 4, 16), labels=tokens_of(19, 4, 16)).loss.backward()
    for part in optimizers:
        part.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    if optimizer == "muon":
        (muon,) = [part for part in optimizers if isinstance(part, Muon)]
        assert sorted(group["parts"] for group in muon.param_groups) == [1, 2, 3]


def test_fused_projections_are_orthogonalised_part_by_part():
    parameter = torch.nn.Parameter(torch.zeros(24, 8))
    parameter.grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(20))
    Muon([{"params": [parameter], "parts": 3}], lr=1.0, weight_decay=0.0).step()
    for part, gradient in zip(parameter.chunk(3), parameter.grad.chunk(3), strict=True):
        assert torch.allclose(part, -orthogonalize(gradient), atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_to_count(optimizer):
    lr = {"adamw": "5e-3", "muon": "0.02"}[optimizer]
    options = build_parser().parse_args(
        [*FLAGS, "--steps", "60", "--optimizer", optimizer, "--lr", lr, "--eval-at", "0,1024"]
    )
    rows = list(Run(counting_corpus(), options=options, vocab_size=VOCAB).results())
    assert [row["train_tokens"] for row in rows] == [128, 1024, 60 * 128]
    assert [row["finished"] for row in rows] == [False, False, True]
    assert rows[0]["loss"] > 2.5  # barely better than log(24) = 3.18
    assert rows[-1]["loss"] < 1.2  # only where a document starts and ends must be guessed
    assert rows[-1]["bpb"] == pytest.approx(
        rows[-1]["loss"] * rows[-1]["eval_tokens"] / math.log(2) / rows[-1]["eval_bytes"]
    )


def test_runs_read_the_networks_batches_and_repeat_to_the_bit():
    options = build_parser().parse_args([*FLAGS, "--steps", "6"])
    corpus = counting_corpus()
    runs = [Run(corpus, options=options, vocab_size=VOCAB) for _ in range(2)]
    ends = [list(run.results())[-1] for run in runs]
    assert ends[0]["loss"] == ends[1]["loss"] and runs[0].losses == runs[1].losses
    stream = TokenStream(corpus, seed=3, batch_size=8, seq_len=16)
    for _ in range(6):
        stream.next_batch()
    assert runs[0].stream.state_dict() == stream.state_dict()


def test_schedules_start_at_one_and_end_at_the_ratio():
    for schedule in ("linear", "cosine"):
        values = [
            rate_factor(step / 100, schedule=schedule, final_ratio=0.1) for step in range(101)
        ]
        assert values[0] == 1.0 and values[-1] == pytest.approx(0.1)
        assert all(later <= earlier for earlier, later in pairwise(values))
    assert rate_factor(0.5, schedule="linear", final_ratio=0.0) == 1.0
    assert rate_factor(0.75, schedule="linear", final_ratio=0.0) == pytest.approx(0.5)


def test_time_ends_a_run_as_steps_do():
    options = build_parser().parse_args([*FLAGS, "--minutes", "1", "--steps", "1000"])
    run = Run(counting_corpus(), options=options, vocab_size=VOCAB)
    run.seconds = 45.0
    assert run.progress == 0.75
    run.step = 900
    assert run.progress == 0.9


def test_grid_names_the_best_rate(monkeypatch, tmp_path, capsys):
    class FakeTokenizer:
        vocab_size = VOCAB

    corpus = counting_corpus()
    monkeypatch.setattr(baseline_gpt, "load_corpus", lambda name: (FakeTokenizer(), corpus))
    output = tmp_path / "rows.jsonl"
    arguments = [*FLAGS, "--steps", "15", "--lr-grid", "1e-6,5e-3", "--output", str(output)]
    assert baseline_gpt.main(arguments) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["lr"] for row in rows] == [1e-6, 5e-3] and rows[1]["bpb"] < rows[0]["bpb"]
    assert "best learning rate 0.005" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys):
    assert baseline_gpt.main(FLAGS) == 2
    assert "--steps or --minutes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--heads"):
        PlainGPTConfig(vocab_size=9, d_model=30, heads=4)
