"""How a call of a layer is computed: chosen here, carried out in :mod:`layer`, shown by ``explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .cells import is_recurrent
from .compiled import available
from .costs import memory_algorithm, memory_chunk
from .gates import SIMPLE, UNBOUNDED, GateWeights
from .layer_costs import Recurrence, recurrence_algorithm
from .lookahead import encodes_first
from .memory import measured
from .scan import scan_class
from .state import Dropout

if TYPE_CHECKING:
    from .lmu_cell import LMUCell


_INPUT_KNOWN = "the memory's input is known in advance"
_INPUT_FIRST = "the memory's input is computed first, by look-ahead, as memory_to_memory feeds the memory back"


class Plan(NamedTuple):
    """How one call of a layer is computed.

    Attributes:
        memory: "naive" (step by step), "lookahead" (fed back, in chunks), "relaxed" (fed back, by a relaxed convolution),
            "folded" or "written" (together with a recurrent hidden cell, in chunks: folded into its weights, or written a few
            chunks at a time), "convolved" (what it contributes to the gates of all steps at once), "merged" (one product a step
            for memory and gates), or an algorithm of :func:`linear_memory`: "chunked", "fft", "final", "scan".
        chunk: time steps at a time; 0 where the algorithm knows no chunks.
        hidden: "at once" for all steps; "compiled loop", "triton loop" or "python loop" over affine gates; "step by step"; None
            without a hidden cell.
        reason: why, in words.
    """

    memory: str
    chunk: int
    hidden: str | None
    reason: str

    def __str__(self) -> str:
        chunks = f", {self.chunk} steps at a time" if self.chunk else ""
        hidden = "" if self.hidden is None else f"; hidden cell: {self.hidden}"
        return f"memory: {self.memory}{chunks}{hidden} ({self.reason})"


def make_plan(
    cell: LMUCell,
    algorithm: str,
    batch: int,
    steps: int,
    weights: GateWeights | None,
    dropout: Dropout,
    *,
    return_sequences: bool,
    training: bool,
    trains_memory: bool,
    like: Tensor,
    at_rest: bool = True,
) -> Plan:
    """Chooses how to run a layer.

    Args:
        cell: its cell.
        algorithm: "auto" or a name, which is then taken.
        batch: rows B.
        steps: T.
        weights: the gate form of the hidden cell, None if it has none.
        dropout: the masks of this run.
        return_sequences: all outputs are wanted.
        training: a gradient is wanted.
        trains_memory: one of the memory's input or its matrices is.
        like: a tensor of the dtype and on the device of the inputs.
        at_rest: the state before the first step is known to be zero.

    Raises:
        ValueError: the named algorithm cannot run this layer.
    """
    recurrent = cell.hidden_cell is not None and is_recurrent(cell.hidden_cell)
    if algorithm == "naive":
        return _naive(cell, "algorithm='naive'")
    if algorithm == "auto" and (cell.coupled or recurrent):
        if steps == 1:
            return _naive(cell, "a single step has nothing to look ahead to")
        if torch.compiler.is_exporting():
            return _naive(cell, "an exported graph cannot hold the differentiable function of the fast loops")
    # Half precision is computed in float32.
    like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    if cell.coupled:
        reason = unsupported(cell, weights, dropout)
        if reason is not None:
            if algorithm in ("lookahead", "merged"):
                raise _refusal(algorithm, reason, "naive")
            return _naive(cell, reason)
    u_first = encodes_first(cell, dropout)
    if algorithm == "merged" and u_first:
        raise _refusal("merged", "encoder_act or the dropout of what is fed back asks for u before the gates", "lookahead")
    if weights is not None and (cell.hidden_to_memory or recurrent) and algorithm in ("auto", "lookahead", "merged"):
        return _recurrence(cell, algorithm, batch, steps, weights, like, training=training, u_first=u_first, at_rest=at_rest)
    if algorithm == "merged":
        raise _refusal("merged", "its hidden cell has no form as affine gates", "naive")
    because = _INPUT_FIRST if cell.memory_to_memory else _INPUT_KNOWN
    if algorithm == "lookahead":
        algorithm = "auto"
    rows, known = batch * cell.memory_d, measured(like)
    if algorithm == "auto":
        every = return_sequences or recurrent
        memory, chunk = memory_algorithm(
            rows,
            steps,
            cell.order,
            return_sequence=every,
            training=trains_memory,
            compiled=available(like),
            measured=known,
            systems=len(cell.initial_theta) if isinstance(cell.initial_theta, tuple) else 1,
            at_rest=at_rest,
        )
    else:
        memory, because = algorithm, f"algorithm={algorithm!r}"
        how = {"training": trains_memory, "compiled": available(like), "measured": known}
        chunk = memory_chunk(rows, steps, cell.order, **how) if memory == "chunked" else 0
    hidden = None if cell.hidden_cell is None else "at once"
    if recurrent:
        hidden = "step by step" if weights is None else _loop(like)
    if torch.compiler.is_compiling():
        return Plan(memory, chunk, hidden, because)  # a graph for any number of steps: do not look at it
    return Plan(memory, min(chunk, steps), hidden, because)


def _recurrence(
    cell: LMUCell,
    algorithm: str,
    batch: int,
    steps: int,
    weights: GateWeights,
    like: Tensor,
    *,
    training: bool,
    u_first: bool,
    at_rest: bool,
) -> Plan:
    """How to run a hidden cell in affine gates, together with its memory."""
    if algorithm == "merged":
        return Plan("merged", 0, _loop(like, special=True), "algorithm='merged'")
    sizes = Recurrence(batch, steps, cell.memory_d, cell.order, cell.state_sizes[0], weights.input_weight.shape[1])
    memory, chunk = recurrence_algorithm(
        sizes,
        hidden_to_memory=cell.hidden_to_memory,
        memory_to_memory=cell.memory_to_memory,
        training=training,
        compiled=available(like),
        measured=measured(like),
        at_rest=at_rest,
        # An infinite hidden state, which only unbounded cells have, must not reach a memory that it is not fed back to.
        merges=algorithm == "auto" and not u_first and (cell.hidden_to_memory or weights.kind not in UNBOUNDED),
        relaxes=algorithm == "auto" and not u_first,
    )
    if memory == "merged":
        reason = "memory and hidden state are so small that one product a step costs least"
        return Plan(memory, chunk, _loop(like, special=True), reason)
    if cell.hidden_to_memory:
        return Plan(memory, chunk, _loop(like, special=u_first), "hidden_to_memory feeds the state back")
    return Plan(memory, chunk, _loop(like), _INPUT_FIRST if cell.memory_to_memory else _INPUT_KNOWN)


def unsupported(cell: LMUCell, weights: GateWeights | None, dropout: Dropout) -> str | None:
    """Why a coupled layer, whose hidden cell has the gate form ``weights``, cannot look ahead; None if it can."""
    if cell.encoder_act not in SIMPLE:
        return f"the derivative of encoder_act={cell.encoder_act!r} does not follow from its value"
    if dropout.recurrent is not None:
        return "the dropout of the memory that is fed back differs from row to row"
    if cell.hidden_to_memory and weights is None:
        return "the hidden cell that is fed back has no form as affine gates"
    return None


def _refusal(algorithm: str, reason: str, instead: str) -> ValueError:
    return ValueError(f"algorithm: {algorithm!r} cannot run this layer, because {reason}; use 'auto' or {instead!r}")


def _naive(cell: LMUCell, reason: str) -> Plan:
    return Plan("naive", 0, None if cell.hidden_cell is None else "step by step", reason)


def _loop(like: Tensor, *, special: bool = False) -> str:
    return f"{scan_class(like, special=special).language} loop"
