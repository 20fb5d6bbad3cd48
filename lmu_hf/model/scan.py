"""The time loop itself: the steps of one chunk, for :mod:`lookahead`.

Within a chunk, step j computes

    sums[j] = known[j] + [u[0..j-1], h[j-1]] @ step          (B, W): its u (D) and its gates (G), W = D + G

and the cell's pointwise part makes h[j] of the gates. Steps are short and must come one after the other, so here the cost of a
call counts more than its arithmetic. :class:`NaiveScan` is a loop in Python; :class:`CompiledScan` hands the whole chunk to the
operator of :mod:`lmu_hf.native`, where that is installed; :class:`triton_scan.TritonScan` does so on CUDA, where Triton is. A
checkpoint that carries this file along runs without either.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from .compiled import MOST_NUMBERS, available, contiguous, panels
from .folding import ChunkOperators
from .gates import GATES
from .precision import full_float32
from .time_loop import State, TimeLoop, carried, with_zeros


class NaiveScan(TimeLoop):
    """The steps as a loop in Python; see :class:`time_loop.TimeLoop`."""

    language = "python"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gates = self.cell.gates(self.states, self.kept)
        # The row of a step is as long as the u before it.
        lags = range(self.chunk - 1, -1, -1) if self.dims else (0,)
        self.matrices = [self.step[lag * self.dims :] for lag in lags]
        self.output = self.states[0]

    def forward(self, first: int, count: int, known: Tensor, u: Tensor) -> None:
        dims, output = self.dims, self.output
        if not dims:
            with self._precision():
                for j in range(count):
                    output = self.gates.step(first + j, torch.addmm(known[:, j], output, self.matrices[0]))
            self.output = output
            return
        batch, size = output.shape
        # [u of the chunk so far, h]
        row = known.new_empty(batch, count * dims + size)
        row[:, :size] = output
        for j in range(count):
            now = torch.addmm(known[:, j], row[:, : j * dims + size], self.matrices[j])
            if self.encoding is not None:
                self._encode(output, now)
            output = self.gates.step(first + j, now[:, dims:])
            row[:, j * dims : (j + 1) * dims] = now[:, :dims]
            row[:, (j + 1) * dims :][:, :size] = output
        u[:, first : first + count] = row[:, : count * dims].unflatten(1, (count, dims))
        self.output = output

    def start_backward(self, grads: State, last: Sequence[Tensor | None]) -> None:
        self.grads = with_zeros(grads, self.states)
        self.carry, *others = carried(last, self.states)
        self.gates.load_gradients(self.grads[1:], others)
        self.matrices = [matrix.mT for matrix in self.matrices]

    def backward(self, first: int, count: int, grad_u: Tensor, grad_sums: Tensor) -> None:
        dims, carry = self.dims, self.carry
        inputs = grad_u.flatten(1)
        with self._precision():
            for j in reversed(range(count)):
                now = grad_sums[:, j]
                direct = self.gates.back(first + j, self.grads[0][:, first + j] + carry, now[:, dims:])
                if dims:
                    now[:, :dims] = inputs[:, j * dims : (j + 1) * dims]
                    encoded = None if self.encoding is None else self._encode_back(first + j, now)
                    past = now @ self.matrices[j]
                    inputs[:, : j * dims] += past[:, : j * dims]
                    carry = past[:, j * dims :] if encoded is None else past[:, j * dims :] + encoded
                else:
                    carry = now @ self.matrices[0]
                if direct is not None:
                    carry = carry + direct
        self.carry = carry

    def _encode(self, output: Tensor, sums: Tensor) -> None:
        """Completes the sums of a step (B, W): u, and what it contributes to the gates."""
        assert self.encoding is not None
        encoder, direct, mask, activation, _ = self.encoding
        u, gates = sums[:, : self.dims], sums[:, self.dims :]
        u.addmm_(output if mask is None else output * mask, encoder)
        GATES[activation].activation(u.clone(), u)
        gates.addmm_(u, direct)

    def _encode_back(self, t: int, grads: Tensor) -> Tensor:
        """Completes the gradients of the sums of a step, given those of its gates and of its u; returns that of h before it."""
        assert self.encoding is not None
        encoder, direct, mask, activation, u = self.encoding
        grad = torch.addmm(grads[:, : self.dims], grads[:, self.dims :], direct.mT)
        GATES[activation].derivative(grad, u[:, t], grads[:, : self.dims])
        back = grads[:, : self.dims] @ encoder.mT
        return back if mask is None else back * mask

    def _precision(self) -> AbstractContextManager:
        return full_float32(self.output) if self.cell.linear else nullcontext()

    def initial_gradients(self) -> State:
        return self.gates.initial_gradients(self.carry)


# Rows so few, FEW in feedback.h, that all threads share a product with the fold. Where that is one in each chunk and has fewer
# numbers, waiting for one another costs two rows more than each reading all of them.
_FEW = 2
_SHARED = 1 << 20


class CompiledScan(TimeLoop):
    """:class:`NaiveScan` with its loop in C++."""

    language = "compiled"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.states = tuple(state.contiguous() for state in self.states)
        self.advance: tuple[Tensor | None, ...] = ()  # of this direction
        self.reading: tuple[Tensor | None, ...] = ()  # what it needs to read inputs, and to add up gradients

    @cached_property
    def matrix(self) -> Tensor:
        return panels(self.step)

    @cached_property
    def forwards(self) -> tuple[list[Tensor], Tensor | None, str]:
        """The encoding as the operators take it."""
        if self.encoding is None:
            return [], None, "linear"
        encoder, direct, mask, activation, _ = self.encoding
        return [panels(encoder), panels(direct)], mask, activation

    @cached_property
    def backwards(self) -> tuple[list[Tensor], Tensor | None, str]:
        """The same for their adjoints, with the u that they need."""
        if self.encoding is None:
            return [], None, "linear"
        encoder, direct, mask, activation, u = self.encoding
        return [panels(encoder.mT), panels(direct.mT), u], mask, activation

    def _apart(self, operators: ChunkOperators) -> bool:
        """Whether each thread has rows of its own through all chunks, so that none waits for others."""
        assert operators.fold is not None
        rows = len(self.states[0])
        shared = rows == 1 or not self.dims or operators.fold.numel() > _SHARED
        return rows >= torch.get_num_threads() and not (rows <= _FEW and shared)

    def _reads(self, weight: Tensor, operators: ChunkOperators) -> bool:
        return self._apart(operators) and self.step.numel() + weight.numel() <= MOST_NUMBERS

    def _folds(self, operators: ChunkOperators, *, transposed: bool = False) -> Tensor | None:
        """``operators.fold`` by steps, where threads need not share the product with it in each chunk."""
        assert operators.fold is not None
        if not self._apart(operators):
            return None
        by_step = operators.fold.unflatten(1, (self.chunk, -1)).transpose(0, 1)
        return panels(by_step.mT if transposed else by_step)

    def forward(self, first: int, count: int, known: Tensor, u: Tensor) -> None:
        torch.ops.lmu_hf.scan_forward(
            *self.cell, first, count, self.chunk, known, self.matrix, self.states, self.kept, u, *self.forwards
        )

    def folded_forward(self, first: int, count: int, known: Tensor, starts: Tensor, operators: ChunkOperators) -> None:
        if not self.advance:
            self.advance = (self._folds(operators),)
        if self.advance[0] is None:
            return super().folded_forward(first, count, known, starts, operators)
        torch.ops.lmu_hf.folded_forward(
            self.cell.kind, first, count, self.chunk, known, *self.advance, starts, self.matrix, self.states, self.kept
        )

    def reads(self, given: Tensor, weight: Tensor, bias: Tensor | None, operators: ChunkOperators) -> bool:
        if not self._reads(weight, operators):
            return False
        self.reading = given, panels(weight), None if bias is None else bias.contiguous()
        return True

    def adds_up(
        self,
        given: Tensor,
        weight: Tensor,
        u: Tensor,
        grad_given: Tensor | None,
        grad_matrix: Tensor | None,
        operators: ChunkOperators,
    ) -> bool:
        if not self._reads(weight, operators):
            return False
        self.reading = given, None if grad_given is None else panels(weight.mT), u, grad_given, grad_matrix
        return True

    def feedback_forward(
        self, first: int, known: Tensor, u: Tensor, starts: Tensor, memory: Tensor, operators: ChunkOperators
    ) -> Tensor:
        if not self.advance:
            power, response = operators.advance
            self.advance = self._folds(operators), panels(power.mT), panels(response)
        memory = memory.clone(memory_format=torch.contiguous_format)
        torch.ops.lmu_hf.feedback_forward(
            self.cell.kind,
            first,
            known,
            operators.fold,
            *self.advance,
            self.matrix,
            self.states,
            self.kept,
            u,
            starts,
            memory,
            *self.forwards,
            *(self.reading or (None,) * 3),
        )
        return memory

    def start_backward(self, grads: State, last: Sequence[Tensor | None]) -> None:
        self.grads = [contiguous(grad) for grad in grads]
        of_u, of_hidden = self.step.tensor_split([len(self.step) - self.states[0].shape[1]])
        self.transposed = (panels(of_hidden.mT), panels(of_u.mT))
        self.carries = carried(last, self.states)

    def folded_backward(
        self, first: int, count: int, grad_sums: Tensor, to_starts: Tensor, operators: ChunkOperators
    ) -> None:
        if not self.advance:
            self.advance = (self._folds(operators, transposed=True),)
        if self.advance[0] is None:
            return super().folded_backward(first, count, grad_sums, to_starts, operators)
        torch.ops.lmu_hf.folded_backward(
            self.cell.kind,
            first,
            count,
            self.chunk,
            *self.advance,
            self.transposed[0],
            self.states,
            self.kept,
            self.grads,
            grad_sums,
            to_starts,
            self.carries[0],
            self.carries[-1],
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
        if not self.advance:
            power, response = operators.advance
            self.advance = self._folds(operators, transposed=True), panels(power), panels(response.mT)
        torch.ops.lmu_hf.feedback_backward(
            self.cell.kind,
            first,
            operators.fold,
            *self.advance,
            *self.transposed,
            self.states,
            self.kept,
            self.grads,
            grad_u,
            grad_sums,
            self.carries[0],
            self.carries[-1],
            grad_starts,
            arrived,
            *self.backwards,
            *(self.reading or (None,) * 5),
        )

    def backward(self, first: int, count: int, grad_u: Tensor, grad_sums: Tensor) -> None:
        torch.ops.lmu_hf.scan_backward(
            *self.cell,
            first,
            count,
            self.chunk,
            *self.transposed,
            self.states,
            self.kept,
            self.grads,
            grad_u,
            grad_sums,
            self.carries[0],
            self.carries[-1],
            *self.backwards,
        )

    def relaxed_forward(self, given: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, spectra: list[Tensor]) -> None:
        """All steps of :mod:`relaxed`: writes u (B, T, D) and the hidden states.

        Args:
            given: inputs of all steps (B, T, I).
            weight: (I, W).
            bias: (W,) or None.
            u: the memory's input.
            spectra: of what it contributes to later sums, for 1, 2, 4, .. blocks.
        """
        torch.ops.lmu_hf.relaxed_forward(
            self.cell.kind,
            self.chunk,
            given,
            panels(weight),
            None if bias is None else bias.contiguous(),
            self.matrix,
            self.step.shape[1],
            spectra,
            self.states,
            self.kept,
            u,
        )

    def relaxed_backward(
        self,
        given: Tensor,
        weight: Tensor,
        u: Tensor,
        grad_u: Tensor,
        spectra: list[Tensor],
        grad_given: Tensor | None,
        grad_matrix: Tensor | None,
        grad_kernel: Tensor | None,
        first_row: int = 0,
        grad_sums: Tensor | None = None,
    ) -> None:
        """The adjoint. Writes ``grad_given``; adds to the others, of which ``grad_matrix`` is as in :meth:`adds_up`.

        With ``grad_sums`` (R, T or more, W), it takes R rows from ``first_row`` on and leaves the gradients of their sums there.
        """
        torch.ops.lmu_hf.relaxed_backward(
            self.cell.kind,
            self.chunk,
            given,
            None if grad_given is None else panels(weight.mT),
            *self.transposed,
            self.step.shape[1],
            spectra,
            self.states,
            self.kept,
            self.grads,
            u,
            grad_u,
            self.carries[0],
            self.carries[-1],
            grad_given,
            grad_matrix,
            grad_kernel,
            first_row,
            grad_sums,
        )

    def initial_gradients(self) -> State:
        return tuple(self.carries)


def scan_class(like: Tensor, *, special: bool = False) -> type[TimeLoop]:
    """The time loop to use for tensors like this one; ``special`` if it has memory in front of h, or an ``Encoding``."""
    if available(like):
        return CompiledScan
    return (None if special else _triton_scan(like)) or NaiveScan


def _triton_scan(like: Tensor) -> Any:
    """``TritonScan`` if it takes tensors like this one and Triton is there, else None. Imports Triton only then."""
    if type(like) not in (Tensor, torch.nn.Parameter) or like.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    # Triton's own switch for running kernels on the CPU, slowly.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not (like.is_cuda and _new_enough(like.device)):
        return None
    try:
        from .triton_scan import TritonScan
    except ImportError:
        return None
    return TritonScan


@cache
def _new_enough(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
