"""What captured steps are compared with must itself behave as a graph does."""

import torch

from tests.training.graph_emulator import EmulatedGraphs


def capture(work):
    graphs = EmulatedGraphs()
    with graphs.capture() as graph:
        result = work()
    return graph, result


def test_a_capture_does_no_work():
    total, random = torch.ones(3), torch.get_rng_state()

    def work():
        total.add_(1.0)
        return total * torch.rand(3)

    graph, result = capture(work)
    assert torch.equal(total, torch.ones(3)) and result.isnan().all()
    assert torch.equal(torch.get_rng_state(), random)
    expected = torch.rand(3) * 2
    torch.set_rng_state(random)
    graph.replay()
    assert torch.equal(total, torch.full((3,), 2.0)) and torch.equal(result, expected)


def test_a_replay_reads_memory_and_not_what_python_says():
    source, factor = torch.ones(2), [2.0]
    graph, result = capture(lambda: source * factor[0])
    factor[0] = 5.0
    source.fill_(3.0)
    graph.replay()
    assert result.tolist() == [6.0, 6.0]


def test_memory_that_nobody_holds_is_given_to_the_next_capture():
    graphs, source = EmulatedGraphs(), torch.ones(2)
    with graphs.capture() as first:
        kept, lost = source + 1.0, source + 2.0
    del lost
    with graphs.capture() as second:
        source.add_(3.0)
    first.replay()
    (memory,) = second.overwrites
    assert kept.tolist() == [2.0, 2.0] and memory.tolist() == [3.0, 3.0]
    second.replay()
    assert kept.tolist() == [2.0, 2.0] and memory.isnan().all()


def test_gradients_are_added_where_they_were():
    weight = torch.ones(2, requires_grad=True)
    data = torch.tensor([1.0, 2.0])
    weight.grad = torch.zeros(2)
    graph, _ = capture(lambda: (weight * data).square().sum().backward())
    assert weight.grad.tolist() == [0.0, 0.0]
    graph.replay()
    data.copy_(torch.tensor([3.0, 0.0]))
    graph.replay()
    assert weight.grad.tolist() == [2.0 + 18.0, 8.0]
