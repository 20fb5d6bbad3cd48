"""Hidden cells as an affine map to gates followed by pointwise arithmetic, each with its own derivative.

Every built-in cell, and torch's own, computes ``gates = z @ input_weight + h @ hidden_weight + bias`` and then something
elementwise. Seen that way the products of many steps can be merged and the backward pass written without an autograd graph
per step; :mod:`lookahead` does both. A step is described by a :class:`Gates` object per kind of cell.

Shapes: B batch, T time, H hidden size, G gate width (a multiple of H).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cells import DenseCell, GRUCell, LSTMCell, RNNCell, TorchCell
from .compiled import available, empty


class GateWeights(NamedTuple):
    """The affine map of a hidden cell.

    Attributes:
        kind: name of the pointwise step, a key of ``GATES``.
        input_weight: (features of z, G).
        hidden_weight: (H, G); None for a cell without recurrence.
        bias: (G,) or None.
    """

    kind: str
    input_weight: Tensor
    hidden_weight: Tensor | None
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "GateWeights":
        """The same in another dtype."""
        tensors = (self.input_weight, self.hidden_weight, self.bias)
        return GateWeights(self.kind, *(None if tensor is None else tensor.to(dtype) for tensor in tensors))  # type: ignore


def gate_weights(cell: nn.Module | None) -> GateWeights | None:
    """The gate form of a hidden cell, differentiable in its weights; None if the cell has none."""
    # Exact types throughout: a subclass may compute something else.
    if type(cell) in (RNNCell, DenseCell):
        assert isinstance(cell, RNNCell | DenseCell)
        if cell.activation not in GATES:
            return None
        hidden = cell.weight_hh.mT if isinstance(cell, RNNCell) else None
        return GateWeights(cell.activation, cell.weight_ih.mT, hidden, cell.bias)
    if type(cell) in (LSTMCell, GRUCell):
        assert isinstance(cell, LSTMCell | GRUCell)
        if (cell.activation, cell.recurrent_activation) != ("tanh", "sigmoid"):
            return None
        if isinstance(cell, LSTMCell):
            return GateWeights("lstm", cell.weight_ih.mT, cell.weight_hh.mT, cell.bias)
        if not cell.reset_after:
            return None  # its candidate's product needs the reset gate first
        return _gru_weights(cell.weight_ih, cell.weight_hh, cell.bias, cell.bias_hh)
    if isinstance(cell, TorchCell):
        return _torch_weights(cell.module)
    return None


def _torch_weights(module: nn.Module) -> GateWeights | None:
    weights = dict(module.named_parameters())
    if type(module) is nn.Linear:
        return GateWeights("linear", weights["weight"].mT, None, weights.get("bias"))
    if type(module) is nn.GRUCell:
        return _gru_weights(weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh"))
    if type(module) in (nn.RNNCell, nn.LSTMCell):
        bias = weights["bias_ih"] + weights["bias_hh"] if "bias_ih" in weights else None
        kind = module.nonlinearity if isinstance(module, nn.RNNCell) else "lstm"
        return GateWeights(kind, weights["weight_ih"].mT, weights["weight_hh"].mT, bias)
    return None


def _gru_weights(weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> GateWeights:
    # The candidate's two halves meet only behind the reset gate, so they are two gates of their own: r, z, x_n, h_n.
    # Joined as the parameters lie, and then transposed: their gradients need not be.
    hidden_of, hidden_n = weight_hh.tensor_split([-weight_hh.shape[1]])
    input_weight = torch.cat([weight_ih, weight_ih.new_zeros(len(hidden_n), weight_ih.shape[1])]).mT
    hidden_weight = torch.cat([hidden_of, torch.zeros_like(hidden_n), hidden_n]).mT
    bias = None
    if bias_ih is not None and bias_hh is not None:
        size = hidden_n.shape[0]
        bias = torch.cat([bias_ih[: 2 * size] + bias_hh[: 2 * size], bias_ih[2 * size :], bias_hh[2 * size :]])
    return GateWeights("gru", input_weight, hidden_weight, bias)


class Gates:
    """The pointwise step of a cell whose output is a function of one gate, f(gate), with f' known from f.

    Args:
        states: hidden state tensors before the first step, each (B, H); the first is the output.
        kept: what :meth:`Pointwise.allocate` made and the steps have filled.

    Attributes:
        keeps: what a step keeps beside its output, in multiples of H; first one for each further state.
    """

    keeps: tuple[int, ...] = ()

    def __init__(self, states: tuple[Tensor, ...], kept: tuple[Tensor, ...]):
        self.states = states
        self.hidden = kept[0]

    def step(self, t: int, gates: Tensor) -> Tensor:
        """Computes and keeps the output (B, H) of step ``t`` from its gates (B, G)."""
        output = self.hidden[:, t]
        self.activation(gates, output)
        return output

    def back(self, t: int, grad: Tensor, grad_gates: Tensor) -> Tensor | None:
        """Writes the gradient of the gates of step ``t``; steps must come last to first.

        Args:
            t: the step.
            grad: gradient of its output (B, H); may be overwritten.
            grad_gates: where the gradient of its gates (B, G) goes.

        Returns:
            The gradient that reaches the output before it without passing its gates, or None.
        """
        self.derivative(grad, self.hidden[:, t], grad_gates)
        return None

    def initial_gradients(self, carry: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``states``, given that of the first through the gates; after the last :meth:`back`."""
        return (carry,)

    def load_gradients(self, grads: Sequence[Tensor], last: Sequence[Tensor]) -> None:
        """Receives the gradients of all states but the output, whose own come step by step through ``back``: of their sequences,
        and of what these end with."""

    @staticmethod
    def activation(gates: Tensor, out: Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def derivative(grad: Tensor, output: Tensor, out: Tensor) -> None:
        raise NotImplementedError


class _Tanh(Gates):
    @staticmethod
    def activation(gates: Tensor, out: Tensor) -> None:
        torch.tanh(gates, out=out)

    @staticmethod
    def derivative(grad: Tensor, output: Tensor, out: Tensor) -> None:
        torch.ops.aten.tanh_backward.grad_input(grad, output, grad_input=out)


class _Sigmoid(Gates):
    @staticmethod
    def activation(gates: Tensor, out: Tensor) -> None:
        torch.sigmoid(gates, out=out)

    @staticmethod
    def derivative(grad: Tensor, output: Tensor, out: Tensor) -> None:
        torch.ops.aten.sigmoid_backward.grad_input(grad, output, grad_input=out)


class _Relu(Gates):
    @staticmethod
    def activation(gates: Tensor, out: Tensor) -> None:
        torch.clamp_min(gates, 0, out=out)

    @staticmethod
    def derivative(grad: Tensor, output: Tensor, out: Tensor) -> None:
        torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=out)


class _Linear(Gates):
    @staticmethod
    def activation(gates: Tensor, out: Tensor) -> None:
        out.copy_(gates)

    @staticmethod
    def derivative(grad: Tensor, output: Tensor, out: Tensor) -> None:
        out.copy_(grad)


class _LSTM(Gates):
    """c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c'); gates i, f, g, o."""

    keeps = (1, 4)  # c, and the gates

    def __init__(self, states: tuple[Tensor, ...], kept: tuple[Tensor, ...]):
        super().__init__(states, kept)
        self.size = states[0].shape[1]
        self.cell, self.gates = kept[1:]
        self.grad_cell: Tensor | None = None
        self.grad_cells: Tensor | None = None

    def step(self, t: int, gates: Tensor) -> Tensor:
        size, kept = self.size, self.gates[:, t]
        torch.sigmoid(gates, out=kept)
        torch.tanh(gates[:, 2 * size : 3 * size], out=kept[:, 2 * size : 3 * size])
        i, f, g, o = kept.split(size, dim=1)
        cell, output = self.cell[:, t], self.hidden[:, t]
        torch.mul(f, self.states[1] if t == 0 else self.cell[:, t - 1], out=cell)
        cell.addcmul_(i, g)
        torch.tanh(cell, out=output)
        return output.mul_(o)

    def load_gradients(self, grads: Sequence[Tensor], last: Sequence[Tensor]) -> None:
        self.grad_cells, self.grad_cell = grads[0], last[0]

    def back(self, t: int, grad: Tensor, grad_gates: Tensor) -> Tensor | None:
        assert self.grad_cell is not None
        assert self.grad_cells is not None
        size = self.size
        i, f, g, o = self.gates[:, t].split(size, dim=1)
        grad_i, grad_f, grad_g, grad_o = grad_gates.split(size, dim=1)
        squashed = torch.tanh(self.cell[:, t])
        grad_cell = self.grad_cells[:, t] + self.grad_cell
        grad_cell += torch.ops.aten.tanh_backward(grad * o, squashed)
        torch.mul(grad, squashed, out=grad_o)
        torch.mul(grad_cell, g, out=grad_i)
        torch.mul(grad_cell, self.states[1] if t == 0 else self.cell[:, t - 1], out=grad_f)
        torch.ops.aten.tanh_backward.grad_input(grad_cell * i, g, grad_input=grad_g)
        for value, gradient in ((i, grad_i), (f, grad_f), (o, grad_o)):
            torch.ops.aten.sigmoid_backward.grad_input(gradient, value, grad_input=gradient)
        self.grad_cell = grad_cell.mul_(f)
        return None

    def initial_gradients(self, carry: Tensor) -> tuple[Tensor, ...]:
        assert self.grad_cell is not None
        return carry, self.grad_cell


class _GRU(Gates):
    """n = tanh(x_n + s(r) h_n), h' = n + s(z) (h - n); gates r, z, x_n, h_n."""

    keeps = (4,)  # r, z, n and h_n

    def __init__(self, states: tuple[Tensor, ...], kept: tuple[Tensor, ...]):
        super().__init__(states, kept)
        self.size = states[0].shape[1]
        self.gates = kept[1]

    def _previous(self, t: int) -> Tensor:
        return self.states[0] if t == 0 else self.hidden[:, t - 1]

    def step(self, t: int, gates: Tensor) -> Tensor:
        size, kept = self.size, self.gates[:, t]
        torch.sigmoid(gates[:, : 2 * size], out=kept[:, : 2 * size])
        kept[:, 3 * size :].copy_(gates[:, 3 * size :])
        r, z, n, h_n = kept.split(size, dim=1)
        torch.addcmul(gates[:, 2 * size : 3 * size], r, h_n, out=n)
        n.tanh_()
        output = self.hidden[:, t]
        return torch.lerp(n, self._previous(t), z, out=output)

    def back(self, t: int, grad: Tensor, grad_gates: Tensor) -> Tensor | None:
        r, z, n, h_n = self.gates[:, t].split(self.size, dim=1)
        grad_r, grad_z, grad_x, grad_h = grad_gates.split(self.size, dim=1)
        torch.mul(grad, self._previous(t) - n, out=grad_z)
        torch.ops.aten.sigmoid_backward.grad_input(grad_z, z, grad_input=grad_z)
        direct = grad * z
        torch.ops.aten.tanh_backward.grad_input(grad - direct, n, grad_input=grad_x)
        torch.mul(grad_x, h_n, out=grad_r)
        torch.ops.aten.sigmoid_backward.grad_input(grad_r, r, grad_input=grad_r)
        torch.mul(grad_x, r, out=grad_h)
        return direct


GATES: dict[str, type[Gates]] = {
    "tanh": _Tanh,
    "sigmoid": _Sigmoid,
    "relu": _Relu,
    "linear": _Linear,
    "lstm": _LSTM,
    "gru": _GRU,
}


# Functions of one gate.
SIMPLE = ("tanh", "sigmoid", "relu", "linear")

# Those whose values have no bound. A cell of these can become infinite.
UNBOUNDED = ("relu", "linear")


class _MemoryAndGates(Gates):
    """The step of a cell whose first state is [m, h]: the first ``linear`` sums are the memory m itself, the others its gates."""

    def __init__(self, kind: str, linear: int, states: tuple[Tensor, ...], kept: tuple[Tensor, ...]):
        super().__init__(states, kept)
        self.linear = linear
        self.gates = GATES[kind]((states[0][:, linear:], *states[1:]), (kept[0][..., linear:], *kept[1:]))

    def step(self, t: int, gates: Tensor) -> Tensor:
        output = self.hidden[:, t]
        output[:, : self.linear] = gates[:, : self.linear]
        self.gates.step(t, gates[:, self.linear :])
        return output

    def back(self, t: int, grad: Tensor, grad_gates: Tensor) -> Tensor | None:
        grad_gates[:, : self.linear] = grad[:, : self.linear]
        direct = self.gates.back(t, grad[:, self.linear :], grad_gates[:, self.linear :])
        return None if direct is None else F.pad(direct, (self.linear, 0))

    def initial_gradients(self, carry: Tensor) -> tuple[Tensor, ...]:
        return (carry, *self.gates.initial_gradients(carry[:, self.linear :])[1:])

    def load_gradients(self, grads: Sequence[Tensor], last: Sequence[Tensor]) -> None:
        self.gates.load_gradients(grads, last)


class Pointwise(NamedTuple):
    """What a step makes of its sums: the pointwise part of a cell, behind numbers that pass as they are.

    Attributes:
        kind: a key of ``GATES``.
        linear: how many of the sums, and of the first state, come first and are memory, which no cell squashes: that state is
            [m, h].
    """

    kind: str
    linear: int = 0

    def allocate(self, states: tuple[Tensor, ...], steps: int, *, backward: bool = True) -> tuple[Tensor, ...]:
        """Room for what a run of ``steps`` steps keeps: first one (B, T, features) per state. Not initialised.

        What further ones hold, only ``backward`` asks for. Without it all steps of the compiled loops share the room of one.
        """
        first = states[0]
        batch, size = first.shape
        further = [multiple * (size - self.linear) for multiple in GATES[self.kind].keeps]
        whole = len(states) if not backward and available(first) else 1 + len(further)
        return tuple(
            empty(first, batch, steps, features)
            if index < whole
            else first.new_empty(batch, 1, features).expand(-1, steps, -1)
            for index, features in enumerate((size, *further))
        )

    def gates(self, states: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Gates:
        """The steps of a run from ``states`` on; ``kept`` is what :meth:`allocate` made."""
        if self.linear:
            return _MemoryAndGates(self.kind, self.linear, states, kept)
        return GATES[self.kind](states, kept)
