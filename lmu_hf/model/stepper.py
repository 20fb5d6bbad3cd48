"""One layer, one time step after the other, as fast as it goes: for control loops and audio, where every sample is awaited.

What :class:`LMUCell` looks up, joins and checks in every step is done once here. A step is then a few thin products,

    u = [x, h, m] E        m' = m A^T + u B^T        gates = [m', x, h] K

and the hidden cell's pointwise part: a handful of calls in Python, where the first and the last are one product, or a single call
where the operators of :mod:`lmu_hf.native` are there, which read a long A in its HODLR form. Nothing is differentiable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .by_system import side_by_side
from .cells import ACTIVATIONS
from .compiled import available, panels
from .folding import encoder_matrix
from .gates import GATES, SIMPLE, UNBOUNDED, GateWeights, Pointwise, gate_weights
from .hodlr import dense, hodlr
from .precision import full_float32
from .state import LMUState, forget_
from .weights import a_weight

if TYPE_CHECKING:
    from .legendre import DelaySystem
    from .lmu_cell import LMUCell

# Multiply-adds that take as long as the calls that a product for all dimensions at once spares.
_CALLS = 60_000


class LMUStepper:
    """Streams of samples through one layer, with the weights as they are when this is made.

    Equals ``LMUCell`` to rounding, in evaluation mode and without gradients. Build one with ``layer.stepper()``.

    Args:
        cell: the cell.
        batch_size: number of streams.

    Attributes:
        loop: "compiled" or "python", or "step by step" for a hidden cell that has no form as affine gates.

    Raises:
        ValueError: ``batch_size`` is no whole number >= 1.
    """

    def __init__(self, cell: LMUCell, batch_size: int = 1):
        self.cell, self.batch_size = cell, check_streams(batch_size)
        like = a_weight(cell)
        # No tensor is one of inference mode, which only inference mode could update, and none is rounded.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            weights, system = gate_weights(cell.hidden_cell), cell.system()
            self._like = like.new_empty(batch_size, cell.input_size).detach()
            self._shape, self._dtype = self._like.shape, self._like.dtype
            self._state = tuple(tensor.contiguous() for tensor in cell.initial_state(self._like).tensors())
            kind = "none" if cell.hidden_cell is None else None if weights is None else weights.kind
            if kind is not None and like.dtype in (torch.float32, torch.float64):
                # Clones: a trained weight must not reach some of them and not others.
                prepared = (
                    None if part is None else part.detach().clone() for part in _prepare(cell, weights, system, like)
                )
                if available(self._like) and cell.encoder_act in SIMPLE:
                    self.loop, self._run = "compiled", self._compiled(kind, system, *prepared)
                else:
                    self.loop, self._run = "python", self._python(kind, *prepared)
            else:
                self.loop = "step by step"
                self._run = self._step_by_step(cell, system)

    def __call__(self, x: Tensor) -> Tensor:
        """Feeds one sample per stream, (batch_size, input_size), and returns the outputs (batch_size, output_size).

        Raises:
            ValueError: the shape or dtype of ``x`` is not that of the layer.
        """
        try:
            return self._run(x)
        except RuntimeError:
            self._check(x)  # in words; looking at x in every step would take a twentieth of it
            raise

    def _check(self, x: Tensor) -> None:
        if x.shape != self._shape or x.dtype != self._dtype:
            expected = f"{tuple(self._shape)} of {self._dtype}"
            raise ValueError(f"x: expected one sample per stream, {expected}, found {tuple(x.shape)} of {x.dtype}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a stepper cannot be copied or pickled; make one with layer.stepper() and assign its state")

    @property
    def state(self) -> LMUState:
        """The state after the newest sample, a copy; assign one to go on from it."""
        return LMUState.of(tuple(tensor.clone() for tensor in self._state))

    @state.setter
    def state(self, state: Any) -> None:
        with torch.inference_mode():
            tensors = self.cell.check_state(state, self._like).tensors()
            for own, given in zip(self._state, tensors, strict=True):
                own.copy_(given)

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Starts all streams anew, or the given ones (an index or boolean tensor or list)."""
        with torch.inference_mode():
            forget_(self._state, range(self.batch_size) if rows is None else rows)

    def _step_by_step(self, cell: LMUCell, system: DelaySystem) -> Callable[[Tensor], Tensor]:
        @torch.inference_mode()
        def run(x: Tensor) -> Tensor:
            self._check(x)
            training = cell.training
            cell.eval()
            try:
                output, state = cell.step(x, LMUState.of(self._state), system, cell.sample_dropout(x))
            finally:
                cell.train(training)
            self._state = state.tensors()
            return output

        return run

    def _compiled(self, kind: str, system: DelaySystem, *prepared: Any) -> Callable[[Tensor], Tensor]:
        encoder, u_bias, A, B, weight, bias = prepared
        if weight is None:
            weight = encoder.new_empty(0, 0)
        elif bias is None:
            bias = weight.new_zeros(weight.shape[1])
        cell = self.cell
        form = hodlr(system.Ad.detach().mT, A.dtype) or dense(A.mT)
        advancing = (panels(form.inward), panels(form.outward), form.ranks, panels(B[:, None]))
        matrices = (u_bias, *advancing, panels(weight), bias)
        encoder = (encoder.mT.contiguous(), cell.hidden_to_memory, cell.memory_to_memory, cell.encoder_act)
        sizes = (cell.input_size, cell.output_size)
        stream = torch.classes.lmu_hf.Stream(kind, list(self._state), *encoder, *matrices, *sizes)
        # The dispatcher takes about as long as the step.
        return _function_of(stream) or stream.step

    def _python(self, kind: str, *prepared: Any) -> Callable[[Tensor], Tensor]:
        """Calls into torch cost more than their arithmetic here, so what a product reads lies side by side."""
        cell, like = self.cell, self._like
        weight = prepared[4]
        size, width = (0, 0) if weight is None else (cell.state_sizes[0], weight.shape[1])
        rows = [_Row.allocate(like, width, cell.memory_d, cell.order, size) for _ in range(2)]
        flat = cell.memory_d * cell.order
        # An infinite hidden state, which only unbounded cells have, must not meet the zeros of a product that makes u.
        meets = cell.hidden_to_memory or kind not in UNBOUNDED
        if meets and cell.encoder_act == "linear" and flat * (flat - cell.order) <= _CALLS:
            advance = self._two_products(*prepared)
        else:
            rows[1] = rows[0]
            advance = self._part_by_part(rows[0], *prepared)
        further = self._state[2:]
        shape = (-1, cell.memory_d, cell.order)
        states = [(row.memory.view(shape), *((row.hidden,) if size else ()), *further) for row in rows]
        self._state = states[0]
        pointwise, device = Pointwise(kind), like.device.type

        def run(x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return run(x)
            self._check(x)
            now, after = rows
            now.sample.copy_(x.detach() if x.requires_grad else x)
            with full_float32(like):
                advance(now, after)
            # What came after is now, from here on.
            rows.reverse()
            states.reverse()
            self._state = states[0]
            if not size:
                return torch.cat([after.memory, now.sample], dim=1) if cell.input_to_hidden else after.memory.clone()
            if kind in SIMPLE:
                GATES[kind].activation(now.gates, after.hidden)
                return after.hidden.clone()
            before = (now.hidden, *further)
            kept = pointwise.allocate(before, 1)
            pointwise.gates(before, kept).step(0, now.gates)
            for own, new in zip((after.hidden, *further), kept, strict=False):
                own.copy_(new[:, 0])
            return kept[0][:, 0]

        return run

    def _two_products(
        self, encoder: Tensor, u_bias: Tensor | None, A: Tensor, B: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Callable[[_Row, _Row], Any]:
        """[m, x, 1, h] -> the gates of the memory to come, and u; then [u, m] -> m', for the second row."""
        cell, like = self.cell, self._like
        dims, flat = cell.memory_d, cell.memory_d * cell.order
        of_u, read = self._to_u(encoder, u_bias)
        matrix = like.new_zeros(flat + cell.input_size + 1 + (0 if weight is None else cell.state_sizes[0]), dims)
        matrix[read] = of_u
        ahead, to_memory = side_by_side(A, B, dims)
        if weight is not None:
            # m' K, of all that m' is made of
            of_memory, direct = self._to_gates(weight, bias).tensor_split([flat])
            gates = matrix @ (to_memory @ of_memory) + torch.cat([ahead @ of_memory, direct])
            matrix = torch.cat([gates, matrix], dim=1)
        to_sums, to_next = _product(like, matrix), _product(like, torch.cat([to_memory, ahead]))

        def advance(now: _Row, after: _Row) -> None:
            to_sums(now.known_, now.sums_)
            to_next(now.driven_, after.memory_)

        return advance

    def _part_by_part(
        self,
        row: _Row,
        encoder: Tensor,
        u_bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Callable[[_Row, _Row], Any]:
        """u, m' and the gates one after the other, always in the same row."""
        cell, A, B, memory = self.cell, A.mT, B[:, None], row.memory
        dims, order = cell.memory_d, cell.order
        of_u, read = self._to_u(encoder, u_bias)
        of_row, activate = row.known_[..., read], ACTIVATIONS[cell.encoder_act]
        to_u = _product(self._like, of_u)
        to_gates = None if weight is None else _product(self._like, self._to_gates(weight, bias))

        def advance(*_: _Row) -> None:
            to_u(of_row, row.u_)
            u = activate(row.u)
            if len(A) == 1:
                memory.copy_(torch.addmm(u.reshape(-1, 1) * B[0], memory.reshape(-1, order), A[0]).view_as(memory))
            else:
                by_dimension = memory.view(-1, dims, order).transpose(0, 1)
                memory.copy_(torch.baddbmm(u.mT[..., None] * B, by_dimension, A).transpose(0, 1).flatten(1))
            if to_gates is not None:
                to_gates(row.known_, row.gates_)

        return advance

    def _to_u(self, encoder: Tensor, bias: Tensor | None) -> tuple[Tensor, slice]:
        """E for the part of [m, x, 1, h] that it reads, and which part that is."""
        cell = self.cell
        of_input, of_hidden, of_memory = encoder.tensor_split([cell.input_size, cell.encoder_size])
        end = cell.memory_d * cell.order + cell.input_size + 1 + len(of_hidden)
        matrix = torch.cat([of_memory, of_input, _bias_row(bias, encoder), of_hidden])
        return matrix, slice(end - len(matrix), end)

    def _to_gates(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """K for [m, x, 1, h]."""
        before, of_hidden = weight.tensor_split([len(weight) - self.cell.state_sizes[0]])
        return torch.cat([before, _bias_row(bias, weight), of_hidden])


class _Row(NamedTuple):
    """What the Python loop reads and writes in a step, parts of one tensor [gates, u, m, x, 1, h]
    (B, G + D + D * N + inputs + 1 + H). The one is for biases: beside a product they would take a call of their own.

    Those with an underscore are for :func:`_product`: without the dimension B where that is 1.
    """

    gates: Tensor
    u: Tensor
    memory: Tensor
    sample: Tensor
    hidden: Tensor
    gates_: Tensor
    u_: Tensor
    memory_: Tensor
    sums_: Tensor  # [gates, u]
    driven_: Tensor  # [u, m]
    known_: Tensor  # [m, x, 1, h]

    @classmethod
    def allocate(cls, like: Tensor, width: int, dims: int, order: int, size: int) -> _Row:
        flat, inputs = dims * order, like.shape[1]
        row = like.new_zeros(len(like), width + dims + flat + inputs + 1 + size)
        gates, u, memory, sample, one, hidden = row.split([width, dims, flat, inputs, 1, size], dim=1)
        one.fill_(1)
        sums, known = row.tensor_split([width + dims], dim=1)
        parts = gates, u, memory, sums, row[:, width : width + dims + flat], known
        return cls(gates, u, memory, sample, hidden, *(parts if len(like) > 1 else (part[0] for part in parts)))


def _bias_row(bias: Tensor | None, like: Tensor) -> Tensor:
    """A bias (W,) as the row of a matrix (K, W) that is multiplied by one."""
    return like.new_zeros(1, like.shape[1]) if bias is None else bias[None]


def _product(like: Tensor, matrix: Tensor) -> Callable[[Tensor, Tensor], Any]:
    """A function of x (B, K) and out (B, W), or (K,) and (W,) for one stream, that writes x @ matrix to out."""
    if len(like) > 1:
        return lambda x, out: torch.mm(x, matrix, out=out)
    # A matrix times a vector is read faster than a row times a matrix, and faster along its rows; its sums are rounded less, too.
    columns = matrix.mT.contiguous()
    return lambda x, out: torch.mv(columns, x, out=out)


def _function_of(stream: Any) -> Callable[[Tensor], Tensor] | None:
    """The step of a compiled stream as a function of Python's own; None if Python's headers were not there for the compiler."""
    if not (address := stream.function()):
        return None
    function = ctypes.cast(address, ctypes.py_object).value
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(function))  # the reference that came with the address
    return function


def check_streams(batch_size: int) -> int:
    """Returns ``batch_size`` if it is a whole number >= 1; raises ValueError otherwise."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of streams >= 1, found {batch_size!r}")
    return batch_size


def _prepare(cell: LMUCell, weights: GateWeights | None, system: DelaySystem, like: Tensor) -> tuple[Tensor | None, ...]:
    """E (I [+ H] [+ D * N], D) and its bias, A (S, N, N), B (S, N), K (D * N + I + H, G) and its bias."""
    dims, order, inputs = cell.memory_d, cell.order, cell.input_size
    encoder = encoder_matrix(cell, like)
    if cell.recurrent_kernel is not None:
        encoder = torch.cat([encoder, cell.recurrent_kernel])
    matrices = system.matrices(like.dtype, like.device)
    if weights is None:
        return encoder, cell.bias, *matrices, None, None
    of_memory, of_input = weights.input_weight.tensor_split([dims * order])
    width = of_memory.shape[1]
    rows = [of_memory, of_input if cell.input_to_hidden else of_memory.new_zeros(inputs, width)]
    hidden = weights.hidden_weight
    rows.append(of_memory.new_zeros(cell.state_sizes[0], width) if hidden is None else hidden)
    return encoder, cell.bias, *matrices, torch.cat(rows), weights.bias
