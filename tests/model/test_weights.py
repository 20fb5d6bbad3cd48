"""Initializers and regularizers by name."""

import math

import pytest
import torch

from lmu_hf.model.weights import INITIALIZERS, initialize_, regularization


def filled(spec, shape=(300, 200), **kwargs):
    weight = torch.full(shape, torch.nan)
    initialize_("field", weight, spec, **kwargs)
    return weight


@pytest.mark.parametrize(
    ("name", "std", "bound"),
    [
        ("glorot_uniform", math.sqrt(2 / 500), math.sqrt(6 / 500)),
        ("glorot_normal", math.sqrt(2 / 500), None),
        ("lecun_uniform", math.sqrt(1 / 200), math.sqrt(3 / 200)),
        ("lecun_normal", math.sqrt(1 / 200), None),
        ("he_uniform", math.sqrt(2 / 200), math.sqrt(6 / 200)),
        ("he_normal", math.sqrt(2 / 200), None),
        ({"name": "uniform", "low": -0.3, "high": 0.3}, 0.3 / math.sqrt(3), 0.3),
        ({"name": "normal", "std": 0.2}, 0.2, None),
    ],
)
def test_spread(name, std, bound):
    weight = filled(name)
    # 60,000 draws: the standard deviation is known to 0.3 %.
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * std * 10
    if bound is not None:
        assert weight.abs().max() <= bound


def test_kernels_have_their_inputs_first():
    kernel = filled("lecun_normal", (200, 300), inputs_first=True)
    assert kernel.std().item() == pytest.approx(math.sqrt(1 / 200), rel=0.02)


def test_orthogonal():
    weight = filled({"name": "orthogonal", "gain": 2.0}, (40, 10))
    assert torch.allclose(weight.T @ weight, 4 * torch.eye(10), atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("zeros", 0.0), ("ones", 1.0), ({"name": "constant", "value": 0.25}, 0.25)])
def test_constants(name, value):
    assert (filled(name) == value).all()
    assert (filled(name, (7,)) == value).all()


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(name, dtype):
    weight = torch.full((20, 10), torch.nan, dtype=dtype)
    initialize_("field", weight, name)
    assert weight.isfinite().all()


def test_blocks_are_initialised_as_matrices_of_their_own():
    weight = filled({"memory": "glorot_normal", "input": "zeros"}, (300, 200), blocks={"memory": 190, "input": 10})
    assert (weight[:, 190:] == 0).all()
    assert weight[:, :190].std().item() == pytest.approx(math.sqrt(2 / 490), rel=0.02)


def test_loaded_weights_are_left_alone():
    weight = torch.ones(3, 3)
    weight._is_hf_initialized = True
    initialize_("field", weight, "zeros")
    assert (weight == 1).all()


def test_penalties():
    weight = torch.tensor([[1.0, -2.0]])
    assert regularization(weight, None) == 0
    assert regularization(weight, "l1").item() == pytest.approx(0.03)
    assert regularization(weight, {"name": "l2", "l2": 0.1}).item() == pytest.approx(0.5)
    assert regularization(weight, {"name": "l1_l2", "l1": 1.0, "l2": 0.1}).item() == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("xavier", "field: expected one of"),
        (None, "field: expected a name or a mapping"),
        ({"name": "constant", "val": 1}, "constant takes .'value'., found 'val'"),
        ({"name": "zeros", "value": 1}, "zeros takes no parameters"),
        ({"name": "constant", "value": "x"}, "expected a finite number"),
        ({"memory": "zeros", "imput": "ones"}, "expected blocks .* found .'imput'"),
        ({"memory": "zeros"}, "none for .'input'"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        initialize_("field", torch.zeros(3, 4), spec, blocks={"memory": 3, "input": 1})
