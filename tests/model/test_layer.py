"""LMU and LMUCell: padding, states, directions, precision, every argument. Numbers of the reference are in test_oracle."""

import pytest
import torch
from torch import nn

from lmu_hf.model.layer import LMU
from lmu_hf.model.lmu_cell import LMUCell
from lmu_hf.model.state import BidirectionalState, LMUState

F64 = torch.float64
# Name -> arguments; between them every path: parallel, coupled, last state only, every cell, kernel or none, scales.
CONFIGS = {
    "memory": {},
    "memory_x": {"input_to_hidden": True},
    "memory_m2m": {"memory_to_memory": True, "input_to_hidden": True},
    "rnn": {"hidden_cell": "rnn", "hidden_size": 4},
    "rnn_all": {
        "hidden_cell": "rnn",
        "hidden_size": 4,
        "hidden_to_memory": True,
        "memory_to_memory": True,
        "input_to_hidden": True,
        "use_bias": True,
        "bias_initializer": "ones",
    },
    "lstm": {"hidden_cell": "lstm", "hidden_size": 4, "input_to_hidden": True, "encoder_act": "tanh"},
    "gru_h2m": {"hidden_cell": "gru", "hidden_size": 4, "hidden_to_memory": True},
    "gru_reset_before": {
        "hidden_cell": {"name": "gru", "reset_after": False, "recurrent_activation": "hard_sigmoid_keras2"},
        "hidden_size": 4,
        "hidden_to_memory": True,
    },
    "dense": {"hidden_cell": "dense", "hidden_size": 4, "hidden_act": "relu", "input_to_hidden": True},
    "dense_h2m": {"hidden_cell": "dense", "hidden_size": 4, "hidden_to_memory": True},
    "readout": {"hidden_cell": "readout", "kernel_initializer": None, "memory_d": 3},
    "stack": {"hidden_cell": [{"name": "lstm", "hidden_size": 3}, "dense"], "hidden_size": 4},
    "scales": {"theta": [5.0, 30.0], "hidden_cell": "rnn", "hidden_size": 4},
    "trained_scales": {"theta": [5.0, 30.0], "hidden_cell": "dense", "hidden_size": 4, "trainable_theta": True},
    "euler": {"discretizer": "euler", "theta": 40.0, "hidden_cell": "rnn", "hidden_size": 4, "trainable_theta": True},
}


def build(name, dtype=F64, **kwargs):
    arguments = {"memory_d": 2, "order": 5, "theta": 9.0, "return_state": True, "dtype": dtype, **CONFIGS[name], **kwargs}
    layer = LMU(3, **arguments)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if not key.endswith("theta_inv"):
                parameter.uniform_(-0.5, 0.5)
    return layer


def flat(state):
    if isinstance(state, BidirectionalState):
        return [*flat(state.forward), *flat(state.backward)]
    return [state.memory, *state.hidden]


def distance(ours, theirs):
    return max(float((a - b).detach().abs().max()) for a, b in zip(flat(ours), flat(theirs), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_sequence_equals_cell_steps(name):
    layer = build(name, return_sequences=True)
    x = torch.randn(2, 23, 3, dtype=F64)
    output, state = layer(x)
    step_state = None
    for t in range(x.shape[1]):
        step_output, step_state = layer.cell(x[:, t], step_state)
        assert (output[:, t] - step_output).abs().max() < 1e-12
    assert distance(state, step_state) < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_last_output_equals_the_sequence_s(name):
    layer = build(name)
    x = torch.randn(2, 23, 3, dtype=F64)
    last, state = layer(x)
    layer.return_sequences = True
    output, sequence_state = layer(x)
    assert (last - output[:, -1]).abs().max() < 1e-12
    assert distance(state, sequence_state) < 1e-12


MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],  # full
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],  # padded right
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],  # padded left
        [0, 1, 1, 0, 0, 1, 0, 1, 1, 0],  # holes
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 0],  # one step
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # nothing
    ]
)


@pytest.mark.parametrize("direction", ["forward", "go_backwards", "bidirectional"])
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_exact(name, initial, return_sequences, direction):
    layer = build(name, return_sequences=return_sequences, **({} if direction == "forward" else {direction: True}))
    x = torch.randn(6, 10, 3, dtype=F64)
    poisoned = x.masked_fill(MASK[..., None] == 0, torch.nan).requires_grad_()

    def start(rows):
        cells = [layer.cell, layer.backward_cell] if layer.bidirectional else [layer.cell]
        torch.manual_seed(1)
        states = []
        for cell in cells:
            sizes = [(6, cell.memory_d, cell.order), *[(6, size) for size in cell.state_sizes]]
            states.append(LMUState.of(tuple(torch.randn(size, dtype=F64)[rows] for size in sizes)))
        return BidirectionalState(*states) if layer.bidirectional else states[0]

    output, state = layer(poisoned, start(slice(None)) if initial else None, mask=MASK)
    for row in range(6):
        valid = MASK[row].bool()
        rows = slice(row, row + 1)
        row_state = [tensor[rows] for tensor in flat(state)]
        if not valid.any():
            kept = flat(start(rows)) if initial else [torch.zeros_like(tensor) for tensor in row_state]
            assert all(torch.equal(a, b) for a, b in zip(row_state, kept, strict=True))
            assert (output[row] == 0).all()
            continue
        alone, alone_state = layer(x[rows, valid], start(rows) if initial else None)
        ours = output[rows, valid] if return_sequences else output[rows]
        # One row alone and many rows together differ by the order of sums only.
        assert (ours - alone).abs().max() < 1e-12
        assert max(float((a - b).detach().abs().max()) for a, b in zip(row_state, flat(alone_state), strict=True)) < 1e-12
        if return_sequences:
            assert (output[row, ~valid] == 0).all()
    output.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_lengths_equal_a_mask(name):
    layer = build(name, return_sequences=True)
    x = torch.randn(3, 8, 3, dtype=F64)
    lengths = torch.tensor([8, 3, 5])
    mask = torch.arange(8) < lengths[:, None]
    by_mask, mask_state = layer(x, mask=mask)
    by_lengths, lengths_state = layer(x, lengths=lengths)
    assert torch.equal(by_mask, by_lengths)
    assert distance(mask_state, lengths_state) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_cut_anywhere_and_carry_the_state(name):
    layer = build(name, return_sequences=True)
    x = torch.randn(2, 40, 3, dtype=F64)
    whole, end = layer(x)
    for cut in (1, 7, 39):
        first, middle = layer(x[:, :cut])
        second, final = layer(x[:, cut:], middle)
        assert (torch.cat([first, second], 1) - whole).abs().max() < 1e-12
        assert distance(final, end) < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_stateful(name):
    layer, plain = build(name, stateful=True), build(name)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 12, 3, dtype=F64)
    layer(x[:, :5])
    layer.reset_state([1])
    output, _ = layer(x[:, 5:])
    expected, _ = plain(x)
    restarted, _ = plain(x[:, 5:])
    assert (output[[0, 2]] - expected[[0, 2]]).abs().max() < 1e-12
    assert (output[1] - restarted[1]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="reset_state"):
        layer(x[:2])
    layer.reset_state()
    assert (layer(x)[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_time_major(name):
    layer = build(name, return_sequences=True)
    x, mask = torch.randn(3, 8, 3, dtype=F64), torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    expected, _ = layer(x, mask=mask)
    layer.time_major = True
    output, _ = layer(x.transpose(0, 1), mask=mask.T)
    assert torch.equal(output.transpose(0, 1), expected)


def test_directions():
    forward = build("rnn", return_sequences=True)
    backward = build("rnn", return_sequences=True, go_backwards=True)
    both = build("rnn", return_sequences=True, bidirectional=True)
    both.cell.load_state_dict(forward.cell.state_dict())
    both.backward_cell.load_state_dict(backward.cell.state_dict())
    x = torch.randn(2, 9, 3, dtype=F64)
    forward_output, backward_output = forward(x)[0], backward(x)[0]
    reversed_layer = build("rnn", return_sequences=True)
    reversed_layer.load_state_dict(backward.state_dict())
    assert torch.equal(backward_output, reversed_layer(x.flip(1))[0])
    output, state = both(x)
    assert both.output_size == 8
    assert torch.equal(output, torch.cat([forward_output, backward_output.flip(1)], -1))
    assert isinstance(state, BidirectionalState)
    both.return_sequences = False
    assert (both(x)[0] - torch.cat([forward_output[:, -1], backward_output[:, -1]], -1)).abs().max() < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck(name):
    layer = build(name, return_sequences=True)
    x = torch.randn(2, 6, 3, dtype=F64, requires_grad=True)
    lengths = torch.tensor([6, 4])
    names = [key for key, _ in layer.named_parameters()]

    def call(x, *values):
        output, state = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,), {"lengths": lengths})
        return output, *flat(state)

    assert torch.autograd.gradcheck(call, (x, *[p.detach().clone().requires_grad_() for p in layer.parameters()]))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_and_autocast_keep_the_memory_in_float32(name):
    exact, half = build(name, torch.float32), build(name, torch.float32)
    half.load_state_dict(exact.state_dict())
    half.bfloat16()
    x = torch.randn(2, 50, 3)
    expected, _ = exact(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast, autocast_state = exact(x)
    output, state = half(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert state.memory.dtype == autocast_state.memory.dtype == torch.float32
    # bfloat16 has 8 bits; outputs are of order 1 to 3 and pass through a handful of roundings.
    assert (output.float() - expected).abs().max() < 0.1
    assert (autocast.float() - expected).abs().max() < 0.1
    for key, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if key.endswith("theta_inv") else torch.bfloat16)


def test_float16_autocast_runs():
    layer = build("rnn_all", torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        output, state = layer(torch.randn(2, 20, 3))
    assert output.isfinite().all()
    assert state.memory.dtype == torch.float32


def test_theta_survives_a_round_trip_through_half_precision():
    cell = LMUCell(1, 1, 4, 784.0, trainable_theta=True)
    before = cell.theta_inv.detach().clone()
    assert torch.equal(cell.bfloat16().theta_inv, before)
    assert float(cell.theta) == pytest.approx(784.0, rel=1e-6)
    assert cell.double().theta_inv.dtype == F64


def test_theta_is_kept_admissible_and_can_come_back():
    cell = LMUCell(1, 1, 4, 10.0, trainable_theta=True, dtype=F64)
    with torch.no_grad():
        cell.theta_inv.fill_(-0.1)
    assert (torch.eye(4) == cell.A).all()
    output, _ = cell(torch.ones(1, 1, dtype=F64))
    output.sum().backward()
    assert cell.theta_inv.grad != 0
    euler = LMUCell(1, 1, 4, 10.0, trainable_theta=True, discretizer="euler", dtype=F64)
    with torch.no_grad():
        euler.theta_inv.fill_(1.0)
    assert torch.linalg.eigvals(euler.A).abs().max() <= 1 + 1e-9


def test_one_theta_per_dimension_equals_layers_side_by_side():
    scales = LMU(2, 2, 6, [5.0, 40.0], kernel_initializer=None, return_sequences=True, dtype=F64)
    x = torch.randn(3, 60, 2, dtype=F64)
    output = scales(x).unflatten(-1, (2, 6))
    for dimension, theta in enumerate((5.0, 40.0)):
        single = LMU(1, 1, 6, theta, kernel_initializer=None, return_sequences=True, dtype=F64)
        assert (output[:, :, dimension] - single(x[..., dimension : dimension + 1])).abs().max() < 1e-13
    assert scales.cell.A.shape == (2, 6, 6)
    assert scales.cell.theta.tolist() == [5.0, 40.0]


def test_one_exponential_per_forward(monkeypatch):
    calls = []
    original = torch.linalg.matrix_exp
    monkeypatch.setattr(torch.linalg, "matrix_exp", lambda matrix: calls.append(1) or original(matrix))
    layer = build("trained_scales", return_sequences=True, hidden_to_memory=True)
    layer(torch.randn(2, 30, 3, dtype=F64))
    assert len(calls) == 1


def test_reconstruct():
    layer = LMU(2, 2, 14, [60.0, 40.0], kernel_initializer=None, return_state=True)
    t = torch.arange(200.0)
    x = torch.stack([torch.sin(t / 9), torch.cos(t / 7)], -1)[None]
    _, state = layer(x)
    window = layer.reconstruct(state.memory)
    assert window.shape == (1, 2, 40)
    # Fourteen polynomials hold about one period almost exactly; the staircase of the hold adds ripple near the present.
    assert (window[0] - x[0, -40:].flip(0).T).abs().max() < 0.05
    assert torch.allclose(layer.reconstruct(state.memory, [0, 17]), window[..., [0, 17]], atol=1e-6)
    with pytest.raises(ValueError, match="end of the window"):
        layer.reconstruct(state.memory, [45])


def test_dropout_is_one_mask_per_sequence():
    layer = LMU(40, 40, 2, 4.0, kernel_initializer=None, return_sequences=True, dropout=0.5)
    x = torch.ones(2, 30, 40)
    dropped = (layer(x).unflatten(-1, (40, 2)).abs().sum((1, 3)) == 0).float()
    # Binomial(80, 1/2): 20 to 60 is five standard deviations.
    assert 20 <= dropped.sum() <= 60
    assert not torch.equal(dropped[0], dropped[1])
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_recurrent_dropout_leaves_the_memory_itself_alone():
    layer = LMU(
        1, 1, 8, 8.0, memory_to_memory=True, recurrent_dropout=0.9, return_sequences=True, recurrent_initializer="zeros"
    )
    x = torch.randn(1, 20, 1)
    trained = layer(x)
    layer.eval()
    # The mask goes through the zero weights only; in training the steps run one by one, hence another order of sums.
    assert (trained - layer(x)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["rnn_all", "dense_h2m", "gru_h2m"])
def test_dropout_with_hidden_to_memory_runs(name):
    layer = build(name, dropout=0.3, recurrent_dropout=0.3)
    output, _ = layer(torch.randn(2, 9, 3, dtype=F64))
    assert output.isfinite().all()


def test_regularization_loss():
    layer = LMU(
        3,
        2,
        4,
        9.0,
        memory_to_memory=True,
        use_bias=True,
        bias_initializer="ones",
        kernel_regularizer="l1",
        recurrent_regularizer={"name": "l2", "l2": 0.5},
        bias_regularizer={"name": "l1_l2", "l1": 0.1, "l2": 0.2},
    )
    cell = layer.cell
    expected = 0.01 * cell.kernel.abs().sum() + 0.5 * cell.recurrent_kernel.square().sum() + (0.1 + 0.2) * 2
    assert layer.regularization_loss().item() == pytest.approx(expected.item(), rel=1e-6)
    layer.regularization_loss().backward()
    assert cell.bias.grad is not None
    assert LMU(3, 2, 4, 9.0).regularization_loss() == 0


def test_initial_state_as_plain_tensors():
    layer = build("lstm")
    x = torch.randn(2, 5, 3, dtype=F64)
    _, state = layer(x)
    as_tuple, _ = layer(x, [state.memory, *state.hidden])
    assert torch.equal(as_tuple, layer(x, state)[0])


@pytest.mark.parametrize("algorithm", ["naive", "chunked", "fft", "final"])
def test_algorithms_are_obeyed(algorithm, monkeypatch):
    from lmu_hf.model import layer as module

    seen = []
    original = module.linear_memory
    monkeypatch.setattr(module, "linear_memory", lambda *a, **k: seen.append(k["algorithm"]) or original(*a, **k))
    layer = build("dense")
    expected, _ = layer(x := torch.randn(2, 9, 3, dtype=F64))
    seen.clear()
    layer.algorithm = algorithm
    assert (layer(x)[0] - expected).abs().max() < 1e-12
    assert seen == ([] if algorithm == "naive" else [algorithm])


def arguments(**kwargs):
    return {"input_size": 3, "memory_d": 2, "order": 4, "theta": 9.0, **kwargs}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (arguments(memory_d=0), "memory_d: expected a whole number >= 1, found 0"),
        (arguments(input_size=0), "input_size: expected"),
        (arguments(order=4.0), "order: .*found 4.0"),
        (arguments(theta=-2), "theta: expected a positive"),
        (arguments(theta=[1.0, 2.0, 3.0]), "memory_d=2 values, found 3"),
        (arguments(discretizer="tustin"), "discretizer: expected one of"),
        (arguments(discretizer="euler", order=8), "smallest stable theta is 17.74"),
        (arguments(hidden_to_memory=True), "hidden_to_memory: expected a hidden cell"),
        (arguments(hidden_size=5), "hidden_size: expected None without a hidden cell"),
        (arguments(kernel_initializer=None), "needs memory_d=3, found memory_d=2"),
        (arguments(kernel_initializer="xavier"), "kernel_initializer: expected one of"),
        (arguments(kernel_initializer={"input": "ones"}), "for every block, found none for .'hidden'"),
        (arguments(recurrent_initializer={"input": "ones"}), "this weight has no blocks"),
        (arguments(recurrent_initializer=None), "recurrent_initializer: expected a name"),
        (arguments(kernel_regularizer="l3"), "kernel_regularizer: expected one of"),
        (arguments(kernel_regularizer={"name": "l2", "l2": -1}), "expected l2 >= 0"),
        (arguments(dropout=1.0), "dropout: expected a rate"),
        (arguments(use_bias="False"), "use_bias: expected True or False, found 'False'"),
        (arguments(hidden_act="tanh"), "hidden_act: expected None without a hidden cell"),
        (
            arguments(hidden_cell=nn.RNNCell(8, 2), hidden_size=99),
            "brings its own size and activation, found hidden_size=99",
        ),
        (arguments(hidden_cell=nn.RNNCell(8, 2), hidden_act="relu"), "found hidden_act='relu'"),
        (arguments(encoder_act="swoosh"), "encoder_act: expected one of"),
        (arguments(algorithm="parallel"), "algorithm: expected one of"),
        (arguments(algorithm="fft", memory_to_memory=True), "feed the state back"),
        (arguments(algorithm="lookahead"), "'lookahead' is for hidden_to_memory or memory_to_memory"),
        (arguments(algorithm="final", return_sequences=True), "return_sequences=True needs all"),
        (arguments(algorithm="final", hidden_cell="rnn", hidden_size=2), "a recurrent hidden cell needs all"),
        (arguments(bidirectional=True, stateful=True), "stateful: a bidirectional layer"),
        (arguments(bidirectional=True, hidden_cell=nn.RNNCell(8, 2)), "one cell per direction"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LMU(**kwargs)


def test_settings_without_effect_are_announced():
    with pytest.warns(UserWarning, match=r"recurrent_dropout=0.5 has no effect without memory_to_memory"):
        LMU(**arguments(recurrent_dropout=0.5))
    with pytest.warns(UserWarning, match="kernel_regularizer='l2' has no effect without a kernel"):
        LMU(**arguments(kernel_regularizer="l2", kernel_initializer=None, memory_d=3))


def test_stateful_after_inference_mode():
    layer = build("rnn", stateful=True, dtype=torch.float32)
    with torch.inference_mode():
        layer(torch.randn(2, 4, 3))
    layer(torch.randn(2, 4, 3))[0].sum().backward()
    layer.reset_state([0])
    layer.double()(torch.randn(2, 4, 3, dtype=F64))


def test_copies_share_the_delay_system():
    import copy
    import pickle

    layer = build("rnn")
    x = torch.randn(2, 4, 3, dtype=F64)
    expected, _ = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.cell.system() is layer.cell.system()
        assert torch.equal(other(x)[0], expected)


def test_steps_of_one_sequence_share_their_dropout():
    cell = LMU(40, 40, 2, 4.0, kernel_initializer=None, dropout=0.5).cell
    x = torch.ones(1, 40)
    masks = cell.sample_dropout(x)
    dropped = [cell(x, dropout=masks)[1].memory == 0 for _ in range(2)]
    assert torch.equal(*dropped)
    assert dropped[0].any()


def test_unstable_euler_on_request():
    assert LMU(**arguments(discretizer="euler", order=8, allow_unstable=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: layer(torch.zeros(2, 3)), "x: expected .batch, time, input_size=3"),
        (lambda layer: layer(torch.zeros(2, 5, 4)), "x: expected .*found .2, 5, 4."),
        (lambda layer: layer(torch.zeros(2, 0, 3)), "at least one row and one time step"),
        (lambda layer: layer(torch.zeros(2, 5, 1, 3)), "x: expected"),
        (lambda layer: layer(torch.zeros(2, 5, 3), mask=torch.ones(2, 4)), "mask: expected .2, 5."),
        (lambda layer: layer(torch.zeros(2, 5, 3), lengths=torch.ones(3)), "lengths: expected one whole number per row"),
        (lambda layer: layer(torch.zeros(2, 5, 3), lengths=torch.tensor([5, -1])), "values within 0..5"),
        (lambda layer: layer(torch.zeros(2, 5, 3), lengths=[5, 6]), "values within 0..5"),
        (lambda layer: layer(torch.zeros(2, 5, 3), lengths=torch.tensor([5.0, 2.0])), "one whole number per row"),
        (lambda layer: layer(torch.zeros(2, 5, 3, dtype=torch.int64)), "floating point numbers, found torch.int64"),
        (lambda layer: layer(torch.zeros(2, 5, 3), mask=torch.ones(2, 5), lengths=torch.ones(2)), "found both"),
        (lambda layer: layer(torch.zeros(2, 5, 3), [torch.zeros(2, 8)]), "initial_state: expected"),
        (lambda layer: layer.cell(torch.zeros(2, 5, 3)), "x: expected .batch, input_size=3"),
    ],
)
def test_wrong_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call(LMU(**arguments()))


def test_keys_of_the_state_dict_are_the_documented_names():
    layer = build("rnn_all", trainable_theta=True)
    expected = [
        "kernel",
        "recurrent_kernel",
        "bias",
        "theta_inv",
        "hidden_cell.weight_ih",
        "hidden_cell.weight_hh",
        "hidden_cell.bias",
    ]
    assert list(layer.state_dict()) == [f"cell.{name}" for name in expected]
    assert isinstance(layer(torch.randn(1, 2, 3, dtype=F64))[1], LMUState)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "dims"), [(1, 1), (1, 3), (2, 3), (3, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_state_encoded_last(inputs, dims, bias, padded):
    """Few inputs of a linear encoder go through time in place of many u."""
    options = {"return_sequences": False, "return_state": True, "use_bias": bias, "trainable_theta": True}
    layer = LMU(inputs, dims, 5, 9.0, **options).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.endswith("theta_inv"):
                parameter.uniform_(-1, 1)
    x = torch.randn(4, 23, inputs, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 23) > 0.3 if padded else None
    if padded:
        mask[2] = False
    weights = [x, *layer.parameters()]
    found = []
    for algorithm in ("naive", "final", "auto"):
        layer.algorithm = algorithm
        output, state = layer(x, mask=mask)
        grads = torch.autograd.grad((output**3).sum() + state.memory.sum(), weights)
        found.append((output, state.memory, *grads))
    for ours in found[1:]:
        for value, expected in zip(ours, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    if not padded:
        assert torch.autograd.gradgradcheck(lambda x: layer(x)[0] ** 2, x[:, :7].detach().requires_grad_())


def test_the_last_state_of_bfloat16_is_not_rounded_before_it_is_there():
    layer = LMU(1, 2, 6, 50.0, return_sequences=False)
    x = torch.randn(3, 200, 1)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
