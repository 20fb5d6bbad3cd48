"""One step of the Legendre Memory Unit (Voelker, Kajic & Eliasmith 2019): all weights, every argument, no time axis."""

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cell_registry import HiddenCellSpec, build_hidden_cell
from .cells import ACTIVATIONS, check_activation, reset_hidden_cell
from .legendre import (
    TIME_ORIGIN,
    DelaySystem,
    check_discretizer,
    check_order,
    check_stability,
    check_theta,
    delay_system,
    relative_delay,
    shifted_legendre,
    smallest_stable_theta,
)
from .memory import memory_step
from .state import Dropout, LMUState
from .weights import Spec, check_initializer, check_regularizer, initialize_, is_loaded, regularization


class LMUCell(nn.Module):
    """One step of the Legendre Memory Unit.

    With inputs x (B, input_size), memory m (B, memory_d, order) and hidden state h, one step computes

        u = encoder_act([x, h] @ kernel + m @ recurrent_kernel + bias)
        m = Ad m + Bd u                                   for every memory dimension
        y, h = hidden_cell([m, x], h)

    where h, m @ recurrent_kernel and the second x take part only if ``hidden_to_memory``, ``memory_to_memory`` and
    ``input_to_hidden`` say so (Voelker et al. 2019, eq. 4-8).

    Args:
        input_size: features of x.
        memory_d: dimensions of the memory's input u, each with a memory of its own.
        order: Legendre polynomials per dimension.
        theta: length of the remembered window in time steps; one number, or one per memory dimension.
        hidden_cell: "rnn", "lstm", "gru", "dense", "readout", a registered name, a mapping with a name and options, a torch
            cell or nn.Linear, a module that follows the protocol of ``cells.py``, or a list of these (a stack). None
            makes [m, x] itself the output.
        hidden_size: units of a named hidden cell.
        hidden_act: activation of a named hidden cell; None for its own default (tanh, linear for "dense" and "readout").
        trainable_theta: train 1 / theta, held at >= 0 (and, under Euler, where the memory is stable).
        hidden_to_memory: feed the hidden cell's output back into u.
        memory_to_memory: feed the whole memory back into u.
        input_to_hidden: give x to the hidden cell beside m.
        discretizer: "zoh" (exact for inputs held over a step) or "euler".
        kernel_initializer: of ``kernel`` (enc_d, memory_d); may be given per block "input", "hidden". None for no kernel,
            which needs as many inputs as memory dimensions.
        recurrent_initializer: of ``recurrent_kernel`` (memory_d * order, memory_d).
        kernel_regularizer: None, "l1", "l2", "l1_l2" or a mapping with a name and factors.
        recurrent_regularizer: the same for ``recurrent_kernel``.
        use_bias: add ``bias`` (memory_d,) to u.
        bias_initializer: of ``bias``.
        bias_regularizer: of ``bias``.
        dropout: rate at which the encoder's inputs are dropped in training, one mask per sequence.
        recurrent_dropout: rate at which m is dropped on its way through ``recurrent_kernel``, one mask per sequence.
        encoder_act: activation of u (Chilkuri & Eliasmith 2021, eq. 18); None for linear, as in 2019.
        allow_unstable: accept an Euler system that diverges.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: an argument is wrong or arguments contradict each other; the message names field, value and remedy.
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
        trainable_theta: bool = False,
        hidden_to_memory: bool = False,
        memory_to_memory: bool = False,
        input_to_hidden: bool = False,
        discretizer: str = "zoh",
        kernel_initializer: Spec | None = "glorot_uniform",
        recurrent_initializer: Spec = "orthogonal",
        kernel_regularizer: Spec | None = None,
        recurrent_regularizer: Spec | None = None,
        use_bias: bool = False,
        bias_initializer: Spec = "zeros",
        bias_regularizer: Spec | None = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        encoder_act: str | None = None,
        allow_unstable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.input_size = input_size = _check_count("input_size", input_size)
        self.memory_d = memory_d = _check_count("memory_d", memory_d)
        self.order = order = check_order(order)
        self.initial_theta = check_theta(theta, memory_d)
        self.discretizer = check_discretizer(discretizer)
        flags = {
            "trainable_theta": trainable_theta,
            "hidden_to_memory": hidden_to_memory,
            "memory_to_memory": memory_to_memory,
            "input_to_hidden": input_to_hidden,
            "use_bias": use_bias,
            "allow_unstable": allow_unstable,
        }
        for field, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{field}: expected True or False, found {flag!r}")
        self.trainable_theta = trainable_theta
        self.hidden_to_memory = hidden_to_memory
        self.memory_to_memory = memory_to_memory
        self.dropout = _check_rate("dropout", dropout)
        self.recurrent_dropout = _check_rate("recurrent_dropout", recurrent_dropout)
        self.encoder_act = check_activation("encoder_act", encoder_act)
        self.allow_unstable = allow_unstable
        if not allow_unstable:
            check_stability(order, self.initial_theta, discretizer)

        self.hidden_cell = build_hidden_cell(
            hidden_cell,
            memory_d=memory_d,
            order=order,
            input_size=input_size,
            input_to_hidden=input_to_hidden,
            hidden_size=hidden_size,
            hidden_act=hidden_act,
            device=device,
            dtype=dtype,
        )
        if self.hidden_cell is None:
            if hidden_to_memory:
                raise ValueError("hidden_to_memory: expected a hidden cell to feed back, found hidden_cell=None; set one")
            for field, value in (("hidden_size", hidden_size), ("hidden_act", hidden_act)):
                if value is not None:
                    raise ValueError(
                        f"{field}: expected None without a hidden cell, found {value!r}; set hidden_cell, for example "
                        "hidden_cell='rnn'"
                    )
        elif hidden_to_memory and not self.state_sizes:
            raise ValueError(
                "hidden_to_memory: the hidden cell keeps no state to feed back; give it state_sizes with its output first"
            )
        # A readout takes x for its term s_d x_d by itself; sizes tell.
        self.input_to_hidden = (
            input_to_hidden if self.hidden_cell is None else self.hidden_cell.input_size != memory_d * order
        )

        self.kernel_initializer, self.recurrent_initializer = kernel_initializer, recurrent_initializer
        self.bias_initializer = bias_initializer
        self.kernel_regularizer, self.recurrent_regularizer = kernel_regularizer, recurrent_regularizer
        self.bias_regularizer = bias_regularizer
        self.encoder_blocks = {"input": input_size, "hidden": self.state_sizes[0] if hidden_to_memory else 0}
        if kernel_initializer is not None:
            check_initializer("kernel_initializer", kernel_initializer, tuple(self.encoder_blocks))
        elif self.encoder_size != memory_d:
            raise ValueError(
                f"kernel_initializer: None feeds {self.encoder_size} inputs straight into the memory and needs memory_d="
                f"{self.encoder_size}, found memory_d={memory_d}; change memory_d or name an initializer"
            )
        check_initializer("recurrent_initializer", recurrent_initializer)
        check_initializer("bias_initializer", bias_initializer)
        for field in ("kernel_regularizer", "recurrent_regularizer", "bias_regularizer"):
            check_regularizer(field, getattr(self, field))

        self._warn_of_settings_without_effect()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.kernel = None if kernel_initializer is None else weight(self.encoder_size, memory_d)
        self.recurrent_kernel = weight(memory_d * order, memory_d) if memory_to_memory else None
        self.bias = weight(memory_d) if use_bias else None
        # 1 / theta is what the matrices are linear in. Kept in float32 or better, as in bfloat16 it has two digits.
        theta_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = (memory_d,) if isinstance(self.initial_theta, tuple) else ()
        self.theta_inv = nn.Parameter(torch.empty(shape, device=device, dtype=theta_dtype)) if trainable_theta else None
        # Looked up once: a compiled forward would otherwise trace the matrix exponential into its graph.
        self._fixed_system = None if trainable_theta else delay_system(order, self.initial_theta, discretizer)
        self.reset_own_parameters()

    def _warn_of_settings_without_effect(self) -> None:
        without = {
            "memory_to_memory=True": [] if self.memory_to_memory else ["recurrent_dropout", "recurrent_regularizer"],
            "a kernel": [] if self.kernel_initializer is not None else ["kernel_regularizer"],
        }
        for needed, names in without.items():
            for name in names:
                if getattr(self, name):
                    warnings.warn(f"{name}={getattr(self, name)!r} has no effect without {needed}", stacklevel=3)

    def reset_own_parameters(self) -> None:
        """Initialises the weights of the cell itself, those of the hidden cell left as they are."""
        if self.kernel is not None:
            assert self.kernel_initializer is not None
            initialize_("kernel_initializer", self.kernel, self.kernel_initializer, self.encoder_blocks, inputs_first=True)
        if self.recurrent_kernel is not None:
            initialize_("recurrent_initializer", self.recurrent_kernel, self.recurrent_initializer, inputs_first=True)
        if self.bias is not None:
            initialize_("bias_initializer", self.bias, self.bias_initializer)
        if self.theta_inv is not None and not is_loaded(self.theta_inv):
            with torch.no_grad():
                theta = torch.tensor(self.initial_theta, dtype=torch.float64, device="cpu")
                self.theta_inv.copy_(1.0 / theta)

    def reset_parameters(self) -> None:
        """Initialises all weights anew, those of the hidden cell included."""
        self.reset_own_parameters()
        if self.hidden_cell is not None:
            reset_hidden_cell(self.hidden_cell)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LMUCell":
        exact = None if self.theta_inv is None else self.theta_inv.detach()
        super()._apply(fn, recurse)
        if (
            self.theta_inv is not None
            and exact is not None
            and self.theta_inv.itemsize < exact.itemsize
            and not exact.is_meta
        ):
            self.theta_inv.data = exact.to(device=self.theta_inv.device, dtype=torch.float32)
        return self

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Sizes of the hidden cell's state tensors."""
        return () if self.hidden_cell is None else tuple(self.hidden_cell.state_sizes)  # type: ignore[arg-type]

    @property
    def encoder_size(self) -> int:
        """Number of features that enter the kernel: input_size, plus the hidden size with hidden_to_memory."""
        return sum(self.encoder_blocks.values())

    @property
    def output_size(self) -> int:
        """Number of output features."""
        if self.hidden_cell is not None:
            return self.hidden_cell.output_size  # type: ignore[return-value]
        return self.memory_d * self.order + (self.input_size if self.input_to_hidden else 0)

    @property
    def coupled(self) -> bool:
        """Whether the memory's input depends on the state, so that time cannot be run in parallel."""
        return self.hidden_to_memory or self.memory_to_memory

    @property
    def theta(self) -> Tensor:
        """Window length in time steps, float64: a scalar, or (memory_d,) for one per dimension."""
        if self.theta_inv is None:
            return torch.tensor(self.initial_theta, dtype=torch.float64)
        return 1.0 / self._admissible_theta_inv().detach().to(torch.float64)

    @property
    def A(self) -> Tensor:
        """Discrete state matrix (order, order), or (memory_d, order, order); float64 on the CPU."""
        return self.system().Ad.detach().squeeze(0).clone()

    @property
    def B(self) -> Tensor:
        """Discrete input vector (order,), or (memory_d, order); float64 on the CPU."""
        return self.system().Bd.detach().squeeze(0).clone()

    def _admissible_theta_inv(self) -> Tensor:
        assert self.theta_inv is not None
        upper = 1.0 / smallest_stable_theta(self.order) if self.discretizer == "euler" and not self.allow_unstable else None
        clamped = self.theta_inv.detach().clamp(min=0.0, max=upper)
        # The gradient passes the bound, so that a value pushed onto it can come back.
        return self.theta_inv + (clamped - self.theta_inv.detach())

    def system(self) -> DelaySystem:
        """The delay system of the present theta. Call it once per forward: a trained theta costs a matrix exponential."""
        if self._fixed_system is not None:
            return self._fixed_system
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return DelaySystem(self._admissible_theta_inv(), self.order, self.discretizer)
        theta = self.theta.tolist()  # kept as long as it does not change, for streams of single steps
        return delay_system(self.order, tuple(theta) if isinstance(theta, list) else theta, self.discretizer)

    def initial_state(self, x: Tensor) -> LMUState:
        """The state before the first step, zeros, for inputs ``x`` (B, ...)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        memory = torch.zeros(x.shape[0], self.memory_d, self.order, device=x.device, dtype=dtype)
        return LMUState(memory, tuple(x.new_zeros(x.shape[0], size) for size in self.state_sizes))

    def check_state(self, state: Any, x: Tensor) -> LMUState:
        """Returns ``state`` as an LMUState for inputs ``x`` (B, ...); zeros for None.

        Raises:
            ValueError: the number or a shape of its tensors is wrong.
        """
        if state is None:
            return self.initial_state(x)
        tensors = state.tensors() if hasattr(state, "tensors") else tuple(state)
        batch = x.shape[0]
        expected = [(batch, self.memory_d, self.order), *[(batch, size) for size in self.state_sizes]]
        found = [tuple(tensor.shape) for tensor in tensors]
        if found != expected:
            raise ValueError(f"initial_state: expected the memory and hidden states {expected}, found {found}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        return LMUState.of((tensors[0].to(dtype), *(tensor.to(x.dtype) for tensor in tensors[1:])))

    def sample_dropout(self, x: Tensor) -> Dropout:
        """Draws the dropout masks of one sequence for inputs ``x`` (B, ...); none outside training."""
        if not self.training:
            return Dropout()

        def mask(rate: float, size: int) -> Tensor | None:
            if rate == 0.0:
                return None
            return nn.functional.dropout(x.new_ones(x.shape[0], size), rate)

        recurrent_size = self.memory_d * self.order
        return Dropout(
            mask(self.dropout, self.encoder_size),
            mask(self.recurrent_dropout, recurrent_size) if self.memory_to_memory else None,
        )

    def encode(self, encoder_input: Tensor, memory: Tensor | None = None, dropout: Dropout = Dropout()) -> Tensor:
        """The memory's input u.

        Args:
            encoder_input: x, or [x, h] with hidden_to_memory, (B, enc_d) or (B, T, enc_d).
            memory: flat memory before the step (B, memory_d * order), with memory_to_memory.
            dropout: the masks of this sequence.

        Returns:
            u, (B, memory_d) or (B, T, memory_d).
        """
        if dropout.encoder is not None:
            encoder_input = encoder_input * (dropout.encoder if encoder_input.ndim == 2 else dropout.encoder[:, None])
        u = encoder_input if self.kernel is None else encoder_input @ self.kernel
        if memory is not None and self.recurrent_kernel is not None:
            memory = memory.to(self.recurrent_kernel.dtype)
            u = u + (memory if dropout.recurrent is None else memory * dropout.recurrent) @ self.recurrent_kernel
        if self.bias is not None:
            u = u + self.bias
        return ACTIVATIONS[self.encoder_act](u)

    def hidden_input(self, memory: Tensor, x: Tensor) -> Tensor:
        """z, the hidden cell's input: memory (..., memory_d, order) and x (..., input_size) -> (..., features)."""
        flat = memory.flatten(-2).to(x.dtype)
        return torch.cat([flat, x], dim=-1) if self.input_to_hidden else flat

    def step(self, x: Tensor, state: LMUState, system: DelaySystem, dropout: Dropout) -> tuple[Tensor, LMUState]:
        """One step with the system and the dropout masks of this sequence given. See :meth:`forward`."""
        encoder_input = torch.cat([x, state.hidden[0].to(x.dtype)], dim=-1) if self.hidden_to_memory else x
        u = self.encode(encoder_input, state.memory.flatten(1) if self.memory_to_memory else None, dropout)
        Ad, Bd = system.matrices(torch.promote_types(x.dtype, torch.float32), x.device)
        memory = memory_step(state.memory, u, Ad, Bd)
        z = self.hidden_input(memory, x)
        if self.hidden_cell is None:
            return z, LMUState(memory)
        output, hidden = self.hidden_cell(z, state.hidden)
        return output, LMUState(memory, tuple(hidden))

    def forward(
        self, x: Tensor, state: LMUState | Sequence[Tensor] | None = None, dropout: Dropout | None = None
    ) -> tuple[Tensor, LMUState]:
        """One time step.

        Args:
            x: inputs (batch, input_size).
            state: the state before the step, zeros when None.
            dropout: the masks of the sequence that the step belongs to, from :meth:`sample_dropout` before its first step.
                Drawn anew for this step in training when None.

        Returns:
            The output (batch, output_size) and the state after the step.

        Raises:
            ValueError: a shape is wrong.
        """
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"x: expected (batch, input_size={self.input_size}), found {tuple(x.shape)}")
        dropout = self.sample_dropout(x) if dropout is None else dropout
        return self.step(x, self.check_state(state, x), self.system(), dropout)

    def reconstruct(self, memory: Tensor, lags: Tensor | Sequence[float] | None = None) -> Tensor:
        """Reads the remembered window back from the memory (Voelker et al. 2019, eq. 3).

        Args:
            memory: states (..., memory_d, order).
            lags: delays in time steps, 0 for the newest sample; the whole window by default (the shortest one, if theta
                differs between dimensions).

        Returns:
            Estimates of the memory's past inputs u, (..., memory_d, len(lags)).

        Raises:
            ValueError: a delay is longer than the window.
        """
        theta = self.theta.reshape(-1, 1)
        if lags is None:
            lags = torch.arange(int(theta.min() - TIME_ORIGIN[self.discretizer]) + 1)
        points = torch.as_tensor(lags, device="cpu").reshape(-1)
        r = relative_delay(points, theta, self.discretizer)
        if not bool(((r >= 0) & (r <= 1)).all()):
            raise ValueError(
                f"lags: expected delays from 0 to the end of the window, {theta.min():g} steps less the part of a step before "
                f"its newest sample, found {points.min():g} to {points.max():g}"
            )
        dtype = torch.promote_types(memory.dtype, torch.float32)
        decoder = shifted_legendre(self.order, r).to(dtype=dtype, device=memory.device)
        return torch.einsum("...dn,dln->...dl", memory.to(dtype), decoder.expand(self.memory_d, -1, -1)).to(memory.dtype)

    def regularization_loss(self) -> Tensor:
        """The sum of the regularizers' penalties, a scalar; add it to the loss."""
        weights = [
            (self.kernel, self.kernel_regularizer),
            (self.recurrent_kernel, self.recurrent_regularizer),
            (self.bias, self.bias_regularizer),
        ]
        terms = [regularization(weight, spec) for weight, spec in weights if weight is not None and spec is not None]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def extra_repr(self) -> str:
        theta = self.initial_theta
        flags = [
            name
            for name in ("trainable_theta", "hidden_to_memory", "memory_to_memory", "input_to_hidden")
            if getattr(self, name)
        ]
        sizes = f"{self.input_size}, memory_d={self.memory_d}, order={self.order}, theta={theta}, {self.discretizer}"
        return ", ".join([sizes, *flags])


def _check_count(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{field}: expected a whole number >= 1, found {value!r}")
    return int(value)


def _check_rate(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise ValueError(f"{field}: expected a rate in [0, 1), found {value!r}")
    return float(value)
