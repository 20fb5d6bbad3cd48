"""Rows of different lengths: moves the valid steps of every row to its front and back again.

With the padding behind the last valid step nothing that runs forward in time can see it, so one rule, "stop at the
length", makes every algorithm exact for padding on the left, on the right and in between.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled import zeros


class Packing(NamedTuple):
    """Where the valid steps of a padded batch lie.

    Attributes:
        lengths: number of valid steps per row (B,), int64.
        order: for each packed position the step it comes from (B, T): the valid steps in time order, then the others.
        rank: for each step its packed position (B, T), the inverse of ``order``.
        mask: validity of each step (B, T), bool.
    """

    lengths: Tensor
    order: Tensor
    rank: Tensor
    mask: Tensor


def pack(mask: Tensor) -> Packing:
    """Finds the packing of a mask (B, T), non-zero where a step is valid."""
    valid = mask.to(torch.bool)
    order = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)
    return Packing(valid.sum(1), order, torch.argsort(order, dim=1), valid)


def check_lengths(lengths: Any, batch: int, steps: int, device: torch.device) -> Tensor:
    """Returns ``lengths`` as an int64 tensor (batch,) on ``device``.

    Raises:
        ValueError: there is not one whole number within 0 .. steps per row.
    """
    checked = torch.as_tensor(lengths, device=device)
    if checked.shape != (batch,) or checked.is_floating_point() or checked.is_complex() or checked.dtype == torch.bool:
        raise ValueError(
            f"lengths: expected one whole number per row ({batch},), found shape {tuple(checked.shape)} of {checked.dtype}"
        )
    if not torch.compiler.is_compiling() and batch and not bool(((checked >= 0) & (checked <= steps)).all()):
        raise ValueError(f"lengths: expected values within 0..{steps}, the number of steps, found {checked.tolist()}")
    return checked.to(torch.int64)


def to_front(x: Tensor, packing: Packing) -> Tensor:
    """(B, T, ...) with the valid steps of each row first and zeros after them; padding is not read, NaN included."""
    return blank(_take(x, packing.order), packing.lengths)


def past(lengths: Tensor, steps: int) -> Tensor:
    """(B, T), True at the steps past a row's length."""
    return torch.arange(steps, device=lengths.device) >= lengths[:, None]


def blank(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, T, ...) with zeros past each row's length. Fills rather than multiplies: padding may hold NaN."""
    if lengths is None:
        return x
    return x.masked_fill(_like(past(lengths, x.shape[1]), x), 0)


def to_place(x: Tensor, packing: Packing) -> Tensor:
    """Undoes :func:`to_front`: every valid step where it came from, zeros at the padding."""
    moved = _take(x, packing.rank)
    return moved.masked_fill(_like(~packing.mask, moved), 0)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverses the first ``lengths`` steps of each row of (B, T, ...); the rest stays. All steps when None."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    return _take(x, torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps))


def to_end(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Moves the first ``lengths`` steps of each row of (B, T, ...) behind the others. As they lie when None."""
    if lengths is None:
        return x
    steps = torch.arange(x.shape[1], device=x.device)
    return _take(x, (steps + lengths[:, None]) % x.shape[1])


def last_valid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last valid step of each row of (B, T, ...) -> (B, ...); zeros for a row without any.

    A copy: whoever keeps a state must not keep the sequence that it is the end of.
    """
    if lengths is None:
        return x[:, -1].clone()
    last = _take(x, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    return last.masked_fill(_like(lengths == 0, last), 0)


def hold(x: Tensor, mask: Tensor, before: Tensor | None = None) -> Tensor:
    """(B, T, F) where each padded step repeats the last valid one before it, or ``before`` (B, F), zeros when None."""
    last = torch.where(mask, torch.arange(x.shape[1], device=x.device), -1).cummax(1).values
    held = _take(x, last.clamp(min=0))
    start = torch.zeros_like(held[:, :1]) if before is None else before[:, None].to(held.dtype)
    return torch.where(_like(last >= 0, held), held, start)


def where_started(after: Tensor, before: Tensor, lengths: Tensor | None) -> Tensor:
    """``after`` (B, ...), but ``before`` in rows without a valid step, whose state no step has changed."""
    if lengths is None:
        return after
    return torch.where(_like(lengths > 0, after), after, before.to(after.dtype))


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _like(index, x).expand(-1, -1, *x.shape[2:]))


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (x.ndim - values.ndim))


class _AtStep(torch.autograd.Function):
    """One step of each row: (B, T, H), (B,) -> (B, H). Its gradient, which has all steps, is made of memory that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor) -> Tensor:
        ctx.save_for_backward(steps)
        ctx.shape = x.shape
        return x[torch.arange(len(x), device=x.device), steps]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (steps,) = ctx.saved_tensors
        total = zeros(grad, *ctx.shape)
        return total.index_put_((torch.arange(len(steps), device=steps.device), steps), grad), None


class Trajectory(NamedTuple):
    """The state tensors of a run.

    Attributes:
        each: after each step (B, T, H).
        last: after the last step (B, H), so that a gradient that reaches only these need not be filled up to one of all steps;
            none where they are not wanted.
    """

    each: tuple[Tensor, ...]
    last: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], last: int) -> "Trajectory":
        """From a list that ends with so many tensors of the last step."""
        cut = len(tensors) - last
        return cls(tuple(tensors[:cut]), tuple(tensors[cut:]))

    @staticmethod
    def wants_last(lengths: Tensor | None, return_sequence: bool, return_state: bool) -> bool:
        """Whether such a run needs the states after the last step by themselves. Each result costs some microseconds."""
        return lengths is None and (return_state or not return_sequence)

    def end(self, index: int, lengths: Tensor | None) -> Tensor:
        """The state tensor with this index (B, H) after each row's last valid step; zeros for a row without any."""
        if lengths is None:
            return self.last[index]
        last = _AtStep.apply(self.each[index], (lengths - 1).clamp(min=0))
        return last.masked_fill((lengths == 0)[:, None], 0)

    def output(self, lengths: Tensor | None, return_sequence: bool) -> Tensor:
        """The first state, as the output of a cell: of all steps, or of each row's last one (B, H)."""
        return blank(self.each[0], lengths) if return_sequence else self.end(0, lengths)

    def final(self, before: tuple[Tensor, ...], lengths: Tensor | None) -> tuple[Tensor, ...]:
        """Each state (B, H) after a row's last step, or ``before`` the first of a row without any; in the dtype of those."""
        pairs = ((self.end(index, lengths), old) for index, old in enumerate(before))
        return tuple(where_started(new, old, lengths).to(old.dtype) for new, old in pairs)
