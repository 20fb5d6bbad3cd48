"""Stored matrices of the memory against the Legendre system: the same but for rounding, or refused.

The converted model computes its own matrices from order, theta and the discretizer, in float64. Files of the two old generations
hold them as weights. What is accepted as rounding, as the largest and as the root mean square difference of all entries:

- float64 matrices stored as float32 (what both old generations wrote wherever they could be run): largest 6e-8.
- a float32 matrix exponential: largest 1e-7 at order 6, 1e-6 at 64, 1e-5 at 256 (up to 6e-4 in some libraries); but the root
  mean square is below 1e-6 at all of them, since few entries are hit.
- one step of Adam with its usual rate of 1e-3 moves every entry by 1e-3, and a theta of 783 for 784 changes the matrix of order
  256 by 2e-4 on average.

So the largest difference may be 4e-6 * order (1e-3 at 256), as long as the root mean square stays below a fiftieth of that.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from ..model.legendre import continuous_system, delay_system
from .architecture import Lmu
from .graph import refuse

_ROUNDING = 1e-6  # of a matrix that was computed in float64


def recognise(lmu: Lmu, Ad: np.ndarray, Bd: np.ndarray, what: str, notes: list[str]) -> None:
    """Checks the stored matrices of a layer; fills in its theta and discretizer if the file does not name them.

    Args:
        lmu: the layer.
        Ad: discrete state matrix (order, order), float64.
        Bd: discrete input vector (order,), float64.
        what: the layer, for messages.
        notes: gets a note if the difference is more than storage in float32 explains.

    Raises:
        InputError: they are not the Legendre system with this theta and discretizer.
    """
    found = []
    for discretizer in [lmu.discretizer] if lmu.discretizer else ["zoh", "euler"]:
        theta = lmu.theta if lmu.theta is not None else _fit(discretizer, Ad, Bd)
        found.append((*_differences(theta, discretizer, Ad, Bd), theta, discretizer))
    worst, mean, theta, discretizer = min(found)
    order = len(Ad)
    limit = max(_ROUNDING, 4e-6 * order)
    if not (worst <= limit and mean <= max(_ROUNDING, limit / 50)):
        raise refuse(
            what,
            f"its stored matrices A and B differ from the Legendre system of order {order}, theta {theta:g}, {discretizer}, "
            f"by {worst:.1e} at most and {mean:.1e} on average, where rounding explains "
            f"{limit:.0e} and {limit / 50:.0e}; they were trained, or belong to another system, which LMUs here cannot carry",
        )
    lmu.theta, lmu.discretizer = theta, discretizer
    if worst > _ROUNDING:
        notes.append(
            f"{what}: the stored matrices A and B differ by up to {worst:.1e} from the Legendre system, as float32 computation "
            "makes them; the converted model uses the exact ones"
        )


def deduce_system(Ad: np.ndarray, Bd: np.ndarray) -> tuple[float, str]:
    """The theta and the discretizer that explain discrete matrices (order, order) and (order,) best."""
    found = [(discretizer, _fit(discretizer, Ad, Bd)) for discretizer in ("zoh", "euler")]
    discretizer, theta = min(found, key=lambda pair: _differences(pair[1], pair[0], Ad, Bd))
    return theta, discretizer


def _differences(theta: float, discretizer: str, Ad: np.ndarray, Bd: np.ndarray) -> tuple[float, float]:
    if not theta > 0:
        raise InputError(f"theta: expected a positive number of steps, found {theta}")
    system = delay_system(len(Ad), theta, discretizer)
    difference = np.concatenate([(system.Ad[0].numpy() - Ad).ravel(), system.Bd[0].numpy() - Bd])
    return float(np.abs(difference).max()), float(np.sqrt((difference**2).mean()))


def _fit(discretizer: str, Ad: np.ndarray, Bd: np.ndarray) -> float:
    """The theta that explains the matrices best."""
    # Bd[0] is 1 / theta under Euler and a little less under zero-order hold; from there, Gauss-Newton in 1 / theta.
    A = continuous_system(len(Ad))[0].numpy()
    inverse = float(np.clip(abs(Bd[0]), 1e-9, 1e3))
    for _ in range(25):
        model = delay_system(len(Ad), 1 / inverse, discretizer).Ad[0].numpy()
        slope = A if discretizer == "euler" else A @ model
        change = float((slope * (Ad - model)).sum() / (slope * slope).sum())
        inverse = min(max(inverse + change, inverse / 2), inverse * 2)
        if abs(change) < 1e-12 * inverse:
            break
    theta = 1 / inverse
    # People write whole numbers, and float32 matrices do not tell 784 from 784.00001.
    return float(round(theta)) if round(theta) >= 1 and abs(theta - round(theta)) < 1e-5 * theta else theta
