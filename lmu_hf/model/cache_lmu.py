"""The recurrent state of a model as the cache that ``generate`` and streaming carry.

Its size does not depend on the number of steps seen. What transformers' own caches offer for attention layers is offered here
for the state: beams reorder it, rows are selected and repeated, it moves between devices and is saved as plain tensors.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from .ragged import where_started
from .state import LMUState


class LMUCache(Cache):
    """What an LMU model has to remember of the steps before: passed in and out as ``past_key_values``.

    A model updates the cache that it is given in place. In rows where a call has no valid step nothing changes.

    Args:
        num_layers: layers of the model.

    Attributes:
        states: state of each layer, :class:`LMUState`; None before the first step.
        output: the model's output at each row's last valid step (batch, output_size), zeros in rows without one.
        pooled: the running mean or maximum of the outputs (batch, output_size), for models that pool in this way.
        count: valid steps per row (batch,), int64.
    """

    def __init__(self, num_layers: int):
        super().__init__(layers=[])
        self.states: list[LMUState | None] = [None] * num_layers
        self.output: Tensor | None = None
        self.pooled: Tensor | None = None
        self.count: Tensor | None = None
        # A tensor, so that an exported step can count; one entry per layer, so that its shape tells their number.
        self._seen = torch.zeros(num_layers, dtype=torch.int64, device="cpu")

    @property
    def seen(self) -> int:
        """Steps that went through the model, padding included."""
        return int(self._seen[0])

    def advance(self, pooling: str, pooled: Tensor, last: Tensor, lengths: Tensor | None, steps: int) -> Tensor:
        """Takes in one call's outputs; the model calls it.

        Args:
            pooling: "last", "mean" or "max".
            pooled: outputs of this call, pooled (batch, output_size); zeros in rows without a valid step.
            last: output of each row's last valid step in this call (batch, output_size).
            lengths: valid steps per row in this call (batch,), or None for all.
            steps: steps of this call.

        Returns:
            The outputs since the beginning, pooled (batch, output_size).
        """
        batch = last.shape[0]
        added = torch.full((batch,), steps, device=last.device) if lengths is None else lengths
        before = torch.zeros_like(added) if self.count is None else self.count
        self.count = before + added
        self._seen = self._seen + steps
        self.output = last if self.output is None else where_started(last, self.output, lengths)
        if pooling == "last":
            return self.output
        if self.pooled is not None:
            if pooling == "mean":
                # A running mean rather than a sum: it stays in range however long the stream is.
                share = (added.to(pooled.dtype) / self.count.clamp(min=1))[:, None]
                pooled = self.pooled + share * (pooled - self.pooled)
            else:
                both = torch.maximum(self.pooled, pooled)
                pooled = torch.where((added > 0)[:, None], torch.where((before > 0)[:, None], both, pooled), self.pooled)
        self.pooled = pooled
        return pooled

    def check_batch(self, batch: int) -> None:
        """Raises ValueError if the cache belongs to another number of rows."""
        if self.batch_size not in (-1, batch):
            raise ValueError(
                f"past_key_values: expected {self.batch_size} rows, those of the calls before, found {batch}; start the next "
                "batch with a new cache, or select rows with batch_select_indices"
            )

    @property
    def batch_size(self) -> int:
        """Number of rows; -1 before the first step."""
        return -1 if self.count is None else self.count.shape[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Steps that went through the model, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers 5

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of an attention mask over all steps."""
        return self.seen + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a step went through the model."""
        return self.seen > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[LMUState | None]:
        return iter(self.states)

    def __repr__(self) -> str:
        return f"LMUCache(layers={len(self)}, rows={self.batch_size}, seen={self.seen})"

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("an LMUCache holds recurrent states, not keys and values; see LMUCache.states")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot forget its newest steps.

        Raises:
            NotImplementedError: something is to be removed.
        """
        if tokens_to_remove:
            raise NotImplementedError(
                "crop: a recurrent state cannot be taken back to an earlier step; keep a copy() of the cache from there"
            )

    def activate_past_recording(self) -> None:
        raise NotImplementedError("an LMUCache cannot be rolled back, so it serves no assistant model")

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Forgets everything, in all rows or in the given ones (an index or boolean tensor or list).

        The steps seen are counted for the batch as a whole and go on where only some rows are reset.

        Raises:
            ValueError: ``rows`` are neither whole numbers nor booleans, or there is no such row.
        """
        if rows is None:
            self.__init__(len(self))  # type: ignore[misc]
            return
        index = torch.as_tensor(rows)
        if index.is_floating_point() or index.is_complex():
            raise ValueError(f"rows: expected row numbers or a boolean per row, found {rows!r}")
        if self.count is None or index.numel() == 0:
            return
        batch = self.batch_size
        kept = torch.ones(batch, dtype=torch.bool)
        wrong = index.shape != (batch,) if index.dtype == torch.bool else bool(((index < -batch) | (index >= batch)).any())
        if wrong:
            raise ValueError(f"rows: expected row numbers below {batch} or {batch} booleans, found {rows!r}")
        kept[index.cpu()] = False
        # Not in place: a copy shares the tensors, and a gradient may need them.
        self._apply(lambda t: torch.where(kept.to(t.device).view(-1, *[1] * (t.ndim - 1)), t, torch.zeros_like(t)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows ``beam_idx`` (batch,) in that order, as beam search asks."""
        self._apply(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        self._apply(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows only."""
        self._apply(lambda t: t[indices.to(t.device)])

    def copy(self) -> "LMUCache":
        """A cache that goes its own way from here. It shares the tensors, none of which is ever written to."""
        other = copy.copy(self)
        other.states = list(self.states)
        return other

    def to(self, device: torch.device | str) -> "LMUCache":
        """Moves the state to a device. Returns itself."""
        self._apply(lambda t: t.to(device))
        return self

    def detach_(self) -> "LMUCache":
        """Cuts the state off from the graph that made it, as truncated backpropagation through time does. Returns itself."""
        self._apply(torch.Tensor.detach)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as a flat dictionary of tensors, for ``torch.save`` or safetensors."""
        tensors = {name: value for name in ("output", "pooled", "count") if (value := getattr(self, name)) is not None}
        for index, state in enumerate(self.states):
            if state is not None:
                tensors |= {f"layers.{index}.{part}": tensor for part, tensor in enumerate(state.tensors())}
        return {"seen": self._seen, **tensors}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> "LMUCache":
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: the dictionary is not one of a cache.
        """
        if "seen" not in tensors:
            raise ValueError(f"tensors: expected the state_dict of an LMUCache, found the names {sorted(tensors)[:5]}")
        return cls._of(len(tensors["seen"]), {**tensors, "seen": tensors["seen"].to("cpu")})

    @classmethod
    def _of(cls, layers: int, tensors: Mapping[str, Tensor]) -> "LMUCache":
        cache = cls(layers)
        cache._seen = tensors["seen"]
        cache.output, cache.pooled, cache.count = (tensors.get(name) for name in ("output", "pooled", "count"))
        for index in range(layers):
            parts = [name for name in tensors if name.startswith(f"layers.{index}.")]
            if parts:
                cache.states[index] = LMUState.of(tuple(tensors[f"layers.{index}.{part}"] for part in range(len(parts))))
        return cache

    def _apply(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [None if state is None else LMUState.of(tuple(map(change, state.tensors()))) for state in self.states]
        for name in ("output", "pooled", "count"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, change(value))


def _flatten(cache: LMUCache) -> tuple[list[Tensor], list]:
    tensors = cache.state_dict()
    return list(tensors.values()), [len(cache), list(tensors)]


def _flatten_with_keys(cache: LMUCache) -> tuple[list, list]:
    tensors, context = _flatten(cache)
    return [(pytree.MappingKey(name), tensor) for name, tensor in zip(context[1], tensors, strict=True)], context


def _unflatten(tensors: Iterable[Tensor], context: list) -> LMUCache:
    layers, names = context
    return LMUCache._of(layers, dict(zip(names, tensors, strict=True)))


# So that exported programs take and give caches.
pytree.register_pytree_node(
    LMUCache,
    _flatten,
    _unflatten,
    serialized_type_name=f"{LMUCache.__module__}.{LMUCache.__name__}",
    flatten_with_keys_fn=_flatten_with_keys,
)
# Such a program holds an example of its inputs, which torch.load reads without running code only if it knows their classes.
torch.serialization.add_safe_globals([LMUCache, LMUState])


def valid_steps(attention_mask: Tensor | None, batch: int, steps: int, cache: LMUCache | None = None) -> Tensor | None:
    """The mask of a call's own steps (batch, steps), bool, or None if all are valid.

    Args:
        attention_mask: non-zero where a step is valid (batch, steps), or (batch, seen + steps) with the steps of the calls
            before; None if all are.
        batch: rows of the call.
        steps: steps of the call.
        cache: what the call goes on from.

    Raises:
        ValueError: the mask has another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, steps):
        # Asked for only here: in an exported step the number of steps seen is not known.
        whole = None if cache is None else (batch, cache.seen + steps)
        if attention_mask.shape != whole:
            or_all = f" or, with the steps before, {whole}" if whole is not None else ""
            raise ValueError(
                f"attention_mask: expected (batch, time)={(batch, steps)}{or_all}, found {tuple(attention_mask.shape)}"
            )
    mask = attention_mask[:, -steps:].to(torch.bool)
    # Most batches of equal lengths come with a mask of ones; looking is cheaper than moving every row onto itself.
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def own_mask(attention_mask: Tensor | None, cache: LMUCache | None, *inputs: Tensor | None) -> Tensor | None:
    """:func:`valid_steps` of the first of the inputs that is given; None for the model to say what is wrong with them."""
    given = next((value for value in inputs if value is not None and value.ndim > 1), None)
    if cache is not None and not hasattr(cache, "advance"):
        return None  # the model refuses another kind of cache, whatever the mask
    return None if given is None else valid_steps(attention_mask, given.shape[0], given.shape[1], cache)
