"""What ``auto`` chooses, that it is what runs, and that it says so."""

import pytest
import torch
from torch import nn

from lmu_hf import LMU, LMUConfig, LMUForSequenceClassification, linear_memory
from lmu_hf.model import layer as layer_module
from lmu_hf.model import plan as planning
from lmu_hf.model.compiled import available
from lmu_hf.model.costs import memory_algorithm, memory_costs
from lmu_hf.model.layer_costs import (
    Recurrence,
    lookahead_chunk,
    lookahead_costs,
    merged_cost,
    recurrence_algorithm,
    relaxed_cost,
    uncoupled_costs,
)
from lmu_hf.model.legendre import delay_system

COUPLED = {"hidden_to_memory": True, "memory_to_memory": True}
CASES = [
    ((1, 40, 40, 600.0, "rnn", 6), COUPLED, 40, None, "hidden_to_memory feeds the state back"),
    ((1, 40, 40, 600.0, "rnn", 6), {**COUPLED, "algorithm": "lookahead"}, 40, "lookahead", "feeds the state back"),
    ((1, 1, 8, 20.0, "rnn", 6), COUPLED, 40, "merged", "one product a step costs least"),
    ((1, 1, 8, 20.0, "rnn", 6), {**COUPLED, "algorithm": "lookahead"}, 40, "lookahead", "feeds the state back"),
    ((1, 1, 8, 20.0, "gru", 6), {"algorithm": "merged"}, 40, "merged", "algorithm='merged'"),
    ((1, 1, 8, 20.0, "rnn", 6), COUPLED, 1, "naive", "a single step"),
    ((1, 1, 8, 20.0, "rnn", 6), {**COUPLED, "encoder_act": "gelu"}, 40, "naive", "encoder_act"),
    ((1, 1, 8, 20.0, "rnn", 6), {**COUPLED, "encoder_act": "tanh"}, 40, "lookahead", "feeds the state back"),
    ((1, 1, 8, 20.0, "rnn", 6), {**COUPLED, "recurrent_dropout": 0.5}, 40, "naive", "dropout"),
    ((1, 1, 8, 20.0, "rnn", 6), {**COUPLED, "dropout": 0.5}, 40, "lookahead", "feeds the state back"),
    ((1, 1, 8, 20.0, nn.RNNCell(8, 6), None), {"hidden_to_memory": True}, 40, "merged", "one product"),
    ((1, 40, 40, 600.0, "lstm", 6), {"memory_to_memory": True}, 40, None, "computed first, by look-ahead"),
    ((1, 8, 64, 90.0, "rnn", 4), {}, 90, None, "known in advance"),
    ((1, 90, 4, 20.0, "gru", 60), {}, 40, "written", "known in advance"),
    ((1, 1, 8, 20.0, "rnn", 6), {"hidden_act": "gelu"}, 40, None, "known in advance"),
    ((1, 1, 8, 20.0, "dense", 6), {}, 40, "final", "known in advance"),
    ((1, 1, 8, 20.0), {"return_sequences": True, "algorithm": "fft"}, 40, "fft", "algorithm='fft'"),
    ((1, 1, 8, 20.0), {"return_sequences": True, "algorithm": "chunked"}, 40, "chunked", "algorithm='chunked'"),
    ((1, 1, 8, 20.0, "rnn", 6), {"algorithm": "naive"}, 40, "naive", "algorithm='naive'"),
]


@pytest.mark.parametrize(("arguments", "options", "steps", "memory", "reason"), CASES, ids=str)
def test_is_what_runs(arguments, options, steps, memory, reason, monkeypatch):
    layer = LMU(*arguments, **options)
    made = []
    monkeypatch.setattr(layer_module, "make_plan", lambda *a, **k: made.append(make_plan(*a, **k)) or made[-1])
    layer(torch.randn(3, steps, 1))
    explained = layer.explain(3, steps)
    assert made == [explained] * 2
    assert memory in (None, explained.memory)
    assert reason in explained.reason
    assert explained.memory in str(explained)
    assert (explained.chunk > 0) == (explained.memory in ("lookahead", "relaxed", "folded", "written", "chunked"))


make_plan = layer_module.make_plan


def test_what_runs_the_hidden_cell():
    loop = "compiled loop" if available(torch.zeros(0)) else "python loop"
    assert LMU(1, 1, 8, 20.0, "rnn", 6).explain(3, 40).hidden == loop
    assert LMU(1, 1, 8, 20.0, "rnn", 6, hidden_act="gelu").explain(3, 40).hidden == "step by step"
    assert LMU(1, 1, 8, 20.0, "dense", 6).explain(3, 40).hidden == "at once"
    assert LMU(1, 1, 8, 20.0).explain(3, 40).hidden is None


@pytest.mark.usefixtures("python_loop")
def test_without_the_compiled_loop():
    assert LMU(1, 1, 8, 20.0, "rnn", 6).explain(3, 40).hidden == "python loop"
    assert LMU(1, 1, 8, 20.0, return_sequences=True).explain(3, 4000).memory in ("chunked", "fft")
    with pytest.raises(ValueError, match="'scan' needs the compiled loop"):
        linear_memory(torch.zeros(2, 5, 1), delay_system(4, 8.0), algorithm="scan")


def test_training_and_evaluation_mode():
    layer = LMU(1, 1, 8, 20.0, "rnn", 6, **COUPLED, recurrent_dropout=0.5)
    assert layer.explain(3, 40).memory == "naive"
    assert layer.explain(3, 40, training=False).memory == layer.eval().explain(3, 40).memory == "merged"


@pytest.mark.parametrize(("batch", "steps"), [(0, 4), (4, 0)])
def test_sizes_are_checked(batch, steps):
    with pytest.raises(ValueError, match="at least one row and one step"):
        LMU(1, 1, 8, 20.0).explain(batch, steps)


def test_of_a_model():
    model = LMUForSequenceClassification(LMUConfig(order=4, hidden_size=3, num_hidden_layers=2, hidden_cell="dense"))
    first, last = model.explain(2, 30, return_sequences=False)
    assert first.memory != "final"
    assert last.memory == "final"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_memory_costs(training, compiled):
    """Every choice is one that the memory can carry out, and grows no cheaper with the sizes."""
    for order in (1, 8, 9, 32, 33, 256):
        for rows in (1, 7, 500):
            for steps in (1, 3, 20, 5000):
                costs = memory_costs(rows, steps, order, training=training, compiled=compiled)
                assert ("scan", 0) in costs or not compiled or order > 32
                longer = memory_costs(rows, 2 * steps, order, training=training, compiled=compiled)
                assert min(longer.values()) >= min(costs.values()) > 0
                sizes = {"return_sequence": True, "training": training, "compiled": compiled, "measured": True}
                name, chunk = memory_algorithm(rows, steps, order, **sizes)
                assert (chunk > 0) == (name == "chunked")


FEEDBACK = {"hidden_to_memory": False, "memory_to_memory": False}
KNOWN = {"training": True, "compiled": True, "measured": True}


def test_folds_where_the_memory_is_large():
    assert recurrence_algorithm(Recurrence(100, 784, 1, 256, 212, 212), **FEEDBACK, **KNOWN)[0] == "folded"
    assert recurrence_algorithm(Recurrence(100, 784, 1, 256, 212, 212), **FEEDBACK, **KNOWN, at_rest=True)[0] == "convolved"
    assert recurrence_algorithm(Recurrence(32, 4096, 64, 8, 128, 128), **FEEDBACK, **KNOWN)[0] == "written"


def test_relaxes_where_the_memory_is_large():
    feedback = {"hidden_to_memory": True, "memory_to_memory": True}
    large, small, wide, long = (
        Recurrence(100, 784, 1, 256, 212, 212),
        Recurrence(100, 784, 1, 8, 212, 212),
        Recurrence(64, 200, 1, 256, 1024, 4096),
        Recurrence(100, 16384, 1, 256, 212, 212),
    )
    assert recurrence_algorithm(large, **feedback, **KNOWN, at_rest=True) == ("relaxed", 25)
    assert recurrence_algorithm(large, **feedback, **KNOWN)[0] == "lookahead"
    assert recurrence_algorithm(large, **feedback, **KNOWN, at_rest=True, relaxes=False)[0] == "lookahead"
    assert (
        recurrence_algorithm(large, **feedback, training=True, compiled=False, measured=True, at_rest=True)[0] != "relaxed"
    )
    assert recurrence_algorithm(small, **feedback, **KNOWN, at_rest=True)[0] != "relaxed"
    assert recurrence_algorithm(wide, **feedback, **KNOWN, at_rest=True) == ("relaxed", 25)
    # Threads keep the sums of all steps of some rows.
    assert recurrence_algorithm(long, **feedback, **KNOWN, at_rest=True)[0] != "relaxed"


@pytest.mark.parametrize("hidden_to_memory", [False, True])
@pytest.mark.parametrize("memory_to_memory", [False, True])
def test_merges_where_the_memory_is_small(hidden_to_memory, memory_to_memory):
    feedback = {"hidden_to_memory": hidden_to_memory, "memory_to_memory": memory_to_memory}
    small, large = Recurrence(100, 28, 10, 3, 10, 40), Recurrence(100, 784, 1, 256, 212, 212)
    assert recurrence_algorithm(small, **feedback, **KNOWN) == ("merged", 0)
    assert recurrence_algorithm(small, **feedback, **KNOWN, merges=False)[0] != "merged"
    assert recurrence_algorithm(small, **feedback, training=True, compiled=False, measured=False)[0] != "merged"
    assert recurrence_algorithm(large, **feedback, **KNOWN)[0] != "merged"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("hidden_to_memory", [False, True])
@pytest.mark.parametrize("cell", [(64, 64), (64, 256)])
def test_recurrence_costs(compiled, hidden_to_memory, cell):
    """Nothing grows cheaper with the sizes, and a backward pass is not for nothing."""
    for batch, steps, dims, order in ((1, 784, 1, 256), (32, 784, 1, 256), (100, 28, 10, 3), (16, 4096, 64, 8)):
        sizes = Recurrence(batch, steps, dims, order, *cell)
        larger = [sizes._replace(**{name: 2 * getattr(sizes, name)}) for name in ("batch", "steps", "memory_d", "order")]

        def best(sizes, *, training):
            ways = [merged_cost(sizes, training=training, feedback=hidden_to_memory)]
            if hidden_to_memory:
                ways += lookahead_costs(sizes, training=training).values()
                ways.append(relaxed_cost(sizes, training=training)[1])
            else:
                ways += uncoupled_costs(sizes, training=training, compiled=compiled, at_rest=True).values()
            return min(ways)

        forward, whole = (best(sizes, training=training) for training in (False, True))
        assert 0 < forward < whole or not compiled
        # A second row may find an idle thread.
        assert all(best(more, training=training) >= min(forward, whole) for more in larger for training in (False, True))


def test_what_has_no_gradient_is_chosen_by_its_forward_pass(monkeypatch):
    asked = []
    choose = planning.recurrence_algorithm
    monkeypatch.setattr(planning, "recurrence_algorithm", lambda *a, **k: asked.append(k["training"]) or choose(*a, **k))
    layer, x = LMU(1, 1, 8, 20.0, "rnn", 6, **COUPLED), torch.zeros(2, 30, 1)
    layer(x)
    layer.cell.requires_grad_(False)
    layer(x)
    layer(x.clone().requires_grad_())
    layer.cell.hidden_cell.requires_grad_(True)
    layer(x)
    with torch.no_grad():
        layer(x)
    layer.explain(2, 30)
    layer.explain(2, 30, training=False)
    assert asked == [True, False, True, True, False, True, False]


def test_chunks_are_no_longer_than_the_sequence():
    assert lookahead_chunk(Recurrence(1, 3, 1, 256, 212, 212), training=True, measured=True) <= 3
    # Not measured: as long as it goes, but for a short kernel of many dimensions.
    assert lookahead_chunk(Recurrence(100, 784, 1, 256, 212, 212), training=True, measured=False) == 32
    assert lookahead_chunk(Recurrence(1, 3, 1, 256, 212, 212), training=True, measured=False) == 2
    assert lookahead_chunk(Recurrence(32, 4096, 64, 8, 128, 128), training=True, measured=False) == 8
    assert lookahead_chunk(Recurrence(32, 4096, 1000, 8, 0, 0), training=True, measured=False) == 1
    assert recurrence_algorithm(Recurrence(1, 3, 1, 256, 212, 212), **FEEDBACK, **KNOWN)[1] <= 8


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ((), {}, "all steps can be computed at once"),
        (("dense", 6), {"memory_to_memory": True}, "all steps can be computed at once"),
        (("rnn", 6), {"hidden_act": "gelu"}, "no form as affine gates"),
        (("rnn", 6), {**COUPLED, "encoder_act": "gelu"}, "encoder_act='gelu'"),
        (("rnn", 6), {**COUPLED, "encoder_act": "tanh"}, "u before the gates"),
        (("rnn", 6), {**COUPLED, "dropout": 0.5}, "u before the gates"),
    ],
)
def test_what_cannot_be_merged(arguments, options, reason):
    with pytest.raises(ValueError, match=f"'merged' .*{reason}"):
        LMU(1, 1, 8, 20.0, *arguments, algorithm="merged", **options)(torch.randn(2, 5, 1))


def test_transforms_are_for_memories_that_begin_empty_and_share_a_system():
    sizes = {"return_sequence": True, "training": True, "compiled": True, "measured": True}
    assert memory_algorithm(64, 784, 256, **sizes)[0] == "fft"
    assert memory_algorithm(64, 784, 256, **sizes, at_rest=False)[0] == "chunked"
    assert memory_algorithm(64, 784, 256, **sizes, systems=64)[0] == "chunked"


def test_what_a_layer_begins_with_counts():
    layer = LMU(1, 1, 256, 784.0, "rnn", 212, return_sequences=True, stateful=True)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "make_plan", lambda *a, **k: made.append(make_plan(*a, **k)) or made[-1])
        for _ in range(2):
            layer(torch.randn(32, 300, 1))
    expected = ["convolved", "folded"] if available(torch.zeros(1)) else ["folded", "folded"]
    assert [plan.memory for plan in made] == expected
