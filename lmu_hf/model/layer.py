"""The Legendre Memory Unit over sequences (Voelker, Kajic & Eliasmith 2019).

Plain torch.nn, with every argument of the layer that the papers and their reference implementation describe. Where
neither ``hidden_to_memory`` nor ``memory_to_memory`` is set the memory is a fixed linear filter and runs in parallel over
time (Chilkuri & Eliasmith 2021); otherwise step by step. Both give the same numbers from the same weights.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cell_registry import HiddenCellSpec, holds_module
from .cells import is_recurrent
from .folding import encoded_last, encodes_last
from .gates import gate_weights
from .lmu_cell import LMUCell
from .lookahead import lookahead_input, lookahead_recurrence, relaxed_recurrence
from .memory import ALGORITHMS, linear_memory, wants_gradient
from .merged import merged_recurrence
from .plan import Plan, make_plan
from .ragged import blank, check_lengths, last_valid, pack, reverse, to_front, to_place, where_started
from .recurrence import naive_recurrence, naive_scan
from .segments import in_segments
from .state import BidirectionalState, Dropout, LMUState, forget_
from .stepper import LMUStepper
from .uncoupled import convolved_recurrence, gated_scan, uncoupled_recurrence
from .weights import a_weight


class LMU(nn.Module):
    """A Legendre Memory Unit over sequences.

    Args:
        input_size: features of x per time step.
        memory_d: see :class:`LMUCell`, as all arguments up to ``return_sequences``.
        order: Legendre polynomials per dimension.
        theta: window length in time steps, or one per memory dimension.
        hidden_cell: what to compute from the memory.
        hidden_size: units of a named hidden cell.
        hidden_act: activation of a named hidden cell.
        return_sequences: return the outputs of all steps; otherwise only of the last one.
        return_state: return ``(output, state)``.
        time_major: inputs and sequence outputs are (time, batch, features).
        stateful: start each call from the state where the one before ended; see :meth:`reset_state`.
        go_backwards: run from the last step to the first; sequence outputs come in that order too.
        bidirectional: run both ways, with separate weights, and join the outputs, both in time order.
        algorithm: how the memory is computed: "auto", "naive", "chunked", "fft", "final", "scan"; where the state is fed back,
            "lookahead"; and with a recurrent hidden cell "merged", memory and gates in one product a step. A choice of this run
            that is not part of a checkpoint; may be set at any time. :meth:`explain` tells what "auto" chooses.
        checkpoint_steps: for sequences whose activations do not fit into memory: training keeps only the state after every so
            many time steps and computes what lies between once more, backwards. A choice of this run like ``algorithm``.
        **kwargs: the other arguments of :class:`LMUCell`.

    Raises:
        ValueError: an argument is wrong or arguments contradict each other.
    """

    def __init__(
        self,
        input_size: int,
        memory_d: int,
        order: int,
        theta: float | Sequence[float],
        hidden_cell: HiddenCellSpec = None,
        hidden_size: int | None = None,
        hidden_act: str | None = None,
        *,
        return_sequences: bool = False,
        return_state: bool = False,
        time_major: bool = False,
        stateful: bool = False,
        go_backwards: bool = False,
        bidirectional: bool = False,
        algorithm: str = "auto",
        checkpoint_steps: int | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        if bidirectional and (stateful or go_backwards):
            found = "stateful" if stateful else "go_backwards"
            raise ValueError(
                f"{found}: a bidirectional layer already runs from both ends of each sequence; leave out {found} or "
                "bidirectional"
            )
        self.return_sequences, self.return_state = return_sequences, return_state
        self.time_major, self.stateful = time_major, stateful
        self.go_backwards, self.bidirectional = go_backwards, bidirectional
        arguments = (input_size, memory_d, order, theta, hidden_cell, hidden_size, hidden_act)
        self.cell = LMUCell(*arguments, **kwargs)
        if bidirectional and holds_module(hidden_cell):
            raise ValueError(
                "hidden_cell: a bidirectional layer needs one cell per direction and cannot share this module; name the "
                "cell instead, with register_hidden_cell if it is your own"
            )
        self.backward_cell = LMUCell(*arguments, **kwargs) if bidirectional else None
        self._state: LMUState | None = None
        self.algorithm = algorithm
        self.checkpoint_steps = checkpoint_steps

    @property
    def checkpoint_steps(self) -> int | None:
        """Time steps between the states that training keeps; None where it keeps everything."""
        return self._checkpoint_steps

    @checkpoint_steps.setter
    def checkpoint_steps(self, steps: int | None) -> None:
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"checkpoint_steps: expected a whole number of time steps >= 1 or None, found {steps!r}")
        self._checkpoint_steps = steps

    @property
    def algorithm(self) -> str:
        """The algorithm of the memory; "auto" chooses by the sizes."""
        return self._algorithm

    @algorithm.setter
    def algorithm(self, name: str) -> None:
        known = ["auto", *ALGORITHMS, "lookahead", "merged"]
        if name not in known:
            raise ValueError(f"algorithm: expected one of {known}, found {name!r}")
        if name == "lookahead" and not self.cell.coupled:
            raise ValueError(
                "algorithm: 'lookahead' is for hidden_to_memory or memory_to_memory; without them the memory's input is known "
                "in advance, so use 'chunked', 'fft' or 'auto'"
            )
        if name == "merged" and not (self.cell.hidden_to_memory or self._hidden_is_recurrent):
            raise ValueError(
                "algorithm: 'merged' runs memory and hidden state step by step, but here all steps can be computed at once; use "
                "'auto'"
            )
        if name in ("chunked", "fft", "final", "scan") and self.cell.coupled:
            raise ValueError(
                f"algorithm: {name!r} needs a memory whose input is known in advance, but hidden_to_memory or "
                "memory_to_memory feed the state back into it; use 'auto', 'lookahead' or 'naive'"
            )
        if name == "final" and (self.return_sequences or self._hidden_is_recurrent):
            reason = "return_sequences=True" if self.return_sequences else "a recurrent hidden cell"
            raise ValueError(f"algorithm: 'final' gives the last memory state only, but {reason} needs all; use 'auto'")
        self._algorithm = name

    @property
    def output_size(self) -> int:
        """Number of output features; both directions together."""
        return self.cell.output_size * (2 if self.bidirectional else 1)

    @property
    def _hidden_is_recurrent(self) -> bool:
        return self.cell.hidden_cell is not None and is_recurrent(self.cell.hidden_cell)

    def reset_state(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Forgets the state of a stateful layer, of all rows or of the given ones (an index or boolean tensor or list)."""
        if self._state is None:
            return
        if rows is None:
            self._state = None
        else:
            forget_(self._state.tensors(), rows)

    def reset_parameters(self) -> None:
        """Initialises all weights anew."""
        self.cell.reset_parameters()
        if self.backward_cell is not None:
            self.backward_cell.reset_parameters()

    def regularization_loss(self) -> Tensor:
        """The sum of the regularizers' penalties, a scalar; add it to the loss."""
        loss = self.cell.regularization_loss()
        return loss if self.backward_cell is None else loss + self.backward_cell.regularization_loss()

    def reconstruct(self, memory: Tensor, lags: Tensor | Sequence[float] | None = None) -> Tensor:
        """Reads the remembered window back; see :meth:`LMUCell.reconstruct`."""
        return self.cell.reconstruct(memory, lags)

    def forward(
        self,
        x: Tensor,
        initial_state: LMUState | BidirectionalState | Sequence[Any] | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LMUState | BidirectionalState]:
        """Runs the layer over a batch of sequences.

        Padding is exact: whatever it holds and wherever it lies, each row's outputs and final state are those of the row
        alone. Outputs at padded steps are zero.

        Args:
            x: inputs (batch, time, input_size), or (time, batch, input_size) if time_major.
            initial_state: the state to start from: an LMUState, its tensors [m, hidden states...], or a pair of these if
                bidirectional. Zeros, or the kept state of a stateful layer, when None.
            mask: non-zero where a step is valid, (batch, time), or (time, batch) if time_major.
            lengths: number of valid steps per row (batch,), for padding at the end; instead of ``mask``.

        Returns:
            The output of the last valid step (batch, output_size), or with return_sequences of every step (batch, time,
            output_size), time first if time_major; with return_state also the state after each row's last valid step.

        Raises:
            ValueError: a shape is wrong, or both mask and lengths are given.
        """
        features = self.cell.input_size
        if x.ndim != 3 or x.shape[-1] != features or x.shape[0] == 0 or x.shape[1] == 0:
            axes = "time, batch" if self.time_major else "batch, time"
            raise ValueError(
                f"x: expected ({axes}, input_size={features}) with at least one row and one time step, found "
                f"{tuple(x.shape)}"
            )
        if mask is not None and lengths is not None:
            raise ValueError("mask: expected mask or lengths, found both; leave one out")
        if not x.is_floating_point():
            raise ValueError(f"x: expected floating point numbers, found {x.dtype}; use x.float()")
        if mask is not None:
            mask = torch.as_tensor(mask, device=x.device)
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask: expected {tuple(x.shape[:2])} like the first axes of x, found {tuple(mask.shape)}")
        if self.time_major:
            x, mask = x.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
        packing = None if mask is None else pack(mask)
        if packing is not None:
            x, lengths = to_front(x, packing), packing.lengths
        elif lengths is not None:
            lengths = check_lengths(lengths, x.shape[0], x.shape[1], x.device)
            x = blank(x, lengths)

        wanted = {"return_sequences": self.return_sequences, "return_state": self.return_state}
        output, state = self.run(x, initial_state, lengths, **wanted)
        if self.return_sequences:
            output = output if packing is None else to_place(output, packing)
            output = output.transpose(0, 1) if self.time_major else output
        return (output, state) if self.return_state else output

    def run(
        self,
        x: Tensor,
        initial_state: Any = None,
        lengths: Tensor | None = None,
        *,
        return_sequences: bool = True,
        return_state: bool = True,
    ) -> tuple[Tensor, Any]:
        """The layer without the checks and the reordering of :meth:`forward`, for callers that pack once for many layers.

        Args:
            x: inputs (batch, time, input_size); the valid steps of each row come first and zeros follow.
            initial_state: as in :meth:`forward`.
            lengths: number of valid steps per row (batch,), or None for all.
            return_sequences: return the outputs of all steps rather than the last valid one.
            return_state: the state is wanted.

        Returns:
            The outputs, zero past a row's length, and the state, an LMUState or a BidirectionalState. Of no use without
            ``return_state``.
        """
        if self.backward_cell is not None:
            starts = (None, None) if initial_state is None else initial_state
            backwards = reverse(x, lengths)
            wanted = (return_sequences, return_state)
            forward, forward_state = self._run(self.cell, x, starts[0], lengths, *wanted)
            backward, backward_state = self._run(self.backward_cell, backwards, starts[1], lengths, *wanted)
            if return_sequences:
                backward = reverse(backward, lengths)
            return torch.cat([forward, backward], dim=-1), BidirectionalState(forward_state, backward_state)
        if initial_state is None and self.stateful:
            initial_state = self._state
            if initial_state is not None and initial_state.memory.shape[0] != x.shape[0]:
                raise ValueError(
                    f"x: expected the {initial_state.memory.shape[0]} rows whose state this stateful layer keeps, found "
                    f"{x.shape[0]}; call reset_state() before a batch of another size"
                )
        x = reverse(x, lengths) if self.go_backwards else x
        output, state = self._run(self.cell, x, initial_state, lengths, return_sequences, return_state or self.stateful)
        if self.stateful:
            # Detached: a gradient never runs past the call that it belongs to. Ordinary tensors, since training may follow
            # a call under inference_mode.
            with torch.inference_mode(False):
                self._state = LMUState.of(tuple(t.detach().clone() for t in state.tensors()))
        return output, state

    def _run(
        self,
        cell: LMUCell,
        x: Tensor,
        initial_state: Any,
        lengths: Tensor | None,
        return_sequences: bool,
        return_state: bool,
    ) -> tuple[Tensor, Any]:
        """Runs one direction over rows whose valid steps come first."""
        state = cell.check_state(initial_state, x)
        dropout = cell.sample_dropout(x)
        steps = x.shape[1] if self.checkpoint_steps is None else self.checkpoint_steps
        whole = x.shape[1] <= steps or not torch.is_grad_enabled()
        compiling = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        unrolls = compiling and self.algorithm != "naive" and x.shape[1] > 1 and (cell.coupled or self._hidden_is_recurrent)
        # A segment starts from the state of the one before.
        run = partial(self._run_at_once, cell, dropout, return_sequences, return_state or not whole)
        if unrolls:
            from .uncompiled import run_uncompiled

            run = partial(run_uncompiled, run)
        if whole:
            return run(x, state, lengths, initial_state is None)
        return in_segments(run, x, state, lengths, steps, return_sequence=return_sequences)

    def _run_at_once(
        self,
        cell: LMUCell,
        dropout: Dropout,
        return_sequences: bool,
        return_state: bool,
        x: Tensor,
        state: LMUState,
        lengths: Tensor | None,
        at_rest: bool = False,
    ) -> tuple[Tensor, Any]:
        """Runs one direction, planned as a whole; ``at_rest`` says that the state is known to be zero. Where the state is not
        wanted and takes computing, it is None."""
        system = cell.system()
        one_by_one = self.algorithm == "naive" or (self.algorithm == "auto" and x.shape[1] == 1)
        weights = None if one_by_one else gate_weights(cell.hidden_cell)
        trains_memory = wants_gradient(x, state.memory, *cell.parameters(recurse=False))
        plan = make_plan(
            cell,
            self.algorithm,
            x.shape[0],
            x.shape[1],
            weights,
            dropout,
            return_sequences=return_sequences,
            training=trains_memory or wants_gradient(*state.tensors(), *cell.parameters()),
            trains_memory=trains_memory,
            like=x,
            at_rest=at_rest,
        )
        sequence: Any = {"return_sequence": return_sequences}
        if self.algorithm == "naive" or (plan.memory == "naive" and (cell.coupled or self._hidden_is_recurrent)):
            return naive_recurrence(cell, x, state, lengths, system, dropout, **sequence)
        wanted = {**sequence, "return_state": return_state}
        if plan.memory == "merged":
            assert weights is not None
            return merged_recurrence(cell, weights, x, state, lengths, system, dropout, **wanted)
        if plan.memory in ("lookahead", "relaxed"):
            assert weights is not None
            recurrence = lookahead_recurrence if plan.memory == "lookahead" else relaxed_recurrence
            return recurrence(cell, weights, x, state, lengths, system, dropout, plan.chunk, **wanted)
        last = plan.memory == "final" and at_rest and encodes_last(cell, system)
        if cell.memory_to_memory:
            u = lookahead_input(cell, x, state.memory, system, dropout, training=trains_memory)
        else:
            u = x if last else cell.encode(x, dropout=dropout)
        if plan.memory == "convolved":
            assert weights is not None
            return convolved_recurrence(cell, weights, x, u, state, lengths, system, **wanted)
        if plan.memory in ("folded", "written"):
            assert weights is not None
            folds = plan.memory == "folded"
            return uncoupled_recurrence(cell, weights, x, u, state, lengths, system, plan.chunk, folds=folds, **wanted)
        # None rather than zeros where there is no state: its response need not be computed.
        start = None if at_rest else state.memory
        hidden_cell = cell.hidden_cell
        all_states = return_sequences or self._hidden_is_recurrent
        if last:
            memory, final_memory = None, encoded_last(cell, x, system, lengths, dropout)
        else:
            memory, final_memory = linear_memory(
                u, system, start, lengths, return_sequence=all_states, algorithm=plan.memory
            )
        if memory is None:
            z = cell.hidden_input(final_memory, last_valid(x, lengths))
            output, hidden = (z, ()) if hidden_cell is None else hidden_cell(z, state.hidden)
            if lengths is not None:
                # A row without a valid step has no output, and keeps its state.
                output = output.masked_fill((lengths == 0)[:, None], 0)
        elif hidden_cell is not None and self._hidden_is_recurrent:
            z = cell.hidden_input(memory, x)
            if weights is None:
                output, hidden = naive_scan(hidden_cell, z, state.hidden, lengths, **sequence)
            else:
                base = nn.functional.linear(z, weights.input_weight.mT, weights.bias)
                output, hidden = gated_scan(weights, base, state.hidden, lengths, **sequence)
            return output, LMUState(final_memory, hidden)
        else:
            z = cell.hidden_input(memory, x)
            output, hidden = (z, ()) if hidden_cell is None else hidden_cell(z, state.hidden)
            output = blank(output, lengths)
            hidden = tuple(last_valid(tensor, lengths) for tensor in hidden)
        hidden = tuple(where_started(new, old, lengths) for new, old in zip(hidden, state.hidden, strict=True))
        return output, LMUState(final_memory, hidden)

    def explain(self, batch: int, steps: int, *, return_sequences: bool | None = None, training: bool | None = None) -> Plan:
        """How a call with inputs of this size is computed, and why.

        Args:
            batch: number of rows.
            steps: number of time steps.
            return_sequences: all outputs are wanted; as the layer says when None.
            training: with gradients and dropout; as the layer's mode when None.

        Raises:
            ValueError: the algorithm that the layer names cannot run it, or a number is not positive.
        """
        if batch < 1 or steps < 1:
            raise ValueError(f"explain: expected at least one row and one step, found batch={batch}, steps={steps}")
        cell = self.cell
        training = self.training if training is None else training
        at_rest = self._state is None
        if training and self.checkpoint_steps is not None and steps > self.checkpoint_steps:
            steps, at_rest = self.checkpoint_steps, False
        like = a_weight(cell)
        rates = (cell.dropout, cell.recurrent_dropout)
        dropout = Dropout(*(like if training and rate else None for rate in rates))
        weights = None if self.algorithm == "naive" else gate_weights(cell.hidden_cell)
        every = self.return_sequences if return_sequences is None else return_sequences
        return make_plan(
            cell,
            self.algorithm,
            batch,
            steps,
            weights,
            dropout,
            return_sequences=every,
            training=training,
            trains_memory=training,
            like=like,
            at_rest=at_rest,
        )

    def stepper(self, batch_size: int = 1) -> LMUStepper:
        """Streams of samples through this layer, one step at a time, with the weights as they are now.

        Args:
            batch_size: number of streams.

        Raises:
            ValueError: the layer needs the end of a sequence first, or ``batch_size`` is not positive.
        """
        if self.bidirectional or self.go_backwards:
            found = "bidirectional" if self.bidirectional else "go_backwards"
            raise ValueError(
                f"stepper: a layer with {found}=True begins at the end of a sequence and cannot follow a stream"
            )
        return LMUStepper(self.cell, batch_size)

    def extra_repr(self) -> str:
        names = ("return_sequences", "return_state", "time_major", "stateful", "go_backwards", "bidirectional")
        return ", ".join(name for name in names if getattr(self, name))
