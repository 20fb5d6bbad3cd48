"""One layer, one time step after the other, as fast as it goes: for control loops and audio, where every sample is awaited.

What :class:`LMUCell` looks up, joins and checks in every step is done once here. A step is then three thin products,

    u = [x, h, m] E        m' = m A^T + u B^T        gates = [m', x, h] K

and the hidden cell's pointwise part: a handful of calls in Python, or a single one where the operators of :mod:`lmu_hf.native`
are there. Nothing is differentiable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cells import ACTIVATIONS
from .compiled import available, panels
from .folding import encoder_matrix
from .gates import GATES, SIMPLE, UNBOUNDED, GateWeights, Pointwise, gate_weights
from .precision import full_float32
from .state import LMUState, forget_
from .weights import a_weight

if TYPE_CHECKING:
    from .lmu_cell import LMUCell

# Multiply-adds that take as long as the calls that one product spares.
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
            weights = gate_weights(cell.hidden_cell)
            self._like = like.new_empty(batch_size, cell.input_size).detach()
            self._shape, self._dtype = self._like.shape, self._like.dtype
            self._state = tuple(tensor.contiguous() for tensor in cell.initial_state(self._like).tensors())
            kind = "none" if cell.hidden_cell is None else None if weights is None else weights.kind
            if kind is not None and like.dtype in (torch.float32, torch.float64):
                # Clones: a trained weight must not reach some of them and not others.
                prepared = (None if part is None else part.detach().clone() for part in _prepare(cell, weights, like))
                compiled = available(self._like) and cell.encoder_act in SIMPLE
                self.loop = "compiled" if compiled else "python"
                self._run = (self._compiled if compiled else self._python)(kind, *prepared)
            else:
                self.loop = "step by step"
                self._run = self._step_by_step(cell)

    def __call__(self, x: Tensor) -> Tensor:
        """Feeds one sample per stream, (batch_size, input_size), and returns the outputs (batch_size, output_size).

        Raises:
            ValueError: the shape or dtype of ``x`` is not that of the layer.
        """
        if x.shape != self._shape or x.dtype != self._dtype:
            expected = f"{tuple(self._shape)} of {self._dtype}"
            raise ValueError(f"x: expected one sample per stream, {expected}, found {tuple(x.shape)} of {x.dtype}")
        return self._run(x)

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

    def _step_by_step(self, cell: LMUCell) -> Callable[[Tensor], Tensor]:
        system = cell.system()

        @torch.inference_mode()
        def run(x: Tensor) -> Tensor:
            training = cell.training
            cell.eval()
            try:
                output, state = cell.step(x, LMUState.of(self._state), system, cell.sample_dropout(x))
            finally:
                cell.train(training)
            self._state = state.tensors()
            return output

        return run

    def _compiled(self, kind: str, *prepared: Any) -> Callable[[Tensor], Tensor]:
        encoder, u_bias, A, B, weight, bias = prepared
        if weight is None:
            weight = encoder.new_empty(0, 0)
        elif bias is None:
            bias = weight.new_zeros(weight.shape[1])
        cell = self.cell
        matrices = (u_bias, panels(A.mT), panels(B[:, None]), panels(weight), bias)
        encoder = (encoder.mT.contiguous(), cell.hidden_to_memory, cell.memory_to_memory, cell.encoder_act)
        sizes = (cell.input_size, cell.output_size)
        stream = torch.classes.lmu_hf.Stream(kind, list(self._state), *encoder, *matrices, *sizes)
        # Called by its address, and without the GIL: the dispatcher would take half as long as the step.
        function, address = stream.entry()
        step = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(function)
        outputs = self._like.new_empty(self.batch_size, cell.output_size)

        def run(x: Tensor) -> Tensor:
            if not x.is_cpu or not x.is_contiguous() or x.is_neg():
                x = x.cpu().resolve_neg().contiguous()
            output = torch.empty_like(outputs)
            step(address, x.data_ptr(), output.data_ptr())
            return output

        run.stream = stream  # type: ignore[attr-defined]  # whose address it is
        return run

    def _python(self, kind: str, *prepared: Any) -> Callable[[Tensor], Tensor]:
        """Calls into torch cost more than their arithmetic here, so states and sample lie side by side in one row [m, x, h]."""
        cell, like = self.cell, self._like
        size = cell.state_sizes[0] if kind != "none" else 0
        flat, inputs = cell.memory_d * cell.order, cell.input_size
        row = like.new_zeros(len(like), flat + inputs + size)
        memory, sample, output = row.tensor_split([flat, flat + inputs], dim=1)
        self._state = (memory.view(-1, cell.memory_d, cell.order), *self._state[1:])
        if size:
            self._state = (self._state[0], output, *self._state[2:])
        # An infinite hidden state, which only unbounded cells have, must not meet the zeros of a product that makes the memory.
        advance = self._advance(row, *prepared, merges=cell.hidden_to_memory or kind not in UNBOUNDED)
        pointwise, hidden, device = Pointwise(kind), self._state[1:], like.device.type

        def run(x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return run(x)
            sample.copy_(x.detach() if x.requires_grad else x)
            gates = advance()
            if gates is None:
                return row.clone() if cell.input_to_hidden else memory.clone()
            if kind in SIMPLE:
                GATES[kind].activation(gates, output)
                return output.clone()
            kept = pointwise.allocate(hidden, 1)
            pointwise.gates(hidden, kept).step(0, gates)
            for own, new in zip(hidden, kept, strict=False):
                own.copy_(new[:, 0])
            return kept[0][:, 0]

        return run

    def _advance(
        self,
        row: Tensor,
        encoder: Tensor,
        u_bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        merges: bool,
    ) -> Callable[[], Tensor | None]:
        """A function that puts the next memory into a row [m, x, h] and returns the gates (batch_size, G), if there are any."""
        cell = self.cell
        dims, order, inputs = cell.memory_d, cell.order, cell.input_size
        flat, A = dims * order, A.mT
        # E in the order of the row, and the part of the row that it reads.
        of_input, of_hidden, of_memory = encoder.tensor_split([inputs, cell.encoder_size])
        encoder = torch.cat([of_memory, of_input, of_hidden])
        end = flat + inputs + len(of_hidden)
        read = slice(end - len(encoder), end)
        memory = row[:, :flat]
        activate = None if cell.encoder_act == "linear" else ACTIVATIONS[cell.encoder_act]
        if merges and activate is None and row.shape[1] <= order + _CALLS // flat:
            # One product in place of four: [m, x, h] -> m' and the gates that it makes.
            to_memory = torch.block_diag(*B.expand(dims, order)[:, None])
            matrix = row.new_zeros(row.shape[1], flat)
            matrix[read] = encoder @ to_memory
            matrix[:flat] += torch.block_diag(*A.expand(dims, order, order))
            constant = row.new_zeros(flat) if u_bias is None else u_bias @ to_memory
            if weight is not None:
                of_memory, others = weight.tensor_split([flat])
                others = torch.cat([torch.zeros_like(of_memory), others])
                matrix = torch.cat([matrix, matrix @ of_memory + others], dim=1)
                through = constant @ of_memory
                constant = torch.cat([constant, through if bias is None else through + bias])
            sums = row.new_empty(len(row), matrix.shape[1])
            after, gates = sums.tensor_split([flat], dim=1)

            def at_once() -> Tensor | None:
                with full_float32(row):
                    torch.addmm(constant, row, matrix, out=sums)
                memory.copy_(after)
                return None if weight is None else gates

            return at_once
        B, of_row = B[:, None], row[:, read]

        def one_by_one() -> Tensor | None:
            with full_float32(row):
                u = torch.mm(of_row, encoder) if u_bias is None else torch.addmm(u_bias, of_row, encoder)
                if activate is not None:
                    u = activate(u)
                if len(A) == 1:
                    memory.copy_(torch.addmm(u.view(-1, 1) * B[0], memory.reshape(-1, order), A[0]).view(-1, flat))
                else:
                    by_dimension = memory.view(-1, dims, order).transpose(0, 1)
                    memory.copy_(torch.baddbmm(u.mT[..., None] * B, by_dimension, A).transpose(0, 1).flatten(1))
            if weight is None:
                return None
            return torch.mm(row, weight) if bias is None else torch.addmm(bias, row, weight)

        return one_by_one


def check_streams(batch_size: int) -> int:
    """Returns ``batch_size`` if it is a whole number >= 1; raises ValueError otherwise."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of streams >= 1, found {batch_size!r}")
    return batch_size


def _prepare(cell: LMUCell, weights: GateWeights | None, like: Tensor) -> tuple[Tensor | None, ...]:
    """E (I [+ H] [+ D * N], D) and its bias, A (S, N, N), B (S, N), K (D * N + I + H, G) and its bias."""
    dims, order, inputs = cell.memory_d, cell.order, cell.input_size
    encoder = encoder_matrix(cell, like)
    if cell.recurrent_kernel is not None:
        encoder = torch.cat([encoder, cell.recurrent_kernel])
    system = cell.system().matrices(like.dtype, like.device)
    if weights is None:
        return encoder, cell.bias, *system, None, None
    of_memory, of_input = weights.input_weight.tensor_split([dims * order])
    width = of_memory.shape[1]
    rows = [of_memory, of_input if cell.input_to_hidden else of_memory.new_zeros(inputs, width)]
    hidden = weights.hidden_weight
    rows.append(of_memory.new_zeros(cell.state_sizes[0], width) if hidden is None else hidden)
    return encoder, cell.bias, *system, torch.cat(rows), weights.bias
