"""The delay system against SciPy, against its own definition, and against what it claims to remember."""

import math

import pytest
import torch
from scipy.signal import cont2discrete

from lmu_hf.model import legendre
from lmu_hf.model.legendre import DelaySystem, delay_system

F64 = torch.float64


def test_continuous_system_of_order_three():
    A, B = legendre.continuous_system(3)
    assert A.tolist() == [[-1, -1, -1], [3, -3, -3], [-5, 5, -5]]
    assert B.tolist() == [1, -3, 5]


@pytest.mark.parametrize("discretizer", legendre.DISCRETIZERS)
@pytest.mark.parametrize(("order", "theta"), [(1, 1.0), (2, 3.5), (6, 30.0), (40, 400.0)])
def test_discrete_system_matches_scipy(order, theta, discretizer):
    A, B = legendre.continuous_system(order)
    eye = torch.eye(order, dtype=F64)
    continuous = [matrix.numpy() for matrix in (A / theta, B[:, None] / theta, eye, 0 * B[:, None])]
    expected_A, expected_B, *_ = cont2discrete(continuous, 1.0, discretizer)
    system = delay_system(order, theta, discretizer)
    # Both are float64; the exponential of a matrix of norm ~10 loses about two digits.
    assert torch.allclose(system.Ad[0], torch.from_numpy(expected_A), rtol=0, atol=1e-12)
    assert torch.allclose(system.Bd[0], torch.from_numpy(expected_B[:, 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("discretizer", legendre.DISCRETIZERS)
def test_gradient_with_respect_to_theta(discretizer):
    theta_inv = torch.tensor([1 / 6, 1 / 9], dtype=F64, requires_grad=True)

    def build(theta_inv):
        system = DelaySystem(theta_inv, 4, discretizer)
        return system.Ad, system.Bd

    assert torch.autograd.gradcheck(build, theta_inv)
    assert torch.autograd.gradgradcheck(build, theta_inv)


@pytest.mark.parametrize("order", [4, 16, 64])
def test_smallest_stable_theta(order):
    limit = legendre.smallest_stable_theta(order)
    # The eigenvalues of a matrix with entries ~100 are good to ~1e-10 relative; the spectral radius moves by far more.
    assert legendre.euler_spectral_radius(order, limit * (1 + 1e-4)) < 1 + 1e-12
    assert legendre.euler_spectral_radius(order, limit * (1 - 1e-4)) > 1
    radius = float(torch.linalg.eigvals(delay_system(order, limit * 1.01, "euler").Ad[0]).abs().max())
    assert radius < 1


def test_zoh_is_stable_at_high_order():
    radius = float(torch.linalg.eigvals(delay_system(256, 784.0).Ad[0]).abs().max())
    assert radius == pytest.approx(0.976, abs=5e-4)


def test_operators_are_what_they_say():
    system = DelaySystem(torch.tensor([1 / 7.0, 1 / 20.0], dtype=F64), 3)
    state = system.Bd
    response = system.impulse_response(13, F64, "cpu")
    from_state, from_input = system.chunk_operator(5, F64, "cpu").split([system.order, 5], dim=1)
    for k in range(13):
        assert torch.allclose(response[:, k], state, rtol=0, atol=1e-14)
        if k < 5:
            assert torch.allclose(from_input[:, 0, 3 * k : 3 * k + 3], state, rtol=0, atol=1e-14)
            power = torch.linalg.matrix_power(system.Ad, k + 1)
            assert torch.allclose(from_state[:, :, 3 * k : 3 * k + 3], power.mT, rtol=0, atol=1e-14)
            assert torch.allclose(system.power(k + 1, F64, "cpu"), power, rtol=0, atol=1e-14)
        state = torch.einsum("sij,sj->si", system.Ad, state)
    assert (from_input[:, 2, :6] == 0).all()


def test_operators_are_shared_and_survive_inference_mode():
    with torch.inference_mode():
        first = delay_system(5, 11.0).impulse_response(9, torch.float32, "cpu")
    again = delay_system(5, 11.0)
    assert again is delay_system(5, 11.0)
    assert not again.impulse_response(9, torch.float32, "cpu").is_inference()
    assert first.data_ptr() == again.impulse_response(9, torch.float32, "cpu").data_ptr()


def test_cached_operators_are_bounded():
    system = DelaySystem(torch.tensor([0.1], dtype=F64), 2)
    for exponent in range(1, 60):
        system.power(exponent, torch.float32, "cpu")
    assert len(system._operators) <= legendre._MAX_CACHED_OPERATORS


# Twelve polynomials hold 0.17 and 1.7 periods of a sine almost exactly under zero-order hold. Euler is of first order only:
# its error falls with theta, here to 4e-4 of a slow sine.
@pytest.mark.parametrize(
    ("discretizer", "period", "bound"), [("zoh", 240, 5e-4), ("zoh", 2400, 1e-5), ("euler", 2400, 6e-4)]
)
def test_window_is_read_back(discretizer, period, bound):
    theta, steps = 400.0, 1200
    u = torch.sin(2 * math.pi * torch.arange(steps, dtype=F64) / period)
    system = delay_system(12, theta, discretizer)
    memory = torch.zeros(12, dtype=F64)
    for value in u:
        memory = system.Ad[0] @ memory + system.Bd[0] * value
    lags = torch.arange(3, 396, 3, dtype=F64)
    truth = u[steps - 1 - lags.long()]
    r = legendre.relative_delay(lags, theta, discretizer)
    error = (legendre.reconstruct(memory, r) - truth).abs().mean()
    assert error < bound
    # The time origin is right to half a step: moving it either way reads worse.
    for shift in (-0.5, 0.5):
        assert (legendre.reconstruct(memory, r + shift / theta) - truth).abs().mean() > 1.5 * error


@pytest.mark.parametrize("discretizer", legendre.DISCRETIZERS)
def test_time_origin_by_a_ramp(discretizer):
    theta, order, steps = 30.0, 4, 600
    system = delay_system(order, theta, discretizer)
    memory = torch.zeros(order, dtype=F64)
    for t in range(steps):
        memory = system.Ad[0] @ memory + system.Bd[0] * t
    lags = torch.arange(0, 29, dtype=F64)
    read = legendre.reconstruct(memory, legendre.relative_delay(lags, theta, discretizer))
    # A ramp is a polynomial of degree one. Under Euler what is left is rounding of numbers around 600; zero-order hold
    # makes a staircase of it, whose teeth of +-1/2 the memory smooths to a tenth of that.
    assert (read - (steps - 1 - lags)).abs().max() < {"euler": 1e-9, "zoh": 0.05}[discretizer]


def test_polynomials():
    r = torch.linspace(0, 1, 11, dtype=F64)
    x = 2 * r - 1
    values = legendre.shifted_legendre(4, r)
    expected = torch.stack([torch.ones_like(x), x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2], -1)
    assert torch.allclose(values, expected, rtol=0, atol=1e-14)
    assert legendre.shifted_legendre(1, r).shape == (11, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: legendre.check_order(0), "order: .*found 0"),
        (lambda: legendre.check_order(4.0), "order: .*found 4.0"),
        (lambda: legendre.check_order(True), "order: .*found True"),
        (lambda: legendre.check_theta(-3), "theta: .*positive"),
        (lambda: legendre.check_theta(float("nan")), "theta: .*positive"),
        (lambda: legendre.check_theta(math.inf), "theta: .*positive"),
        (lambda: legendre.check_theta("784"), "theta: .*positive"),
        (lambda: legendre.check_theta([3.0, 4.0], 3), "memory_d=3 values, found 2"),
        (lambda: legendre.check_discretizer("tustin"), "discretizer: .*'tustin'"),
        (lambda: legendre.check_stability(256, 2000.0, "euler"), r"spectral radius 1\.02.*smallest stable theta is 6541"),
        (lambda: legendre.reconstruct(torch.zeros(3), [1.2]), "relative delays within"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
