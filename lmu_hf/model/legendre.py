"""The delay system behind the Legendre Memory Unit.

A window of the last ``theta`` time steps of a signal ``u`` is held in ``order`` numbers ``m``, the coefficients of its
shifted Legendre polynomials. They follow the linear system (Voelker, Kajic & Eliasmith 2019, eq. 1-2)

    theta * m'(t) = A m(t) + B u(t)

which this module builds, discretises with a step of one, and reads back out. Everything is computed in float64 on the
CPU and cast last: at order 256 a float32 matrix exponential costs two digits of the impulse response.

Axes: ``S`` scales (1 when all memory dimensions share one theta, else one per memory dimension), ``N`` order.
"""

import math
import numbers
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

DISCRETIZERS = ("zoh", "euler")

# Where r = 0 lies, in steps after the newest sample. A ramp u[t] = t shows it: under zero-order hold the memory follows
# the continuous system driven by t + 1/2 (the sample u[T-1] is held over [T-1, T)), under Euler by t + 1 (m[t] takes u[t]
# in full and the drift of m[t-1]).
TIME_ORIGIN = {"zoh": 0.5, "euler": 1.0}

# Largest number of derived operators (impulse responses, powers, ...) that one system keeps.
_MAX_CACHED_OPERATORS = 32


def check_order(order: Any) -> int:
    """Returns ``order`` if it is a whole number >= 1; raises ValueError otherwise."""
    if isinstance(order, bool) or not isinstance(order, numbers.Integral) or order < 1:
        raise ValueError(f"order: expected a whole number >= 1, found {order!r}; use for example order=256")
    return int(order)


def check_theta(theta: Any, memory_d: int | None = None) -> float | tuple[float, ...]:
    """Returns ``theta`` as a positive float, or as a tuple of ``memory_d`` positive floats.

    Args:
        theta: window length in time steps: one number, or a sequence with one number per memory dimension.
        memory_d: number of memory dimensions that a sequence must match; not checked when None.

    Raises:
        ValueError: a value is not a finite positive number, or the sequence has the wrong length.
    """
    if isinstance(theta, Tensor | np.ndarray):
        theta = theta.tolist()
    values = list(theta) if isinstance(theta, Sequence) and not isinstance(theta, str) else [theta]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
            raise ValueError(
                f"theta: expected a positive, finite number of time steps, found {theta!r}; use about the length of the "
                "window to remember, for example theta=784 for sequences of 784 steps"
            )
    if not isinstance(theta, Sequence):
        return float(theta)
    if memory_d is not None and len(values) != memory_d:
        raise ValueError(
            f"theta: expected one value or memory_d={memory_d} values, found {len(values)}; give one theta per memory "
            "dimension, or a single number shared by all"
        )
    return tuple(float(value) for value in values)


def check_discretizer(discretizer: str) -> str:
    """Returns ``discretizer`` if it is known; raises ValueError otherwise."""
    if discretizer not in DISCRETIZERS:
        raise ValueError(f"discretizer: expected one of {list(DISCRETIZERS)}, found {discretizer!r}")
    return discretizer


def _for_good(function: Callable[..., Any]) -> Callable[..., Any]:
    """Computes real, ordinary tensors whoever calls first: a tracer, an export or an inference_mode block.

    What is cached outlives them, and would otherwise be a fake tensor, or one that can never be trained with.
    """

    @wraps(function)
    def wrapper(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args)
        # No torch.no_grad(): nothing here asks for a gradient, and an export would keep it as a node that cannot be saved.
        with _disable_current_modes(), torch.inference_mode(False):
            return function(*args)

    return wrapper


@lru_cache(maxsize=64)
@_for_good
def continuous_system(order: int) -> tuple[Tensor, Tensor]:
    """The continuous system, free of theta (Voelker et al. 2019, eq. 2).

    Args:
        order: number of Legendre polynomials N.

    Returns:
        ``A`` (N, N) and ``B`` (N,), float64 on the CPU, in ``theta * m' = A m + B u``. Shared: do not write to them.
    """
    check_order(order)
    i = torch.arange(order, dtype=torch.float64, device="cpu")
    row, column = i[:, None], i[None, :]
    # (-1)**(i-j+1) below the diagonal, -1 above it.
    sign = torch.where(row < column, -1.0, 1.0 - 2.0 * ((row - column + 1) % 2)).to(torch.float64)
    return (2 * row + 1) * sign, (2 * i + 1) * (1.0 - 2.0 * (i % 2))


@lru_cache(maxsize=64)
@_for_good
def _eigenvalues(order: int) -> Tensor:
    return torch.linalg.eigvals(continuous_system(order)[0])


def smallest_stable_theta(order: int) -> float:
    """Smallest theta, in time steps, for which the Euler discretisation of this order is stable.

    Euler's poles are 1 + lambda / theta for the eigenvalues lambda of A; each lies in the unit disc exactly when
    theta >= |lambda|^2 / (-2 Re lambda).
    """
    eigenvalues = _eigenvalues(order)
    return float((eigenvalues.abs() ** 2 / (-2 * eigenvalues.real)).max())


def euler_spectral_radius(order: int, theta: float) -> float:
    """Largest absolute eigenvalue of the Euler matrix I + A / theta. Above 1 the memory diverges."""
    return float((1 + _eigenvalues(order) / theta).abs().max())


def check_stability(order: int, theta: float | Sequence[float], discretizer: str) -> None:
    """Raises ValueError if the discrete system diverges. Zero-order hold never does.

    Args:
        order: number of Legendre polynomials.
        theta: window length or lengths in time steps.
        discretizer: "zoh" or "euler".
    """
    if discretizer != "euler":
        return
    shortest = min(theta) if isinstance(theta, Sequence) else theta
    limit = smallest_stable_theta(order)
    if shortest < limit:
        raise ValueError(
            f"theta: euler at order {order} and theta {shortest:g} is unstable (spectral radius "
            f"{euler_spectral_radius(order, shortest):.4g}, must be <= 1); the smallest stable theta is "
            f"{math.ceil(limit * 100) / 100:g}. Use a larger theta, a smaller order, or discretizer='zoh', which is "
            "always stable; allow_unstable=True insists"
        )


class _Discretize(torch.autograd.Function):
    """theta_inv (S,) -> Ad (S, N, N), Bd (S, N).

    The derivatives have closed forms, nine times cheaper than differentiating the matrix exponential: A commutes with
    its own exponential, so d Ad / d theta_inv = A Ad and, because Bd solves A Bd = (Ad - I) B, d Bd / d theta_inv =
    Ad B. For Euler they are A and B.
    """

    @staticmethod
    def forward(theta_inv: Tensor, order: int, discretizer: str) -> tuple[Tensor, Tensor]:
        A, B = continuous_system(order)
        scale = theta_inv[:, None, None]
        if discretizer == "euler":
            return torch.eye(order, dtype=A.dtype, device="cpu") + A * scale, B * scale[..., 0]
        # One exponential of the system augmented by its input gives both matrices, without inverting A.
        augmented = A.new_zeros(len(theta_inv), order + 1, order + 1)
        augmented[:, :order, :order] = A * scale
        augmented[:, :order, order] = B * scale[..., 0]
        exponential = torch.linalg.matrix_exp(augmented)
        return exponential[:, :order, :order].contiguous(), exponential[:, :order, order].contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, ctx.order, ctx.discretizer = inputs
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx: Any, grad_Ad: Tensor, grad_Bd: Tensor) -> tuple:
        (Ad,) = ctx.saved_tensors
        A, B = continuous_system(ctx.order)
        if ctx.discretizer == "euler":
            return (grad_Ad * A).sum((1, 2)) + (grad_Bd * B).sum(1), None, None
        return (grad_Ad * (A @ Ad)).sum((1, 2)) + (grad_Bd * (Ad @ B)).sum(1), None, None


class DelaySystem:
    """The discrete delay system m[t] = Ad m[t-1] + Bd u[t] and the operators derived from it.

    Operators are computed in float64 on the CPU, cast and moved last, and kept, so a second call is a dictionary
    look-up. A system built from a theta that requires a gradient lets it flow through every operator.

    Args:
        theta_inv: 1 / theta per scale, shape (S,), in 1 / time steps.
        order: number of Legendre polynomials N.
        discretizer: "zoh" (Ad, Bd from the matrix exponential) or "euler" (Ad = I + A / theta, Bd = B / theta).
        key: the arguments of :func:`delay_system` that this shared system answers to; None for one of a single forward pass.

    Attributes:
        Ad: state matrix (S, N, N), float64, CPU.
        Bd: input vector (S, N), float64, CPU.
        longest: the longest theta, in time steps, where that tells how fast the memory forgets; None where it is trained, and
            under Euler, which may forget as slowly as one likes.
    """

    def __init__(self, theta_inv: Tensor, order: int, discretizer: str = "zoh", *, key: tuple | None = None):
        check_discretizer(discretizer)
        self.order = check_order(order)
        self.discretizer = discretizer
        theta_inv = theta_inv.to(device="cpu", dtype=torch.float64).reshape(-1)
        self.Ad, self.Bd = _Discretize.apply(theta_inv, order, discretizer)
        self.scales = len(theta_inv)
        self._key = key
        self.longest: float | None = None
        if key is not None and discretizer == "zoh":
            self.longest = max(key[1]) if isinstance(key[1], tuple) else key[1]
        self._operators: OrderedDict[tuple, tuple[Tensor, ...]] = OrderedDict()

    @property
    def shared(self) -> bool:
        """Whether it outlives a forward pass, so that what it keeps is computed once."""
        return self._key is not None

    def __reduce__(self) -> Any:
        # A copy or a pickle of a layer refers to the shared system rather than carrying its operators along.
        if not self.shared:
            raise TypeError("a delay system with a trained theta belongs to one forward pass and cannot be copied")
        return delay_system, self._key

    def matrices(self, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Ad (S, N, N) and Bd (S, N) in the given dtype on the given device."""
        return self._cached(("matrices",), dtype, device, lambda: (self.Ad, self.Bd))  # type: ignore[return-value]

    def impulse_response(self, length: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """H[k] = Ad^k Bd for k = 0 .. length-1, shape (S, length, N)."""
        # Kept at the next power of two: batches of many lengths then share a handful of entries.
        size = 1 << max(length - 1, 0).bit_length()
        (response,) = self._cached(("impulse", size), dtype, device, lambda: (self._impulse_response(size),))
        return response[:, :length]

    def newest_last(self, length: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """What the inputs of ``length`` steps are in the memory after them: H[length-1], ..., H[0], shape (S, length, N)."""

        def build() -> tuple[Tensor]:
            return (self._impulse_response(length).flip(1),)

        return self._cached(("newest last", length), dtype, device, build)[0]

    def power(self, exponent: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Ad^exponent, shape (S, N, N)."""

        def build() -> tuple[Tensor]:
            return (torch.linalg.matrix_power(self.Ad, exponent),)

        return self._cached(("power", exponent), dtype, device, build)[0]

    def powers(self, count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """(Ad^T)^i for i = 0 .. count-1 in one matrix (S, N * count, N), whose row n * count + i is the n-th of (Ad^T)^i."""

        def build() -> tuple[Tensor]:
            identity = torch.eye(self.order, dtype=self.Ad.dtype, device="cpu").expand_as(self.Ad)[:, None]
            powers = torch.cat([identity, self._powers(count)], dim=1)[:, :count]
            return (powers.permute(0, 3, 1, 2).flatten(1, 2),)

        return self._cached(("powers", count), dtype, device, build)[0]

    def chunk_operator(self, size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The operator that advances the memory by a chunk of ``size`` steps at once, (S, N + size, size * N).

        The states after each step of the chunk, step-major, are ``[m_start, u_chunk] @ operator``. Causal: a shorter chunk of
        k steps needs its first N + k rows and k * N columns only.
        """
        return self._cached(("chunk", size), dtype, device, lambda: (self._chunk_operator(size),))[0]

    def window_operator(self, size: int, count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """What ``count`` chunks of ``size`` steps give to a memory that was empty before them, (S, count * size, size * N).

        The states after each step of the last chunk, step-major, are ``[u_first_chunk, ..., u_last_chunk] @ operator``. Those of
        fewer chunks need its last rows only.
        """
        return self._cached(("window", size, count), dtype, device, lambda: (self._window_operator(size, count),))[0]

    def _impulse_response(self, length: int) -> Tensor:
        # Doubling: H[k:2k] = Ad^k H[0:k], log2(length) products instead of length.
        response, power = self.Bd[:, None], self.Ad
        while response.shape[1] < length:
            response = torch.cat([response, response @ power.mT], dim=1)
            if response.shape[1] < length:
                power = power @ power
        return response[:, :length]

    def _powers(self, count: int) -> Tensor:
        """Ad^i for i = 1 .. count, (S, count, N, N)."""
        powers = self.Ad[:, None]
        while powers.shape[1] < count:
            powers = torch.cat([powers, powers[:, -1:] @ powers], dim=1)
        return powers[:, :count]

    def _chunk_operator(self, size: int) -> Tensor:
        from_state = self._powers(size).permute(0, 3, 1, 2).flatten(2)
        return torch.cat([from_state, self._window_operator(size, 1)], dim=1)

    def _window_operator(self, size: int, count: int) -> Tensor:
        impulse = self._impulse_response(count * size)
        steps = torch.arange(count * size, device="cpu")
        lag = steps[None, -size:] - steps[:, None]
        causal = (lag >= 0).to(impulse.dtype)[None, :, :, None]
        return (impulse[:, lag.clamp(min=0)] * causal).flatten(2)

    def _cached(
        self, key: tuple, dtype: torch.dtype, device: torch.device | str, build: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        key = (*key, dtype, str(device))
        found = self._operators.get(key)
        if found is not None:
            self._operators.move_to_end(key)
            return found

        def cast() -> tuple[Tensor, ...]:
            return tuple(tensor.to(dtype=dtype, device=device).contiguous() for tensor in build())

        built = _for_good(cast)() if self.shared else cast()
        self._operators[key] = built
        if len(self._operators) > _MAX_CACHED_OPERATORS:
            self._operators.popitem(last=False)
        return built


@lru_cache(maxsize=64)
@_for_good
def delay_system(order: int, theta: float | tuple[float, ...], discretizer: str = "zoh") -> DelaySystem:
    """The shared system for a fixed theta; layers with equal arguments get the same object and its cached operators.

    Args:
        order: number of Legendre polynomials.
        theta: window length in time steps, or a tuple with one per memory dimension.
        discretizer: "zoh" or "euler".
    """
    thetas = theta if isinstance(theta, tuple) else (theta,)
    theta_inv = 1.0 / torch.tensor(thetas, dtype=torch.float64, device="cpu")
    return DelaySystem(theta_inv, order, discretizer, key=(order, theta, discretizer))


def shifted_legendre(order: int, r: Tensor) -> Tensor:
    """P_i(2r - 1) for i = 0 .. order-1 by Bonnet's recursion, which is stable on [0, 1].

    Args:
        order: number of polynomials N.
        r: points in [0, 1], any shape.

    Returns:
        Shape (\\*r.shape, N), float64 on the device of ``r``.
    """
    x = 2 * r.to(torch.float64) - 1
    values = [torch.ones_like(x), x]
    for n in range(1, order - 1):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:order], dim=-1)


def relative_delay(lag: Tensor, theta: float | Tensor, discretizer: str = "zoh") -> Tensor:
    """The r at which a memory holds the sample ``lag`` steps before its newest one (lag 0).

    The time origin lies half a step after the newest sample under zero-order hold, a whole step under Euler.

    Args:
        lag: delays in time steps.
        theta: window length in time steps, broadcast against ``lag``.
        discretizer: "zoh" or "euler".
    """
    return (lag.to(torch.float64) + TIME_ORIGIN[check_discretizer(discretizer)]) / theta


def reconstruct(memory: Tensor, r: Tensor | Sequence[float] | float) -> Tensor:
    """Reads the remembered window back: u(t - r * theta) ~= sum_i m_i P_i(2r - 1) (Voelker et al. 2019, eq. 3).

    Args:
        memory: memory states (..., N).
        r: relative delays in [0, 1], 0 the present and 1 the far end of the window; shape (R,), a sequence or a number.
            Use :func:`relative_delay` for delays in time steps.

    Returns:
        The estimates of u, shape (..., R), in the dtype of ``memory``.

    Raises:
        ValueError: a delay lies outside [0, 1].
    """
    points = torch.as_tensor(r, dtype=torch.float64, device=memory.device).reshape(-1)
    if not bool(((points >= 0) & (points <= 1)).all()):
        raise ValueError(
            f"r: expected relative delays within [0, 1], found {points.min():.4g} to {points.max():.4g}; the memory holds "
            "nothing beyond its window of theta steps"
        )
    dtype = torch.promote_types(memory.dtype, torch.float32)
    decoder = shifted_legendre(memory.shape[-1], points).to(dtype)
    return (memory.to(dtype) @ decoder.mT).to(memory.dtype)
