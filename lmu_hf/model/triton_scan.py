"""The time loop of :mod:`scan` for CUDA: all steps of a chunk, or of a segment without feedback, in one Triton kernel.

A program takes a few rows of the batch through all steps without meeting the others. What limits a step is not its arithmetic:
the matrix R of h, (H, W), has to pass through the processor once per step, however few the rows, and the threads have to wait for
each other at each sum. So products are plain multiply-adds in float32, since tensor cores would take sixteen rows or nothing, and
round them to tf32 or bf16; and there are two kinds of kernels:

- :mod:`triton_held`, of one row per program, where the cell has one gate and all of a step fits the registers: it stays there.
- :mod:`triton_steps` for the others, of as few rows per program as there are programs to fill the device with. R is read in
  tiles, each step anew, from the L1 or the L2 cache, with the loads of two or more tiles under way. h and u pass from step to
  step through the tensors that keep them; a barrier of the program's own threads lies between the steps.

On an H100 a step of H = 212, one memory dimension, in chunks of 32, takes 0.92 us forwards and 0.67 us backwards from registers,
3.04 and 3.42 us in tiles; without memory 0.58 and 0.55, and 2.8 and 2.5. That is so from one row to a hundred. A thousand rows,
eight to each multiprocessor, take half as long from registers as in tiles. What did not help the tiles: R in bfloat16, which is
converted for longer than its loads save; 4 or 16 warps, or 2, which need no sum across warps.

With feedback the chunks need a product with the memory at their start between them. Launching it and the steps took longer than
they do: where the rows are not many, :mod:`triton_segment` does all of it in one launch (a training step of 100 rows and 784
steps went from 9.2 ms to 7.5, 3.7 of them on the device), otherwise a chunk takes two or more. What is left are calls around the
loops, which a CUDA graph (``torch.cuda.make_graphed_callables``) takes away. Nothing of that kind is done here, since a graph
fixes all shapes.

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
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .folding import ChunkOperators
from .gates import Pointwise
from .time_loop import State, TimeLoop, carried, with_zeros
from .triton_held import held_backward_kernel, held_forward_kernel, held_sizes, holds, with_history
from .triton_parts import ALIGNED, backward_sizes, block_sizes, memory_sizes, processors, rows_per_program, takes_memory
from .triton_segment import SPLITS, segment_backward_kernel, segment_backward_sizes, segment_forward_kernel, segment_sizes
from .triton_steps import backward_kernel, forward_kernel

# What was compiled takes all arguments of its kernel, constants too; older versions want them without.
_TAKES_ALL = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)

# Rows to each multiprocessor up to which a segment is one launch. With more of them the device is busy anyway, and small layers
# have several programs on a multiprocessor.
_ROUNDS = 4

# The pointwise steps that the kernels know; keys of GATES.
KINDS = ("tanh", "sigmoid", "relu", "linear", "lstm", "gru")


class TritonScan(TimeLoop):
    """:class:`scan.NaiveScan` for float32 tensors, with its loop in a kernel; no encoding, no memory in front of h.

    Makes a :class:`HeldScan` of itself where the step matrix fits into registers.
    """

    language = "triton"
    kernels = forward_kernel, backward_kernel

    def __new__(cls, cell: Pointwise, step: Tensor, chunk: int, dims: int, states: State, *_: Any, **__: Any) -> Any:
        return super().__new__(HeldScan if holds(cell.kind, states[0].shape[1], dims, chunk) else cls)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batch, size = self.states[0].shape
        self.steps = self.kept[0].shape[1]
        self.states = tuple(state.contiguous() for state in self.states)
        # An argument that a kind has no use for still has to be some pointer.
        hidden, *further = self.kept
        self.kept = (hidden, further[0] if self.cell.kind == "lstm" else hidden, self.kept[-1])
        self.launches: dict[tuple, Any] = {}  # see _launch
        self.of_step = (self.cell.kind, size, self.dims, self.chunk)
        self.set_up()

    def set_up(self) -> None:
        """Says how many rows a program takes, and what the kernel is compiled with."""
        self.rows = rows_per_program(self.batch, self.step)
        self.sizes = block_sizes(*self.of_step, self.rows)
        # Of u ((C - 1) * D, W), and of h (H, W).
        self.past, self.recurrent = self.step.tensor_split([len(self.step) - self.states[0].shape[1]])
        self.memory: dict[str, Any] = {}  # see of_memory

    def of_memory(self, operators: ChunkOperators) -> dict[str, Any]:
        """What a kernel of either direction takes to bring the memory from chunk to chunk; empty if it leaves that alone."""
        power, response = operators.advance
        if not self.memory and takes_memory(self.dims, power.shape[1]):
            matrices = {"power": power.contiguous(), "response": response.contiguous(), "system": int(len(power) > 1)}
            self.memory = {**matrices, **memory_sizes(power.shape[1], self.rows)}
        return self.memory

    @cached_property
    def forwards(self) -> dict[str, Tensor]:
        """The matrices as the kernel of this direction takes them."""
        to_u = self.step[:, : self.dims].mT.contiguous()
        return {"to_u": to_u, "kernel": self._by_gate(self.past), "recurrent": self._by_gate(self.recurrent)}

    def forward(self, first: int, count: int, known: Tensor, u: Tensor) -> None:
        alone = {**dict.fromkeys(("memory", "after", "power", "response"), self.states[0]), "system": 0}
        self._forward(first, count, {"known": known, "u": u}, alone)

    def _forward(self, first: int, count: int, places: dict[str, Tensor], others: dict[str, Any], further: int = 0) -> None:
        known = places["known"]
        if known.stride(2) != 1:
            known = places["known"] = known.contiguous()
        distances = {"known_row": known.stride(0), "known_step": known.stride(1), "u_row": places["u"].stride(0)}
        distances["memory_row"] = places["memory"].stride(0) if "memory" in places else 0

        numbers = {"first": first, "count": count, "further": further}
        self._launch(self.kernels[0], places, numbers, distances, lambda: {**self.forwards, **others})

    def chunk_forward(
        self,
        first: int,
        known: Tensor,
        u: Tensor,
        memory: Tensor,
        start: Tensor,
        after: Tensor | None,
        operators: ChunkOperators,
    ) -> Tensor:
        of_memory = self.of_memory(operators)
        if not of_memory:
            return super().chunk_forward(first, known, u, memory, start, after, operators)
        further, after = int(after is not None), start if after is None else after
        places = {"known": known, "u": u, "memory": start, "after": after}
        self._forward(first, min(self.chunk, self.steps - first), places, of_memory, further)
        return after.view(memory.shape)

    def _by_gate(self, matrix: Tensor) -> Tensor:
        """The columns of the gates, each gate filled up."""
        size = len(self.recurrent)
        of_gates = matrix[:, self.dims :]
        return _filled_up(of_gates.unflatten(1, (-1, size)) if size else of_gates.unsqueeze(1))

    def start_backward(self, grads: State, last: Sequence[Tensor | None]) -> None:
        self.grads = [grad.contiguous() for grad in with_zeros(grads, self.states)]
        self.carry, *others = carried(last, self.states)
        self.backwards = self.set_up_backward()
        if others:  # the step after the last one would have left them here
            self.carried[self.steps % 2] = others[0]

    def set_up_backward(self) -> dict[str, Tensor]:
        """Returns the matrices as the kernel of this direction takes them, and changes what it is compiled with."""
        self.sizes = backward_sizes(self.sizes)
        by_lag = self.past.unflatten(0, (-1, self.dims)) if self.dims else self.past.unsqueeze(1)
        lags = by_lag.flip(0).transpose(0, 1).contiguous()
        self.carried = self.carry.new_zeros(2, *self.carry.shape)
        return {"lags": lags, "transposed": _filled_up(self.recurrent.mT), "carried": self.carried}

    def backward(self, first: int, count: int, grad_u: Tensor, grad_sums: Tensor) -> None:
        alone = {**dict.fromkeys(("after", "arrived", "power", "response"), self.states[0]), "system": 0}
        self._backward(first, count, {"grad_u": grad_u, "grad_sums": grad_sums}, alone)

    def _backward(self, first: int, count: int, places: dict[str, Tensor], others: dict[str, Any]) -> None:
        grad_u, grad_sums = places["grad_u"], places["grad_sums"]
        assert grad_sums.stride(1) == grad_sums.shape[2]
        assert not self.dims or grad_u.stride(1) == self.dims
        distances = {"grad_u_row": grad_u.stride(0), "sums_row": grad_sums.stride(0)}
        distances["arrived_row"] = places["arrived"].stride(0) if "arrived" in places else 0

        def constants() -> dict[str, Any]:
            of_state = {"grads": self.grads[0], "grads_cell": self.grads[-1], "carry": self.carry}
            return {**self.backwards, **of_state, **others}

        self._launch(self.kernels[1], places, {"first": first, "count": count}, distances, constants)

    def chunk_backward(
        self, first: int, grad_u: Tensor, grad_sums: Tensor, after: Tensor, place: Tensor, operators: ChunkOperators
    ) -> Tensor:
        of_memory = self.of_memory(operators)
        if not of_memory:
            return super().chunk_backward(first, grad_u, grad_sums, after, place, operators)
        places = {"grad_u": grad_u, "grad_sums": grad_sums, "after": after, "arrived": place}
        self._backward(first, min(self.chunk, self.steps - first), places, of_memory)
        return place

    def initial_gradients(self) -> State:
        return (self.carry,) if len(self.states) == 1 else (self.carry, self.carried[0])

    def _launch(
        self,
        kernel: Any,
        places: dict[str, Tensor],
        numbers: dict[str, int],
        distances: dict[str, int],
        constants: Callable[[], dict[str, Any]],
    ) -> None:
        """Launches a kernel of some steps.

        Triton's own way there goes through all arguments, some 40, to find what it has compiled for such ones. With the rest of
        a launch that took 90 us beside an H100, on which the steps of a chunk take 110. So what it found is kept: only the
        first launch of its kind goes that way.

        Args:
            kernel: one of either direction.
            places: tensors by name that change from launch to launch. What is compiled depends on how they are aligned.
            numbers: what else changes, and does not matter to the compiler; a kernel may have no use for some.
            distances: between rows and steps.
            constants: gives all that is the same for each launch with these ``places``.
        """
        key = (kernel, *places, *(place.data_ptr() % 16 for place in places.values()), *distances.values())
        with _on(self.states[0]):
            if found := self.launches.get(key):
                launch, arguments, positions = found
                arguments, values = arguments.copy(), {**places, **numbers}
                for name, position in positions:
                    arguments[position] = values[name]
                launch(*arguments)
                return
            names = ("hidden", "cell", "gates", "initial", "initial_cell", "batch", "steps")
            of_all = (*self.kept, self.states[0], self.states[-1], self.batch, self.steps)
            others = dict(zip(names, of_all, strict=True))
            grid = (triton.cdiv(self.batch, self.rows), 1, 1)
            named = taken(kernel, {**self.sizes, **constants(), **others, **places, **numbers, **distances})
            compiled = kernel[grid](**named)
            if _TAKES_ALL and compiled is not None:  # there is none under the interpreter
                arguments = [named[name] for name in kernel.arg_names]
                positions = [(name, kernel.arg_names.index(name)) for name in (*places, *numbers) if name in named]
                self.launches[key] = compiled[grid], arguments, positions


class HeldScan(TritonScan):
    """A loop whose step matrix stays in registers, one row to a program however long the rows wait for each other, and whose
    segments are one launch each while the rows are not many."""

    kernels = held_forward_kernel, held_backward_kernel

    def set_up(self) -> None:
        self.rows, self.sizes = 1, held_sizes(*self.of_step)
        self.unfold: Tensor | None = None  # see feedback_backward

    def of_memory(self, operators: ChunkOperators) -> dict[str, Any]:
        return {}

    @cached_property
    def forwards(self) -> dict[str, Tensor]:
        matrix = with_history(self._with_u(self.step), self.dims, self.sizes["COLUMNS"], self.sizes["HISTORY"])
        return {"matrix": matrix}

    def set_up_backward(self) -> dict[str, Tensor]:
        older, square = self._with_u(self.step).tensor_split([-self.step.shape[1]])
        matrix = torch.cat([square, older]).mT
        return {"square": F.pad(matrix, (0, self.sizes["COLUMNS"] - matrix.shape[1])).contiguous()}

    def _with_u(self, step: Tensor) -> Tensor:
        """The step matrix, with rows for the u of the step before even if a chunk of one step has none."""
        return F.pad(step, (0, 0, self.dims, 0)) if self.chunk == 1 else step

    def feedback_forward(
        self, first: int, known: Tensor, u: Tensor, starts: Tensor, memory: Tensor, operators: ChunkOperators
    ) -> Tensor:
        if not self._at_once(operators):
            return super().feedback_forward(first, known, u, starts, memory, operators)
        assert operators.fold is not None
        if first == 0:
            starts[:, 0] = memory.flatten(1)
        chunks = known.shape[1] // self.chunk
        further = first + known.shape[1] < self.steps
        sizes = self._segment_sizes(operators)
        tiles = triton.cdiv(self.batch, sizes["ROWS"]) * triton.cdiv(self.chunk * known.shape[2], sizes["SUMS_AT_ONCE"])
        named: dict[str, Any] = {"known": known, "u": u, "starts": starts, "initial": self.states[0], **self.forwards}
        named |= {"fold": operators.fold.contiguous(), "first": first, "chunks": chunks, "further": int(further)}
        named |= {"known_row": known.stride(0), "u_row": u.stride(0), "starts_row": starts.stride(0)}
        self._launch_segment(segment_forward_kernel, sizes, tiles, operators, named)
        return starts[:, first // self.chunk + chunks - (not further)].view(memory.shape)

    def feedback_backward(
        self,
        first: int,
        grad_u: Tensor,
        grad_sums: Tensor,
        grad_starts: Tensor | None,
        arrived: Tensor,
        operators: ChunkOperators,
    ) -> None:
        if not self._at_once(operators):
            super().feedback_backward(first, grad_u, grad_sums, grad_starts, arrived, operators)
            return
        assert operators.fold is not None
        memory = arrived.shape[2]
        from_elsewhere = arrived if grad_starts is None else grad_starts.contiguous()
        sizes = {**segment_backward_sizes(self._segment_sizes(operators)), "STARTS": grad_starts is not None}
        tiles = triton.cdiv(self.batch, sizes["ROWS"]) * triton.cdiv(memory, sizes["MEMORY_AT_ONCE"]) * SPLITS
        if self.unfold is None:
            # Of which tiles are read as they lie, and not across the banks of shared memory.
            self.unfold = operators.fold.mT.contiguous()
        named: dict[str, Any] = {"grad_u": grad_u, "grad_sums": grad_sums, "arrived": arrived, "unfold": self.unfold}
        named |= {"grad_starts": from_elsewhere, "parts": arrived.new_empty(SPLITS, self.batch, memory)}
        named |= {"grads": self.grads[0], "carry": self.carry}
        named |= {"first": first, "chunks": arrived.shape[1] - 1, **self.backwards}
        named |= {"grad_u_row": grad_u.stride(0), "sums_row": grad_sums.stride(0), "arrived_row": arrived.stride(0)}
        named["grad_starts_row"] = from_elsewhere.stride(0)
        self._launch_segment(segment_backward_kernel, sizes, tiles, operators, named)

    def _at_once(self, operators: ChunkOperators) -> bool:
        """Whether all chunks of a segment go in one launch."""
        takes = takes_memory(self.dims, operators.advance[0].shape[1])
        return takes and self.batch <= _ROUNDS * processors(self.step)

    def _segment_sizes(self, operators: ChunkOperators) -> dict[str, Any]:
        return segment_sizes(*self.of_step, operators.advance[0].shape[1], self.batch)

    def _launch_segment(
        self, kernel: Any, sizes: dict[str, Any], tiles: int, operators: ChunkOperators, named: dict[str, Any]
    ) -> None:
        """Launches a kernel of a segment: as many programs as there is work for, and as can run at once."""
        power, response = (matrix.contiguous() for matrix in operators.advance)
        named |= {"power": power, "response": response, "system": int(len(power) > 1)}
        named |= {"hidden": self.kept[0], "batch": self.batch, "steps": self.steps}
        named["counter"] = torch.zeros(1, dtype=torch.int32, device=power.device)
        together = {"launch_cooperative_grid": True} if power.is_cuda else {}  # which the interpreter does not know
        programs = min(processors(power), max(self.batch, tiles))
        with _on(power):
            kernel[(programs, 1, 1)](**taken(kernel, {**sizes, **named}), **together)


def taken(kernel: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of some arguments, constants and options that a kernel has a use for: Triton refuses others."""
    return {name: value for name, value in values.items() if name in kernel.arg_names or name in ("num_warps", "num_stages")}


def _filled_up(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, -matrix.shape[-1] % ALIGNED)).contiguous()


def _on(like: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not like.is_cuda or like.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(like.device)
