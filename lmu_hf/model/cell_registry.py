"""Hidden cells by name: from the specification of a hidden cell to the module, checked against the layer's sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .cells import DenseCell, GRUCell, LSTMCell, ReadoutCell, RNNCell, StackedCell, TorchCell

HiddenCellSpec = str | Mapping[str, Any] | nn.Module | Sequence[Any] | None

_BUILTIN = ("rnn", "lstm", "gru", "dense", "readout")

_REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "rnn": RNNCell,
    "lstm": LSTMCell,
    "gru": GRUCell,
    "dense": DenseCell,
}


def register_hidden_cell(name: str, factory: Callable[..., nn.Module] | None = None) -> Any:
    """Makes a hidden cell nameable: ``LMU(..., hidden_cell=name)`` and ``LMUConfig(hidden_cell=name)``.

    Args:
        name: the name.
        factory: called as ``factory(input_size, hidden_size, **options)``, where the options are those of the
            specification (``{"name": ..., **options}``) and ``activation`` if ``hidden_act`` is set; returns a module that
            follows the protocol of ``cells.py``. Leave it out to use the function as a class decorator.

    Raises:
        ValueError: the name is taken by a built-in cell.
    """
    if name in _BUILTIN:
        raise ValueError(f"hidden_cell: the name {name!r} belongs to a built-in cell; choose another")

    def register(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        _REGISTRY[name] = factory
        return factory

    return register if factory is None else register(factory)


def hidden_cell_names() -> list[str]:
    """The names that a specification may use."""
    return sorted([*_REGISTRY, "readout"])


def holds_module(spec: HiddenCellSpec) -> bool:
    """Whether a specification holds a module, which can be part of one layer only."""
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return any(holds_module(part) for part in spec)
    return isinstance(spec, nn.Module)


def build_hidden_cell(
    spec: HiddenCellSpec,
    *,
    memory_d: int,
    order: int,
    input_size: int,
    input_to_hidden: bool,
    hidden_size: int | None = None,
    hidden_act: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """Builds a hidden cell from its specification.

    Args:
        spec: None, a name, ``{"name": ..., "hidden_size": ..., "activation": ..., **options}``, a torch cell or nn.Linear,
            a module that follows the protocol, or a sequence of these (a stack).
        memory_d: memory dimensions D.
        order: Legendre polynomials N.
        input_size: features of x.
        input_to_hidden: x is appended to the memory in ``z``.
        hidden_size: units, where the specification does not say.
        hidden_act: name of the activation, where the specification does not say; None for the cell's own default.
        device: of the weights of named cells.
        dtype: of the weights of named cells.

    Returns:
        A module following the protocol, or None.

    Raises:
        ValueError: the specification is unknown, incomplete, or does not fit the sizes.
    """
    factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
    blocks = {"memory": memory_d * order, "input": input_size if input_to_hidden else 0}

    def build(spec: Any, blocks: Mapping[str, int], default_size: int | None) -> nn.Module:
        cell = build_one(spec, blocks, default_size)
        cell.is_hidden_cell = True  # type: ignore[assignment]  # tells a model which modules to initialise as cells
        return cell

    def build_one(spec: Any, blocks: Mapping[str, int], default_size: int | None) -> nn.Module:
        if isinstance(spec, nn.Module):
            cell = _adopt(spec, sum(blocks.values()))
            if hidden_act is not None or default_size not in (None, cell.output_size):
                found = f"hidden_act={hidden_act!r}" if hidden_act is not None else f"hidden_size={default_size}"
                raise ValueError(f"hidden_cell: a module brings its own size and activation, found {found}; leave it out")
            return cell
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping) or "name" not in spec:
            raise ValueError(
                f"hidden_cell: expected None, a name of {hidden_cell_names()}, a mapping with 'name', a torch module or a "
                f"list of these, found {spec!r}"
            )
        options = {key: value for key, value in spec.items() if key != "name"}
        name = spec["name"]
        size = options.pop("hidden_size", default_size)
        if hidden_act is not None:
            options.setdefault("activation", hidden_act)
        try:
            if name == "readout":
                return _build_readout(options, blocks, size)
            if name not in _REGISTRY:
                raise ValueError(
                    f"hidden_cell: expected one of {hidden_cell_names()}, found {name!r}; a cell of your own is made known "
                    "by register_hidden_cell"
                )
            if size is None:
                raise ValueError(f"hidden_size: expected a whole number >= 1 for hidden_cell={name!r}, found None")
            if name in _BUILTIN:
                return _REGISTRY[name](sum(blocks.values()), size, blocks=blocks, **options, **factory_kwargs)
            return _adopt(_REGISTRY[name](sum(blocks.values()), size, **options), sum(blocks.values()))
        except TypeError as error:
            # An option that the cell does not take; the constructor's own message names it.
            raise ValueError(f"hidden_cell: {name!r} could not be built: {error}") from error

    def _build_readout(options: dict[str, Any], blocks: Mapping[str, int], size: int | None) -> nn.Module:
        if blocks.get("memory") != memory_d * order:
            raise ValueError("hidden_cell: a readout reads the memory and can only be the first cell of a stack")
        if size not in (None, memory_d):
            raise ValueError(
                f"hidden_size: a readout has one output per memory dimension, expected {memory_d} or None, found {size}"
            )
        skip = options.pop("skip", None)
        if skip is None:
            # The term needs one input per memory dimension; where x is something else there is nothing to add.
            skip = input_to_hidden or input_size == memory_d
        if skip and input_size != memory_d:
            raise ValueError(
                "hidden_cell: the term s_d x_d of a readout needs one input per memory dimension; expected input_size="
                f"memory_d={memory_d}, found {input_size}. Leave out input_to_hidden, or use another hidden cell"
            )
        if input_to_hidden and not skip:
            raise ValueError("hidden_cell: input_to_hidden=True contradicts the readout's skip=False; choose one")
        return ReadoutCell(memory_d, order, skip=skip, **options, **factory_kwargs)

    if spec is None:
        return None
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if not spec:
            raise ValueError("hidden_cell: expected at least one cell in the list, found none; use None for no cell")
        cells: list[nn.Module] = []
        for part in spec:
            # hidden_size is for the cells that have a choice.
            default = None if part == "readout" or isinstance(part, nn.Module) else hidden_size
            cells.append(build(part, {"memory": cells[-1].output_size} if cells else blocks, default))  # type: ignore[dict-item]
        return cells[0] if len(cells) == 1 else StackedCell(cells)
    return build(spec, blocks, hidden_size)


def _adopt(module: nn.Module, size: int) -> nn.Module:
    """Checks a module of the caller's against the protocol; wraps torch's own cells."""
    if isinstance(module, nn.RNNCell | nn.LSTMCell | nn.GRUCell | nn.Linear):
        module = TorchCell(module)
    missing = [name for name in ("input_size", "output_size", "state_sizes") if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"hidden_cell: {type(module).__name__} lacks {missing}; a hidden cell is a module with input_size, output_size, "
            "state_sizes and forward(z, state) -> (output, state), see lmu_hf.model.cells"
        )
    if module.input_size != size:
        raise ValueError(
            f"hidden_cell: {type(module).__name__} expects {module.input_size} inputs, but the layer gives it {size} (the "
            "memory, memory_d * order, plus input_size with input_to_hidden)"
        )
    return module
