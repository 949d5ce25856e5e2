"""Captured micro-batches against ordinary ones: everything a step computes, to the last bit.

Without a GPU the graphs are emulated (graph_emulator.py): same StepGraph, same model, replays that
run recorded operations only. The gpu test at the end makes the same comparison on the real ones.
"""

import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import model.attention
import training.step_graph
from model.moe import MoE
from model.sigma_llm import SigmaLLM
from model.weight_cache import TernaryCache, active_cache
from tests.tiny_model import VOCAB, tiny_config
from tests.trainable import patched
from tests.training.graph_emulator import CaptureError, EmulatedGraphs
from training.micro_pass import EagerPass
from training.runtime.memory_guard import is_out_of_memory
from training.step_graph import WARM_UP_RUNS, CudaGraphs, StepGraph
from training.stream.batch import Batch

DENSE = {"n_routed_experts": 0, "moe_top_k": 1}
TERNARY = {**DENSE, "quant_mode": "bitnet_1_58"}
SMALL = {**TERNARY, "n_layers": 2, "mamba_ratio": 1, "engram_enabled": False}
STEPS = WARM_UP_RUNS + 3


@pytest.fixture(autouse=True)
def masks_are_not_read(monkeypatch):
    """As on a device: on a CPU the host may look at masks to find that they are trivial."""
    monkeypatch.setattr(model.attention, "may_read", lambda values: False)


def batches(*, rows=2, length=20, seed=0):
    """Tokens, labels and document starts, all different every time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shape = (rows, length)
        yield Batch(
            input_ids=torch.randint(VOCAB, shape, generator=generator),
            labels=torch.randint(-1, VOCAB, shape, generator=generator).abs(),
            reset_mask=torch.rand(shape, generator=generator) < 0.1,
            source_ids=torch.zeros(shape, dtype=torch.int16),
            num_bytes=1,
        )


class Bench:
    """A model in training; `log` is every loss, hidden value and gradient on the way."""

    def __init__(
        self, *, graphed, device="cpu", graphs=None, in_kernels=False, autocast=nullcontext,
        scaled=False, **settings,
    ):  # fmt: skip
        self.model = patched(SigmaLLM(tiny_config(**settings), seed=3)).to(device)
        for module in self.model.modules():
            if in_kernels and isinstance(module, MoE):
                module.settings = replace(module.settings, backend="triton")
        scaling = {"init_scale": 8.0, "growth_interval": 2, "enabled": scaled}
        self.scaler = torch.amp.GradScaler(device, **scaling)
        self.passes = EagerPass(model=self.model, autocast=autocast, scaler=self.scaler)
        if graphed:
            graphs = EmulatedGraphs() if graphs is None else graphs
            self.passes = StepGraph(self.passes, model=self.model, graphs=graphs)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.log, self.device = [], device
        self.random = torch.Generator().manual_seed(5).get_state()

    def step(self, source, *, parts=1, before=lambda model: None):
        torch.set_rng_state(self.random)
        with self.model.weights_held():
            before(self.model)
            for micro in range(parts):
                self.micro_batch(next(source), micro=micro, parts=parts)
        self.log += [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.model.after_optimizer_step()
        self.random = torch.get_rng_state()

    def micro_batch(self, batch, *, micro, parts):
        names = ("input_ids", "labels", "reset_mask")
        moved = {name: getattr(batch, name).to(self.device) for name in names}
        output = self.passes.forward(replace(batch, **moved), micro=micro, parts=parts)
        losses = {"lm": output.loss, **output.aux}
        self.passes.backward(lambda: torch.stack(list(losses.values())).sum(), parts=parts)
        self.log += [value.detach().clone() for value in (output.hidden, *losses.values())]

    def end(self):
        """The log with what the run left: weights, buffers, kept figures."""
        tensors = [*self.log, *self.model.parameters(), *self.model.buffers()]
        return [tensor.detach().cpu() for tensor in tensors]

    def metrics(self):
        """Without the counter of reuses, which replays cannot reach."""
        return {k: v for k, v in self.model.metrics().items() if k != "bitlinear_cache_hits"}


def assert_same(first, second):
    ours, theirs = first.end(), second.end()
    assert len(ours) == len(theirs)
    assert [i for i, (a, b) in enumerate(zip(ours, theirs)) if not torch.equal(a, b)] == []
    assert first.metrics() == second.metrics()


def run_both(*, steps=STEPS, parts=1, source=batches, **settings):
    runs = [Bench(graphed=graphed, **settings) for graphed in (False, True)]
    for bench in runs:
        data = source()
        for _ in range(steps):
            bench.step(data, parts=parts)
    return runs


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [TERNARY, {**DENSE, "dropout": 0.1}, {**TERNARY, "residual_layout": "standard"}],
    ids=["ternary", "dropout", "one stream"],
)
def test_replayed_steps_equal_ordinary_ones(settings, parts):
    eager, graphed = run_both(parts=parts, **settings)
    assert_same(eager, graphed)
    found = graphed.passes.metrics()
    warm = -(-WARM_UP_RUNS // parts) * parts
    assert found == {"cuda_graph_captures": parts, "cuda_graph_replays": STEPS * parts - warm}


def test_a_scale_of_the_loss_that_grows_is_read_at_every_replay():
    eager, graphed = run_both(scaled=True, **SMALL)
    assert_same(eager, graphed)
    assert graphed.scaler.get_scale() == eager.scaler.get_scale() == 8.0 * 2 ** (STEPS // 2)


def test_experts_by_kernels_with_noise_and_balance(monkeypatch):
    """Interpreted kernels: the one path of experts that never asks for their loads."""
    monkeypatch.setattr(training.step_graph, "WARM_UP_RUNS", 1)
    one_block = {
        "d_model": 16, "n_layers": 1, "mamba_ratio": 0, "d_ff": 16, "n_routed_experts": 3,
        "n_shared_experts": 0, "moe_top_k": 1, "engram_enabled": False, "router_jitter_noise": 0.1,
        "quant_mode": "bitnet_1_58", "moe_dispatch_mode": "grouped", "in_kernels": True,
    }  # fmt: skip
    eager, graphed = run_both(
        steps=2, parts=2, source=lambda: batches(rows=1, length=7), **one_block
    )
    assert_same(eager, graphed)
    assert graphed.passes.metrics()["cuda_graph_replays"] == 2
    assert graphed.model.state_dict()["blocks.0.ffn.balance_bias"].any()


def test_codes_that_a_capture_found_ready_would_stay_as_they_were(monkeypatch):
    """A forward in the same step has left codes; a capture that used them shows it at once."""

    def look(model):
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.int64))

    def losses(*, graphed):
        bench, data = Bench(graphed=graphed, **SMALL), batches()
        for _ in range(STEPS):
            bench.step(data, before=look)
        return bench

    eager, graphed = losses(graphed=False), losses(graphed=True)
    assert_same(eager, graphed)
    monkeypatch.setattr(
        training.step_graph, "TernaryCache", lambda: active_cache() or TernaryCache()
    )
    with pytest.raises(AssertionError):
        assert_same(eager, losses(graphed=True))


@pytest.mark.parametrize("change", ["rows", "length", "parts"])
def test_another_shape_is_captured_anew(change):
    """As after a halved micro-batch or a phase of the curriculum, and back again."""
    runs = [Bench(graphed=graphed, **SMALL) for graphed in (False, True)]
    for bench in runs:
        for kind in (0, 1, 0):
            shape = {"rows": (2, 1)[kind]} if change == "rows" else {}
            shape |= {"length": (20, 10)[kind]} if change == "length" else {}
            data = batches(**shape, seed=kind)
            for _ in range(WARM_UP_RUNS + 2):
                bench.step(data, parts=(1, 2)[kind] if change == "parts" else 1)
    assert_same(*runs)
    captures = runs[1].passes.metrics()["cuda_graph_captures"]
    assert captures == (4 if change == "parts" else 3)


@pytest.mark.parametrize("change", ["dropout", "moved weight", "rounding"])
def test_another_path_through_the_model_is_captured_anew(change):
    def alter(network):
        if change == "dropout":
            network.blocks[0].dropout = 0.3
        elif change == "moved weight":
            with torch.no_grad():
                weight = network.blocks[0].mixer_norm.weight
                weight.data = weight.data * 1.5
        else:
            network.blocks[0].mixer.out_proj.quantize_activations = False

    runs = [Bench(graphed=graphed, **SMALL) for graphed in (False, True)]
    for bench in runs:
        data = batches()
        for step in range(2 * STEPS):
            if step == STEPS:
                alter(bench.model)
            bench.step(data)
    assert_same(*runs)
    assert runs[1].passes.metrics()["cuda_graph_captures"] == 2


def plant(bench, act):
    """Let the first block's mixer do `act` with its input."""
    mixer = bench.model.blocks[0].mixer
    scan_inputs = mixer.scan_inputs

    def spoiled(x):
        act(x)
        return scan_inputs(x)

    mixer.scan_inputs = spoiled


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: x.sum().tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x.cpu().numpy() if not x.requires_grad else x.detach().numpy(),
    ],
    ids=["item", "tolist", "bool", "mask", "nonzero", "upload", "numpy"],
)
def test_what_asks_the_host_is_refused_by_the_modules_name(act):
    bench, data = Bench(graphed=True, **SMALL), batches()
    plant(bench, act)
    for _ in range(WARM_UP_RUNS):
        bench.step(data)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mixer \(Mamba\) cannot be captured") as e:
        bench.step(data)
    assert isinstance(e.value.__cause__, CaptureError)
    assert "--cuda-graphs off" in str(e.value) and "\n" not in str(e.value)


def test_experts_whose_loads_are_read_are_refused():
    settings = {**SMALL, "n_routed_experts": 4, "moe_dispatch_mode": "packed"}
    bench, data = Bench(graphed=True, **settings), batches()
    for _ in range(WARM_UP_RUNS):
        bench.step(data)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.ffn \(MoE\) cannot be captured"):
        bench.step(data)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_no_memory_for_a_capture_is_reported_as_such_and_leaves_nothing(place):
    runs = [Bench(graphed=graphed, **SMALL) for graphed in (False, True)]
    for bench in runs:
        data = batches()
        for _ in range(WARM_UP_RUNS):
            bench.step(data)
        if bench is runs[1]:
            with pytest.raises(torch.OutOfMemoryError) as failure:
                fail_to_capture(bench, place)
            assert is_out_of_memory(failure.value)
        data = batches(rows=1, seed=1)
        for _ in range(STEPS):
            bench.step(data, parts=2)
    assert_same(*runs)


def fail_to_capture(bench, place):
    """A step that finds no memory in one of its passes and is given up."""
    passes = bench.passes
    run = getattr(EagerPass, place)

    def short(self, *args, **kwargs):
        run(self, *args, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory")

    length = len(bench.log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerPass, place, short)
        try:
            bench.micro_batch(next(batches(seed=9)), micro=0, parts=1)
        finally:
            del bench.log[length:]
            bench.optimizer.zero_grad()
            bench.model.discard_step()
            assert passes._first is None and passes._inputs == {}


def test_outputs_have_no_history_and_figures_are_those_of_the_last_micro_batch():
    eager, graphed = run_both(parts=2, **SMALL)
    output = graphed.passes.forward(next(batches()), micro=0, parts=2)
    assert not output.loss.requires_grad and not output.hidden.requires_grad
    assert eager.metrics()["diff_attn_lambda_mean"] == graphed.metrics()["diff_attn_lambda_mean"]


def test_figures_are_those_of_the_replay_after_another_forward_has_left_its_own():
    """As the updates of reinforcement learning do between two steps."""
    eager, graphed = run_both(**DENSE)
    for bench in (eager, graphed):
        other = next(batches(seed=9))
        with torch.no_grad():
            bench.model(other.input_ids, reset_mask=other.reset_mask)
    others = eager.metrics()
    for bench in (eager, graphed):
        bench.step(batches(seed=8))
    assert_same(eager, graphed)
    assert graphed.metrics()["eng_gate_mean"] != others["eng_gate_mean"]


GPU_SIZES = {
    "d_model": 256, "n_layers": 4, "n_heads": 4, "mamba_ratio": 3, "d_ff": 512,
    "mamba_head_dim": 64, "mamba_d_state": 64, "kv_latent_dim": 64, "rope_dim": 32,
    "quant_mode": "bitnet_1_58", "dropout": 0.1,
}  # fmt: skip


def timed_run(graphed, parts, settings):
    """A run on the device, and the milliseconds of a step in it once it is warm."""
    torch.manual_seed(5)
    graphs = CudaGraphs(torch.device("cuda")) if graphed else None
    bench = Bench(graphed=graphed, graphs=graphs, device="cuda", **GPU_SIZES, **settings)
    if "n_routed_experts" not in settings:
        bench.model.use_kernels("triton")
    data = batches(rows=4, length=512)
    for _ in range(STEPS):
        bench.step(data, parts=parts)
    found = bench.end()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        bench.step(data, parts=parts)
    torch.cuda.synchronize()
    return found, (time.perf_counter() - start) * 50.0


@pytest.mark.gpu
@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("settings", [DENSE, {}], ids=["dense by torch", "experts by kernels"])
def test_on_a_device(settings, parts, in_bf16):
    """To the bit wherever two ordinary runs agree to the bit, else as close as they are."""
    if in_bf16:
        settings = {**settings, "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16)}
    once, eager_ms = timed_run(False, parts, settings)
    again, _ = timed_run(False, parts, settings)
    graphed, graph_ms = timed_run(True, parts, settings)
    print(f"ordinary {eager_ms:.2f} ms a step, by graphs {graph_ms:.2f}: {eager_ms / graph_ms:.2f}")
    assert len(once) == len(graphed)
    for first, second, found in zip(once, again, graphed, strict=True):
        noise = (first.double() - second.double()).norm()
        assert (first.double() - found.double()).norm() <= 3.0 * noise
