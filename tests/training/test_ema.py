"""The weight average against its closed form."""

import torch

from training.context import StepContext
from training.ema import WeightAverage
from training.features.ema import EmaFeature
from training.fork import copy_state


def test_equals_the_weighted_sum():
    layer = torch.nn.Linear(3, 2)
    average = WeightAverage(decay=0.9)
    history = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
        history.append(layer.weight.detach().clone())
        average.update(layer)
    expected = history[0] * 0.9**4 + sum(0.1 * 0.9 ** (4 - i) * history[i] for i in range(1, 5))
    torch.testing.assert_close(average.shadow["weight"], expected)


def test_reports_movement_only_when_it_moves():
    layer = torch.nn.Linear(2, 2)
    assert WeightAverage(decay=0.5).update(layer) is False
    frozen = WeightAverage(decay=1.0)
    frozen.update(layer)
    assert frozen.update(layer) is False


def test_distance_is_relative_and_zero_at_the_start():
    layer = torch.nn.Linear(4, 4)
    average = WeightAverage(decay=0.9)
    average.update(layer)
    assert average.distance(layer) == 0
    with torch.no_grad():
        for param in layer.parameters():
            param.mul_(2.0)
    torch.testing.assert_close(average.distance(layer), torch.tensor(0.5))


def test_a_restored_average_goes_on_where_the_weights_are():
    """Checkpoints and forks give tensors of host memory back; meta stands for another device."""
    layer = torch.nn.Linear(4, 4, device="meta")
    first = EmaFeature(WeightAverage(decay=0.9))
    first.average.update(torch.nn.Linear(4, 4))
    again = EmaFeature(WeightAverage(decay=0.9))
    again.load_state_dict(copy_state(first.state_dict()))
    ctx = StepContext(step=2, total_steps=3, model=layer, optimizer=None)
    assert again.after_step(ctx) is True
    assert {value.device.type for value in again.average.shadow.values()} == {"meta"}
    assert again.average.distance(layer).device.type == "meta"
