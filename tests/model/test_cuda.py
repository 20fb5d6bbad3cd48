"""On a CUDA device, where there is one: kernels, layers, models and streams against the naive loop in float64 on the CPU."""

import copy

import pytest
import torch
from test_kernels import CASES, FEEDBACK, TRITON, close, force_rows, named, run, run_feedback
from torch import nn

from lmu_hf import LMU, LMUConfig, LMUForCausalLM, LMUForSequenceClassification
from lmu_hf.model.scan import NaiveScan, scan_class

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# As in test_kernels, too large for the interpreter: more rows than processors, chunks and hidden sizes as in use.
LARGE = [
    ("tanh", 100, 212, 1, 32, 100, 1),
    ("tanh", 300, 212, 1, 64, 130, 2),
    ("tanh", 1025, 96, 4, 8, 40, 4),
    ("relu", 7, 1000, 0, 1, 20, 1),
    ("tanh", 5, 128, 64, 8, 30, 1),
    ("lstm", 100, 212, 1, 32, 70, 1),
    ("gru", 33, 64, 3, 16, 40, 1),
]
LARGE_FEEDBACK = [
    ("tanh", 100, 212, 1, 1, 256, 32, 100, 1),
    ("tanh", 300, 212, 2, 2, 250, 16, 40, 2),
    # From registers: several rows to each program, all chunks in one launch; and so many rows that each chunk has its own.
    ("tanh", 300, 212, 1, 1, 256, 32, 70, 1),
    # (Not with relu: of a million sums one lies within rounding of 0, where its derivative jumps.)
    ("tanh", 400, 60, 3, 3, 33, 8, 50, 1),
    ("tanh", 1000, 100, 1, 1, 40, 16, 50, 1),
    ("lstm", 7, 64, 8, 8, 100, 8, 30, 1),
]


@pytest.fixture(autouse=True)
def exact_products():
    """float32 means float32 in what the tests compare with, too."""
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = before


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("runs", "case"),
    [(run, case) for case in CASES + LARGE] + [(run_feedback, case) for case in FEEDBACK + LARGE_FEEDBACK],
    ids=named,
)
def test_kernels_equal_the_naive_scan(runs, case, monkeypatch):
    from lmu_hf.model import triton_scan

    *case, rows = case
    force_rows(monkeypatch, rows)
    with torch.device("cuda"):
        results = runs(triton_scan.TritonScan, *case)
        for ours, naive in zip(results, runs(NaiveScan, *case), strict=True):
            # Sums of up to 7,000 products in float32, added in another order.
            close(ours, naive, 2e-5)


LAYERS = {
    "coupled": {"hidden_cell": "rnn", "hidden_to_memory": True, "memory_to_memory": True},
    "coupled lstm": {"hidden_cell": "lstm", "hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True},
    "coupled gru": {"hidden_cell": "gru", "hidden_to_memory": True, "input_to_hidden": True},
    "coupled, encoder_act": {"hidden_cell": "rnn", "hidden_to_memory": True, "encoder_act": "tanh"},
    "coupled, dense": {"hidden_cell": "dense", "memory_to_memory": True},
    "rnn": {"hidden_cell": "rnn", "input_to_hidden": True},
    "lstm": {"hidden_cell": "lstm"},
    "gru": {"hidden_cell": "gru"},
    "torch's": {"hidden_cell": nn.LSTMCell(2 * 12, 10)},
    "memory": {"hidden_cell": None},
    "readout": {"hidden_cell": "readout"},
    "theta of its own": {"hidden_cell": "rnn", "theta": [30.0, 70.0], "trainable_theta": True},
}


def made(name):
    torch.manual_seed(0)
    arguments = {"input_size": 3, "memory_d": 2, "order": 12, "theta": 50.0, **LAYERS[name]}
    hidden = arguments["hidden_cell"]
    if isinstance(hidden, str) and hidden != "readout":
        arguments["hidden_size"] = 10
    arguments["hidden_cell"] = copy.deepcopy(hidden)
    return LMU(**arguments, return_sequences=True, return_state=True)


def everything(layer, x, lengths):
    """Outputs, states and gradients."""
    x = x.clone().requires_grad_()
    output, state = layer(x, lengths=lengths)
    results = [output, *state.tensors()]
    loss = sum((part * torch.linspace(-1, 1, part.numel()).to(part).view_as(part)).sum() for part in results)
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [part.detach().double().cpu() for part in [*results, *torch.autograd.grad(loss, [x, *parameters])]]


@pytest.mark.parametrize("steps", [1, 97, 300])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_the_naive_loop(name, steps):
    layer = made(name)
    x, lengths = torch.randn(5, steps, 3), torch.tensor([steps, 0, 1, steps // 2, steps])
    ours = everything(layer.cuda(), x.cuda(), lengths.cuda())
    layer = layer.cpu().double()
    layer.algorithm = "naive"
    for one, exact in zip(ours, everything(layer, x.double(), lengths), strict=True):
        # Rounding in float32 through 300 steps, some of them coupled.
        close(one, exact, 2e-4)


@pytest.mark.parametrize("hidden_size", [1, 8, 212])
@pytest.mark.parametrize("name", ["coupled", "coupled, encoder_act", "coupled gru", "rnn", "lstm", "theta of its own"])
def test_one_number_a_step(name, hidden_size):
    """Products with a side of one, which torch and cuBLAS treat in ways of their own."""
    torch.manual_seed(0)
    arguments = {"theta": 50.0, **LAYERS[name], "input_to_hidden": True}
    arguments["theta"] = arguments["theta"][:1] if isinstance(arguments["theta"], list) else arguments["theta"]
    layer = LMU(1, 1, 12, hidden_size=hidden_size, return_sequences=True, return_state=True, **arguments)
    x, lengths = torch.randn(5, 97, 1), torch.tensor([97, 0, 1, 50, 97])
    ours = everything(layer.cuda(), x.cuda(), lengths.cuda())
    layer = layer.cpu().double()
    layer.algorithm = "naive"
    for one, exact in zip(ours, everything(layer, x.double(), lengths), strict=True):
        close(one, exact, 2e-4)


@pytest.mark.parametrize("algorithm", ["final", "chunked", "fft", "naive"])
@pytest.mark.parametrize("tf32", [False, True])
def test_the_memory_is_float32_whatever_the_process_allows(algorithm, tf32):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    layer = LMU(1, 1, 256, 784.0, return_sequences=algorithm != "final").cuda()
    x = torch.randn(3, 784, 1)
    layer.algorithm = "auto" if algorithm == "final" else algorithm
    ours = layer(x.cuda())
    layer = layer.cpu().double()
    layer.algorithm = "naive"
    close(ours.double().cpu(), layer(x.double()), 2e-5)


@pytest.mark.parametrize("name", ["coupled", "gru", "lstm"])
def test_autocast_to_bfloat16(name):
    layer = made(name).cuda()
    x = torch.randn(5, 97, 3, device="cuda")
    exact, state = layer(x)
    with torch.autocast("cuda", torch.bfloat16):
        output, rounded = layer(x)
    close(output.float(), exact, 0.05)
    close(rounded.memory.float(), state.memory, 0.05)


@pytest.mark.parametrize("name", ["coupled", "coupled gru", "lstm", "memory", "coupled, encoder_act"])
def test_streams_equal_sequences(name):
    layer = made(name).cuda().eval()
    x = torch.randn(4, 60, 3, device="cuda")
    with torch.no_grad():
        outputs, _ = layer(x)
        step = layer.stepper(4)
        streamed = torch.stack([step(x[:, t]) for t in range(60)], dim=1)
    close(streamed, outputs, 1e-4)


def test_padded_rows_get_what_they_get_alone():
    torch.manual_seed(0)
    sizes = {"memory_d": 4, "order": 8, "theta": 40.0, "hidden_size": 32, "num_hidden_layers": 2}
    coupled = {"hidden_cell": "rnn", "hidden_to_memory": True}
    model = LMUForSequenceClassification(LMUConfig(input_size=2, num_labels=5, **sizes, **coupled)).cuda().eval()
    x, mask = torch.randn(3, 70, 2, device="cuda"), torch.ones(3, 70, device="cuda")
    mask[0, 40:] = mask[1, :30] = mask[2, 20:50] = 0
    logits = model(input_values=x, attention_mask=mask).logits
    for row in range(3):
        alone = model(input_values=x[row : row + 1, mask[row] > 0]).logits
        close(logits[row : row + 1], alone, 1e-4)


def test_generation_equals_that_of_the_cpu():
    torch.manual_seed(0)
    sizes = {"memory_d": 8, "order": 8, "theta": 50.0, "hidden_size": 32, "num_hidden_layers": 2}
    model = LMUForCausalLM(LMUConfig(vocab_size=100, input_size=32, hidden_cell="gru", **sizes)).eval()
    prompt = torch.randint(100, (3, 12))
    text = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert model.cuda().generate(prompt.cuda(), max_new_tokens=20, do_sample=False).cpu().equal(text)


def test_float64_takes_the_naive_scan():
    assert scan_class(torch.ones(2, dtype=torch.float64, device="cuda")) is NaiveScan


def test_second_derivative_of_the_memory():
    layer = LMU(2, 2, 12, 50.0, return_sequences=True).double()
    x = torch.randn(3, 97, 2, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        layer, inputs = layer.to(device), x.to(device).requires_grad_()
        (grad,) = torch.autograd.grad(layer(inputs).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), inputs)[0].cpu())
    close(found[1], found[0], 1e-10)


def test_streams_do_not_wait_for_each_other():
    """Programs that wait for all others of their launch, of two launches that do not fit the device together."""
    torch.manual_seed(0)
    layers = [LMU(1, 1, 64, 100.0, "rnn", 100, hidden_to_memory=True, return_sequences=True).cuda() for _ in range(2)]
    inputs = [torch.randn(100, 200, 1, device="cuda") for _ in layers]

    def gradients(layer, x):
        return torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))

    alone = [gradients(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(20):
        together = []
        for stream, layer, x in zip(streams, layers, inputs, strict=True):
            with torch.cuda.stream(stream):
                together.append(gradients(layer, x))
    torch.cuda.synchronize()
    for ours, expected in zip(together, alone, strict=True):
        for one, exact in zip(ours, expected, strict=True):
            close(one, exact, 1e-6)
