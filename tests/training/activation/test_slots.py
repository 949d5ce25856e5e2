"""Which saved tensors are coded, how, and that each is counted and stored once."""

from random import Random

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from training.activation.budget import SlotCost, allocate, measure_sensitivity
from training.activation.meter import SavedMeter
from training.activation.slots import BlockTensors, CodingRules, SlotBook, Tally


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Scene:
    """A book of slots and hooks around one pretended block."""

    def __init__(self, **rules):
        self.book = SlotBook(CodingRules(**rules))
        self.tally = Tally()
        self.weight = nn.Parameter(draw(64, 128, seed=9))
        self.random = Random(0)

    def tensors(self):
        return BlockTensors(
            self.book,
            layer=0,
            is_shared=lambda t: t.untyped_storage().data_ptr() == self.weight.data_ptr(),
            weight_forms=lambda t: iter(
                [self.weight.detach().to(t.dtype)] * (t.shape == (64, 128))
            ),
            stream_elements=64 * 128,
            num_experts=7,
            random=self.random,
            tally=self.tally,
        )

    def keep(self, *values):
        """What backward would get for the values."""
        tensors = self.tensors()
        packed = [tensors._pack(value) for value in values]
        tensors.finish()
        return [tensors._unpack(item) for item in packed]

    def codings(self):
        return [slot.coding for slot in self.book.slots.values()]


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def test_eight_bits_below_the_threshold_four_above():
    x = draw(100, 128)
    scene = Scene(error_threshold=0.01)
    assert 0 < error(scene.keep(x)[0], x) < 0.01 and scene.codings() == ["int8"]
    scene = Scene(error_threshold=0.2, rank=0)
    assert 0.05 < error(scene.keep(x)[0], x) < 0.2 and scene.codings() == ["int4"]


def test_low_rank_where_four_bits_alone_are_too_coarse():
    basis = torch.linalg.qr(draw(128, 8)).Q
    x = draw(400, 8, seed=1) @ basis.T + 0.02 * draw(400, 128, seed=2)
    scene = Scene(error_threshold=0.03, rank=8)
    assert error(scene.keep(x)[0], x) < 0.03 and scene.codings() == ["low_rank"]
    stored = scene.tally.stored
    without = Scene(error_threshold=0.03, rank=0)
    without.keep(x)
    assert without.codings() == ["int8"] and stored < without.tally.stored


def test_a_restored_basis_goes_on_where_the_tensors_are(monkeypatch):
    """A checkpoint brings it to host memory; meta stands for the device of the tensors."""
    given = []

    def code(values, *, basis, **_):
        given.append((values.device.type, basis.device.type))

    monkeypatch.setattr("training.activation.slots.encode_low_rank", code)
    scene = Scene(error_threshold=1.0, rank=8)
    slot = {"coding": "low_rank", "basis": torch.linalg.qr(draw(128, 8)).Q}
    scene.book.load_state_dict({"0.0": slot})
    values = torch.empty(400 * 128, device="meta")
    scene.tensors()._code(scene.book.get(0, 0), values, 128)
    assert given == [("meta", "meta")]


def test_one_number_a_row_stays_exact():
    rows, norms = draw(100, 128), draw(5000, 1)
    scene = Scene(error_threshold=1.0, rank=0)
    kept = scene.keep(rows, norms)
    assert scene.codings() == ["int4", "exact"] and torch.equal(kept[1], norms)


def test_eight_bits_stick_until_the_next_probe():
    scene = Scene(error_threshold=0.05, rank=0)
    easy, hard = torch.ones(100, 128), draw(100, 128)
    scene.keep(hard)
    for _ in range(31):
        scene.keep(easy * 0.5)
        assert scene.codings() == ["int8"]
    scene.keep(easy * 0.5)
    assert scene.codings() == ["int4"]
    scene.keep(hard)  # four bits are watched all the time
    assert scene.codings() == ["int8"]


def test_what_is_never_rounded():
    scene = Scene()
    small, integers = draw(100), torch.arange(9000).view(90, 100)
    codes = torch.randint(-127, 128, (80, 128), generator=torch.Generator()).float()
    mask = torch.zeros(80, 128).masked_fill(codes > 0, float("-inf"))
    copy = scene.weight.detach().clone()  # a form of the weight in memory of its own
    routing = draw(2000, 7)
    given = [small, integers, codes, mask, copy, routing, scene.weight]
    for found, value in zip(scene.keep(*given), given, strict=True):
        assert torch.equal(found, value)
    assert scene.codings() == ["exact", "exact", "integers", "exact", "weight", "exact"]
    counted = sum(t.nbytes for t in (small, integers, codes, mask, routing))
    assert scene.tally.original == counted
    assert scene.tally.stored == counted - codes.nbytes + codes.numel()


def test_views_and_duplicates_are_stored_and_counted_once():
    scene = Scene()
    x = draw(100, 128)
    found = scene.keep(x, x, x.view(50, 256), x.T, x[:, :64])
    assert torch.equal(found[0], found[1])
    assert scene.tally.original == x.nbytes
    for value, wanted in zip(found, (x, x, x.view(50, 256), x.T, x[:, :64]), strict=True):
        assert value.shape == wanted.shape and error(value, wanted) < 0.01
    assert found[3].stride() == x.T.stride()
    once = Scene()
    once.keep(x, x)
    assert once.tally.stored == x.numel() * 8.5 / 8


def test_an_expanded_tensor_costs_its_storage():
    scene = Scene()
    x = draw(50, 1, 128)
    (found,) = scene.keep(x.expand(-1, 10, -1))
    assert found.shape == (50, 10, 128) and torch.equal(found[:, 0], found[:, 9])
    assert scene.tally.stored == x.numel() * 8.5 / 8 and scene.tally.original == x.nbytes


def test_memory_that_is_reused_is_another_tensor():
    scene, tensors = Scene(), None
    tensors = scene.tensors()
    packed = []
    for seed in range(20):  # the allocator gives the same address again
        packed.append(tensors._pack(draw(100, 128, seed=seed)))
    for seed, item in enumerate(packed):
        assert error(tensors._unpack(item), draw(100, 128, seed=seed)) < 0.01
    assert scene.tally.original == 20 * 100 * 128 * 4


def test_a_part_of_a_large_tensor_does_not_keep_the_whole():
    scene = Scene()
    whole = draw(100, 4096)
    (kept,) = scene.keep(whole[:, :3])
    assert kept.untyped_storage().nbytes() == 100 * 3 * 4
    assert torch.equal(kept, whole[:, :3])


def test_the_state_of_slots_survives_saving():
    scene = Scene(error_threshold=0.2, rank=0)
    scene.keep(draw(100, 128))
    other = Scene(error_threshold=0.2, rank=0)
    other.book.load_state_dict(scene.book.state_dict())
    assert other.book.state_dict() == scene.book.state_dict()


def test_the_meter_counts_what_autograd_keeps():
    weight = nn.Parameter(draw(128, 128))
    x = draw(100, 128).requires_grad_()
    shared = {weight.untyped_storage().data_ptr()}
    with SavedMeter(lambda t: t.untyped_storage().data_ptr() in shared) as meter:
        y = (x @ weight).exp()  # keeps x and y; the weight is not counted
        z = y * y
    assert meter.num_bytes == x.nbytes + y.nbytes
    z.sum().backward()


@pytest.mark.parametrize("kind", ["meter", "slots"])
def test_a_graph_that_no_backward_visits_is_freed(kind):
    """exp keeps its own result: held as it is, it would hold the node that holds it."""
    x = draw(40, 50).requires_grad_()
    tensors = Scene().tensors()
    with SavedMeter(lambda t: False) if kind == "meter" else tensors.hooks():
        y = x.exp()
    tensors.finish()
    storage = StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()


def costs(*sensitivities, elements=8192):
    return [
        SlotCost(name=str(i), elements=elements, element_size=4, sensitivity=s)
        for i, s in enumerate(sensitivities)
    ]


def test_the_budget_buys_bits_where_gradients_need_them():
    found = allocate(costs(1e-6, 1e-1, 1e-4), budget_bytes=8192 * (3 * 5.0 + 3.5) / 8)
    assert found == {"0": "int4", "1": "int8", "2": "int4"}
    assert set(allocate(costs(1, 2, 3), budget_bytes=1e9).values()) == {"exact"}
    spent = sum(c.num_bytes(found[c.name]) for c in costs(1e-6, 1e-1, 1e-4))
    assert spent <= 8192 * (3 * 5.0 + 3.5) / 8


def test_a_budget_below_four_bits_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"--instant-byte-budget-mb.*0\.0 MiB"):
        allocate(costs(1.0), budget_bytes=100)


def test_sensitivity_is_measured_per_tensor():
    """The factor of a large gradient matters; a tensor whose gradient is tiny does not."""
    a = draw(100, 64).requires_grad_()
    b = (1e-3 * draw(100, 64, seed=1)).requires_grad_()
    large, small = draw(100, 64, seed=2), 1e-4 * draw(100, 64, seed=3)

    found = measure_sensitivity(
        lambda: [a * large + b * small],
        inputs=[a, b],
        may_round=lambda position, tensor: not tensor.requires_grad,
        random=Random(0),
    )
    by_size = {float(t.abs().max()) > 0.1: s for t, s in found.values() if not torch.equal(t, a)
               and not torch.equal(t, b)}  # fmt: skip
    assert 0.003 < by_size[True] < 0.05  # the square of int4's relative error
    assert by_size[False] < 1e-8
