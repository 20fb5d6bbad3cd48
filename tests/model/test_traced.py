"""The memory in traced graphs, at sizes around those of its chunks, and the rule by which it stops looking back."""

import itertools

import pytest
import torch
from torch.export import Dim

from lmu_hf.model.legendre import delay_system
from lmu_hf.model.memory import linear_memory
from lmu_hf.model.traced import _settled

# float64: rounding of 4,000 steps; the matrix powers by which doubling goes are as exact as the memory itself.
TOLERANCE = 1e-12


class Memory(torch.nn.Module):
    """:func:`linear_memory` as a module, with constant answers to what does not concern the sequence."""

    def __init__(self, system, every):
        super().__init__()
        self.system, self.every = system, every

    def forward(self, u, memory=None, lengths=None):
        states, final = linear_memory(u, self.system, memory, lengths, return_sequence=self.every)
        return (final,) if states is None else (states, final)


def arguments(batch, steps, dims, order, initial, ragged):
    memory = torch.randn(batch, dims, order, dtype=torch.float64) if initial else None
    lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
    return torch.randn(batch, steps, dims, dtype=torch.float64), memory, lengths


def check(traced, system, every, given):
    for found, expected in zip(
        traced(*given), linear_memory(*given[:1], system, *given[1:], algorithm="naive")[1 - every :], strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("every", [True, False], ids=["states", "final"])
@pytest.mark.parametrize(
    ("theta", "initial", "ragged"), [(4.0, False, False), (4.0, True, True), ((4.0, 900.0), True, False)], ids=str
)
def test_one_graph_for_every_length(theta, every, initial, ragged):
    system = delay_system(5, theta)
    example = arguments(3, 9, 2, 5, initial, ragged)
    batch, time = Dim("batch"), Dim("time")
    shapes = ({0: batch, 1: time}, {0: batch} if initial else None, {0: batch} if ragged else None)
    program = torch.export.export(Memory(system, every), example, dynamic_shapes=shapes)
    for steps in (2, 31, 32, 33, 257, 1023, 1025, 4000):  # 257 is where theta 4 has settled
        check(program.module(), system, every, arguments(2, steps, 2, 5, initial, ragged))


@pytest.mark.parametrize("every", [True, False], ids=["states", "final"])
def test_known_lengths(every):
    """Where the length is known, the graph holds what it needs and no more."""
    system, sizes = delay_system(5, (4.0, 900.0)), []
    for steps in (1, 2, 17, 33, 1500):
        given = arguments(2, steps, 2, 5, initial=True, ragged=False)
        program = torch.export.export(Memory(system, every), given)
        sizes.append(len(program.graph.nodes))
        check(program.module(), system, every, given)
    assert sizes == sorted(sizes)
    assert sizes[-1] < 100


@pytest.mark.parametrize("every", [True, False], ids=["states", "final"])
def test_compiled_once_for_many_lengths(every):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    system = delay_system(5, 20.0)
    compiled = torch.compile(Memory(system, every), fullgraph=True, backend="eager")
    for steps in (40, *range(50, 1000, 93), 2000):
        given = arguments(2, steps, 2, 5, initial=True, ragged=False)
        check(compiled, system, every, given)
    # The first length is taken for the only one, the second for one of many, the third finds the operators of the memory made.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("every", [True, False], ids=["states", "final"])
def test_gradients(every):
    torch._dynamo.reset()
    system = delay_system(5, (4.0, 30.0))
    u, memory, lengths = arguments(3, 70, 2, 5, initial=True, ragged=True)
    torch._dynamo.mark_dynamic(u, 1)
    given = (u.requires_grad_(), memory.requires_grad_())
    compiled = torch.compile(Memory(system, every), fullgraph=True, backend="eager")
    weights = [torch.randn_like(part) for part in compiled(*given, lengths)]

    def gradients(outputs):
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(outputs, weights, strict=True)), given)

    naive = linear_memory(u, system, memory, lengths, algorithm="naive")[1 - every :]
    torch.testing.assert_close(gradients(compiled(*given, lengths)), gradients(naive), rtol=0, atol=1e-11)


def test_nothing_is_left_where_it_stops_looking_back():
    for order, theta in itertools.product((1, 2, 3, 5, 8, 33, 128, 256), (0.3, 1.0, 7.0, 500.0)):
        system = delay_system(order, theta)
        assert torch.linalg.matrix_power(system.Ad, int(_settled(system))).abs().max() < 1e-27
    # Euler forgets as slowly as its theta lets it, so nothing is taken for forgotten.
    assert _settled(delay_system(2, 2.0, "euler")) == 2**39
