"""The time loop of :mod:`scan` for CUDA: all steps of a chunk, or of a segment without feedback, in one Triton kernel.

A program takes a few rows of the batch through all steps without meeting the others. What limits a step is not its arithmetic:
the matrix R of h, (H, W), has to pass through the processor once per step, however few the rows, and the threads have to wait for
each other at each sum. So:

- Few rows per program, one where the batch does not fill the device, and products as plain multiply-adds in float32: tensor
  cores would take sixteen rows or nothing, and round them to tf32 or bf16.
- Where R fits the registers it stays there for all steps. Where not, it is read in tiles, each step anew, from the L1 or the L2
  cache, with the loads of two or more tiles under way and those of all that is known before the first sum.

h and u pass from step to step through the tensors that keep them; a barrier of the program's own threads lies between the steps.

On an H200 a step of 100 rows, H = 212, takes 3.4 us forwards and 4.1 us backwards with one memory dimension of order 256 in
chunks of 32, the way of the memory from chunk to chunk included, and 2.6 us either way without memory. What did not help there:
to keep half of R, or a quarter, in registers; R in bfloat16, which is converted for longer than its loads save (4.7 and 4.6 us);
4 or 16 warps.

With feedback a chunk takes two launches, the other one for the product with the memory at its start. With few rows it is the
launches that cost: when there were six, a training step of 100 rows and 784 steps took 18.9 ms and not 11. As a CUDA graph
(``torch.cuda.make_graphed_callables``) it takes 8.3. Nothing of that kind is done here, since a graph fixes all shapes.

The kernels are compared with :class:`scan.NaiveScan` under Triton's interpreter, compiled for sm_80 and sm_90, and where there is
a CUDA device, run on it.

Names as in :mod:`chunked_scan`: B batch, T time, C steps per chunk, D memory dimensions, H hidden size, W width of a step's sums.
"""

# Only scan.py imports this file, and only where it is used; `try` tells transformers that a checkpoint does not need Triton. The
# file is not called kernels.py because in the folder of a checkpoint that would be taken for the package of this name.
try:
    import triton
except ImportError:
    raise

import contextlib
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .folding import ChunkOperators
from .precision import full_float32
from .time_loop import State, TimeLoop
from .triton_parts import ALIGNED, backward_sizes, block_sizes, rows_per_program, takes_memory
from .triton_steps import backward_kernel, forward_kernel

# The pointwise steps that the kernels know; keys of GATES.
KINDS = ("tanh", "sigmoid", "relu", "linear", "lstm", "gru")


class TritonScan(TimeLoop):
    """:class:`scan.NaiveScan` for float32 tensors, with its loop in a kernel; no encoding, no memory in front of h."""

    language = "triton"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batch, size = self.states[0].shape
        self.steps = self.kept[0].shape[1]
        self.past, self.recurrent = self.step.tensor_split([len(self.step) - size])  # of u ((C - 1) * D, W), of h (H, W)
        self.rows = rows_per_program(self.batch, self.step)
        self.states = tuple(state.contiguous() for state in self.states)
        # An argument that a kind has no use for still has to be some pointer.
        hidden, *further = self.kept
        self.kept = (hidden, further[0] if self.cell.kind == "lstm" else hidden, self.kept[-1])
        self.grid = (triton.cdiv(self.batch, self.rows),)

    def sizes(self, order: int) -> dict[str, Any]:
        """The constants of the forward kernel; ``order`` is 0 if it leaves the memory alone."""
        return block_sizes(self.cell.kind, len(self.recurrent), self.dims, self.chunk, self.rows, order)

    @cached_property
    def forwards(self) -> tuple[Tensor, Tensor, Tensor]:
        """The matrices as the kernel of this direction takes them."""
        return self.step[:, : self.dims].mT.contiguous(), self._by_gate(self.past), self._by_gate(self.recurrent)

    def forward(self, first: int, count: int, known: Tensor, u: Tensor) -> None:
        known = known if known.stride(2) == 1 else known.contiguous()
        nothing = (self.states[0],) * 4
        with _on(known):
            self._launch_forward(self.sizes(0), first, count, known, u, nothing, (0, 0, 0))

    def _launch_forward(
        self,
        sizes: dict[str, Any],
        first: int,
        count: int,
        known: Tensor,
        u: Tensor,
        of_memory: tuple[Tensor, ...],
        how: tuple[int, int, int],
    ) -> None:
        """``of_memory``: m, where its successor goes, and the two matrices; ``how``: arguments memory_row, system and further."""
        forward_kernel[self.grid](
            known,
            *self.forwards,
            u,
            *self.kept,
            self.states[0],
            self.states[-1],
            *of_memory,
            first,
            count,
            self.batch,
            self.steps,
            *known.stride()[:2],
            u.stride(0),
            *how,
            **sizes,
        )

    def feedback_forward(
        self, first: int, known: Tensor, u: Tensor, starts: Tensor, memory: Tensor, operators: ChunkOperators
    ) -> Tensor:
        power, response = operators.advance
        if not takes_memory(self.dims, power.shape[1]):
            return super().feedback_forward(first, known, u, starts, memory, operators)
        # Two launches a chunk: with few rows it is they that take the time.
        assert operators.fold is not None
        fold, matrices = operators.fold, (power.contiguous(), response.contiguous())
        sizes, parts, begun = self.sizes(power.shape[1]), known.unflatten(1, (-1, self.chunk)).unbind(1), starts.unbind(1)
        begun[first // self.chunk].copy_(memory.flatten(1))
        with _on(known), full_float32(known):
            for at, part in zip(range(first, self.steps, self.chunk), parts, strict=False):
                start = begun[at // self.chunk]
                further = at + self.chunk < self.steps
                after = begun[at // self.chunk + 1] if further else start
                part.view(self.batch, -1).addmm_(start, fold)
                self._launch_forward(
                    sizes,
                    at,
                    min(self.chunk, self.steps - at),
                    part,
                    u,
                    (start, after, *matrices),
                    (starts.stride(0), int(len(power) > 1), int(further)),
                )
        return after.view(memory.shape)

    def _by_gate(self, matrix: Tensor) -> Tensor:
        """The columns of the gates, each gate filled up."""
        size = len(self.recurrent)
        of_gates = matrix[:, self.dims :]
        return _filled_up(of_gates.unflatten(1, (-1, size)) if size else of_gates.unsqueeze(1))

    def start_backward(self, grads: State) -> None:
        self.grads = [grad.contiguous() for grad in grads]
        by_lag = self.past.unflatten(0, (-1, self.dims)) if self.dims else self.past.unsqueeze(1)
        self.lags = by_lag.flip(0).transpose(0, 1).contiguous()
        self.transposed = _filled_up(self.recurrent.mT)
        self.carry = torch.zeros_like(self.states[0])
        self.carried = self.carry.new_zeros(2, *self.carry.shape)

    def backward(self, first: int, count: int, grad_u: Tensor, grad_sums: Tensor) -> None:
        nothing = (self.states[0],) * 4
        with _on(grad_sums):
            self._launch_backward(backward_sizes(self.sizes(0)), first, count, grad_u, grad_sums, nothing, (0, 0))

    def _launch_backward(
        self,
        sizes: dict[str, Any],
        first: int,
        count: int,
        grad_u: Tensor,
        grad_sums: Tensor,
        of_memory: tuple[Tensor, ...],
        how: tuple[int, int],
    ) -> None:
        """``of_memory``: the gradient of m after the chunk, where that of m before it goes, and the two matrices; ``how``:
        arguments arrived_row and system."""
        assert grad_sums.stride(1) == grad_sums.shape[2]
        assert not self.dims or grad_u.stride(1) == self.dims
        backward_kernel[self.grid](
            self.lags,
            self.transposed,
            grad_u,
            grad_sums,
            self.grads[0],
            self.grads[-1],
            *self.kept,
            self.states[0],
            self.states[-1],
            self.carry,
            self.carried,
            *of_memory,
            first,
            count,
            self.batch,
            self.steps,
            grad_u.stride(0),
            grad_sums.stride(0),
            *how,
            **sizes,
        )

    def feedback_backward(
        self,
        first: int,
        grad_u: Tensor,
        grad_sums: Tensor,
        grad_starts: Tensor | None,
        arrived: Tensor,
        operators: ChunkOperators,
    ) -> None:
        power, response = operators.advance
        if not takes_memory(self.dims, power.shape[1]):
            super().feedback_backward(first, grad_u, grad_sums, grad_starts, arrived, operators)
            return
        assert operators.fold is not None
        fold, matrices = operators.fold.mT, (power.contiguous(), response.contiguous())
        sizes, how = backward_sizes(self.sizes(power.shape[1])), (arrived.stride(0), int(len(power) > 1))
        parts, places = grad_sums.unflatten(1, (-1, self.chunk)).unbind(1), arrived.unbind(1)
        inputs = grad_u.unflatten(1, (-1, self.chunk)).unbind(1)
        with _on(grad_sums), full_float32(grad_sums):
            for index, part in reversed(list(enumerate(parts))):
                at, of_memory = first + index * self.chunk, (places[index + 1], places[index], *matrices)
                count = min(self.chunk, self.steps - at)
                self._launch_backward(sizes, at, count, inputs[at // self.chunk], part, of_memory, how)
                places[index].addmm_(part.view(self.batch, -1), fold)
                if grad_starts is not None:
                    places[index].add_(grad_starts[:, at // self.chunk])

    def initial_gradients(self) -> State:
        return (self.carry, self.carried[0])[: len(self.states)]


def _filled_up(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[-1] % ALIGNED)).contiguous()


def _on(like: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not like.is_cuda or like.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(like.device)
