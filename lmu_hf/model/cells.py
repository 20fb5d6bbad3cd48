"""Hidden cells: what an LMU does with its memory at every step.

A hidden cell is any ``torch.nn.Module`` that follows this protocol:

- ``input_size`` (int): number of features of ``z``, its input. The layer gives [m; x] or m, flattened.
- ``output_size`` (int): number of features of its output.
- ``state_sizes`` (tuple of int): sizes of its state tensors. The first one is what ``hidden_to_memory`` feeds back, so a
  cell without recurrence keeps its output there. Empty if it keeps nothing.
- ``forward(z, state) -> (output, new_state)``: one step; ``z`` (batch, input_size), ``state`` a tuple of (batch, size).
- ``recurrent`` (bool, optional, default True): False if the output does not depend on ``state``. The layer then computes
  all steps at once by calling ``forward`` with leading dimensions (batch, time), and only the last one when that is all
  that is wanted.
- ``reset_parameters()`` (optional): initialises its weights.

Shapes: ``z`` (..., input_size), output (..., output_size).

``cell_registry.register_hidden_cell`` makes such a class nameable from a configuration.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import Spec, check_initializer, initialize_, is_loaded

State = tuple[Tensor, ...]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    # clip(0.2 x + 0.5, 0, 1), what Keras 2 and Theano have under that name; torch and Keras 3: clip(x / 6 + 0.5, 0, 1).
    "hard_sigmoid_keras2": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "softsign": F.softsign,
}


def check_activation(field: str, name: Any) -> str:
    """Returns the name of a known activation, "linear" for None; raises ValueError otherwise."""
    if name is None:
        return "linear"
    if name not in ACTIVATIONS:
        raise ValueError(f"{field}: expected one of {sorted(ACTIVATIONS)}, found {name!r}")
    return name


class _BuiltinCell(nn.Module):
    """Weights, initialisation and sizes that the built-in recurrent cells and the dense cell share.

    Args:
        input_size: features of ``z``.
        hidden_size: number of units.
        activation: name of the output activation; None for the default of the cell.
        use_bias: add a bias.
        kernel_initializer: of ``weight_ih``; may be given per block "memory", "input" of ``z``.
        recurrent_initializer: of ``weight_hh``.
        bias_initializer: of the bias.
        blocks: name -> size of the parts of ``z``; one block "memory" when None.
    """

    gates = 1
    recurrent = True
    default_activation = "tanh"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        activation: str | None = None,
        use_bias: bool = True,
        kernel_initializer: Spec = "glorot_uniform",
        recurrent_initializer: Spec = "orthogonal",
        bias_initializer: Spec = "zeros",
        blocks: Mapping[str, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size: expected a whole number >= 1, found {hidden_size!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.activation = check_activation("hidden_act", activation or self.default_activation)
        self.blocks = dict(blocks) if blocks is not None else {"memory": input_size}
        self.kernel_initializer, self.recurrent_initializer = kernel_initializer, recurrent_initializer
        self.bias_initializer = bias_initializer
        check_initializer("hidden_cell.kernel_initializer", kernel_initializer, tuple(self.blocks))
        check_initializer("hidden_cell.recurrent_initializer", recurrent_initializer)
        check_initializer("hidden_cell.bias_initializer", bias_initializer)
        rows = self.gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        if self.recurrent:
            self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self._build_bias(rows, use_bias, device, dtype)
        self.reset_parameters()

    def _build_bias(self, rows: int, use_bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if use_bias else None

    def reset_parameters(self) -> None:
        initialize_("hidden_cell.kernel_initializer", self.weight_ih, self.kernel_initializer, self.blocks)
        if self.recurrent:
            initialize_("hidden_cell.recurrent_initializer", self.weight_hh, self.recurrent_initializer)
        if self.bias is not None:
            initialize_("hidden_cell.bias_initializer", self.bias, self.bias_initializer)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, activation={self.activation!r}, bias={self.bias is not None}"


class RNNCell(_BuiltinCell):
    """h' = f(W_ih z + W_hh h + b), the plain cell of the 2019 paper. One bias, as there are no two to tell apart."""

    def forward(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        h = ACTIVATIONS[self.activation](F.linear(z, self.weight_ih, self.bias) + F.linear(state[0], self.weight_hh))
        return h, (h,)


class LSTMCell(_BuiltinCell):
    """Long short-term memory, gates in torch's order i, f, g, o, state (h, c); the forget bias starts at one."""

    gates = 4

    def __init__(self, *args: Any, recurrent_activation: str = "sigmoid", **kwargs: Any):
        self.recurrent_activation = check_activation("hidden_cell.recurrent_activation", recurrent_activation)
        super().__init__(*args, **kwargs)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size, self.hidden_size)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None and self.bias_initializer == "zeros" and not is_loaded(self.bias):
            with torch.no_grad():
                self.bias[self.hidden_size : 2 * self.hidden_size] = 1.0

    def forward(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        f, s = ACTIVATIONS[self.activation], ACTIVATIONS[self.recurrent_activation]
        gates = F.linear(z, self.weight_ih, self.bias) + F.linear(h, self.weight_hh)
        i, forget, g, o = gates.chunk(4, dim=-1)
        c = s(forget) * c + s(i) * f(g)
        h = s(o) * f(c)
        return h, (h, c)


class GRUCell(_BuiltinCell):
    """Gated recurrent unit, gates in torch's order r, z, n.

    The reset gate acts after the recurrent product, as in torch: n = f(x_n + r (W_n h + b_n)); with ``reset_after=False`` before
    it, as in the paper of Cho et al. (2014): n = f(x_n + W_n (r h)), and there is one bias.
    """

    gates = 3

    def __init__(self, *args: Any, recurrent_activation: str = "sigmoid", reset_after: bool = True, **kwargs: Any):
        self.recurrent_activation = check_activation("hidden_cell.recurrent_activation", recurrent_activation)
        if not isinstance(reset_after, bool):
            raise ValueError(f"hidden_cell.reset_after: expected True or False, found {reset_after!r}")
        self.reset_after = reset_after
        super().__init__(*args, **kwargs)

    def _build_bias(self, rows: int, use_bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        # Two biases: the one inside the reset product cannot be merged with the other.
        super()._build_bias(rows, use_bias, device, dtype)
        two = use_bias and self.reset_after
        self.bias_hh = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if two else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias_hh is not None:
            initialize_("hidden_cell.bias_initializer", self.bias_hh, self.bias_initializer)

    def forward(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        f, s = ACTIVATIONS[self.activation], ACTIVATIONS[self.recurrent_activation]
        input_r, input_z, input_n = F.linear(z, self.weight_ih, self.bias).chunk(3, dim=-1)
        if self.reset_after:
            hidden_r, hidden_z, hidden_n = F.linear(h, self.weight_hh, self.bias_hh).chunk(3, dim=-1)
            reset, update = s(input_r + hidden_r), s(input_z + hidden_z)
            candidate = f(input_n + reset * hidden_n)
        else:
            hidden_r, hidden_z = F.linear(h, self.weight_hh[: 2 * self.hidden_size]).chunk(2, dim=-1)
            reset, update = s(input_r + hidden_r), s(input_z + hidden_z)
            candidate = f(input_n + F.linear(reset * h, self.weight_hh[2 * self.hidden_size :]))
        h = candidate + update * (h - candidate)
        return h, (h,)


class DenseCell(_BuiltinCell):
    """y = f(W z + b). No recurrence; the output is kept as a state for ``hidden_to_memory``."""

    recurrent = False
    default_activation = "linear"

    def forward(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        y = ACTIVATIONS[self.activation](F.linear(z, self.weight_ih, self.bias))
        return y, (y,)


class ReadoutCell(nn.Module):
    """One learned decoder per memory dimension: y_d = sum_n C[d, n] m[d, n] + s_d x_d.

    With memory_d = channels and no kernel, the layer is a causal depthwise filter on the Legendre basis.

    Args:
        memory_d: memory dimensions D.
        order: Legendre polynomials N.
        skip: add s_d x_d; ``z`` then ends with the D features of x.
        activation: name of the output activation.
        kernel_initializer: of C; "lecun_uniform" keeps the variance of the memory.
        skip_initializer: of s.
    """

    recurrent = False

    def __init__(
        self,
        memory_d: int,
        order: int,
        skip: bool = True,
        activation: str | None = None,
        kernel_initializer: Spec = "lecun_uniform",
        skip_initializer: Spec = "ones",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.memory_d, self.order = memory_d, order
        self.activation = check_activation("hidden_act", activation)
        self.kernel_initializer, self.skip_initializer = kernel_initializer, skip_initializer
        check_initializer("hidden_cell.kernel_initializer", kernel_initializer)
        check_initializer("hidden_cell.skip_initializer", skip_initializer)
        self.decoder = nn.Parameter(torch.empty(memory_d, order, device=device, dtype=dtype))
        self.skip = nn.Parameter(torch.empty(memory_d, device=device, dtype=dtype)) if skip else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialize_("hidden_cell.kernel_initializer", self.decoder, self.kernel_initializer)
        if self.skip is not None:
            initialize_("hidden_cell.skip_initializer", self.skip, self.skip_initializer)

    @property
    def input_size(self) -> int:
        return self.memory_d * self.order + (self.memory_d if self.skip is not None else 0)

    @property
    def output_size(self) -> int:
        return self.memory_d

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.memory_d,)

    def forward(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        memory = z[..., : self.memory_d * self.order].unflatten(-1, (self.memory_d, self.order))
        y = (memory * self.decoder).sum(-1)
        if self.skip is not None:
            y = y + self.skip * z[..., self.memory_d * self.order :]
        y = ACTIVATIONS[self.activation](y)
        return y, (y,)

    def extra_repr(self) -> str:
        return f"memory_d={self.memory_d}, order={self.order}, skip={self.skip is not None}"


class TorchCell(nn.Module):
    """A torch cell or ``nn.Linear`` behind the protocol of hidden cells; its weights keep torch's names.

    Args:
        module: an instance of nn.RNNCell, nn.LSTMCell, nn.GRUCell or nn.Linear.
    """

    def __init__(self, module: nn.RNNCellBase | nn.Linear):
        super().__init__()
        self.module = module
        self.recurrent = not isinstance(module, nn.Linear)

    @property
    def input_size(self) -> int:
        return self.module.in_features if isinstance(self.module, nn.Linear) else self.module.input_size

    @property
    def output_size(self) -> int:
        return self.module.out_features if isinstance(self.module, nn.Linear) else self.module.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return (self.output_size,) * (2 if isinstance(self.module, nn.LSTMCell) else 1)

    def reset_parameters(self) -> None:
        self.module.reset_parameters()

    def forward(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        if isinstance(self.module, nn.Linear):
            y = self.module(z)
            return y, (y,)
        if isinstance(self.module, nn.LSTMCell):
            h, c = self.module(z, state)
            return h, (h, c)
        h = self.module(z, state[0])
        return h, (h,)


class StackedCell(nn.Module):
    """Cells one after the other, each fed the output of the one before; the states are joined in order.

    Args:
        cells: hidden cells, outermost last.
    """

    def __init__(self, cells: Sequence[nn.Module]):
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.recurrent = any(is_recurrent(cell) for cell in cells)

    @property
    def input_size(self) -> int:
        return self.cells[0].input_size  # type: ignore[return-value]

    @property
    def output_size(self) -> int:
        return self.cells[-1].output_size  # type: ignore[return-value]

    @property
    def state_sizes(self) -> tuple[int, ...]:
        return tuple(size for cell in self.cells for size in cell.state_sizes)  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        for cell in self.cells:
            reset_hidden_cell(cell)

    def forward(self, z: Tensor, state: State) -> tuple[Tensor, State]:
        new_state: list[Tensor] = []
        position = 0
        for cell in self.cells:
            count = len(cell.state_sizes)  # type: ignore[arg-type]
            z, part = cell(z, state[position : position + count])
            new_state.extend(part)
            position += count
        return z, tuple(new_state)


def is_recurrent(cell: nn.Module) -> bool:
    """Whether the output of a cell depends on its state."""
    return bool(getattr(cell, "recurrent", True))


def reset_hidden_cell(cell: nn.Module) -> None:
    """Initialises the weights of a hidden cell that says how."""
    reset = getattr(cell, "reset_parameters", None)
    if callable(reset):
        reset()
