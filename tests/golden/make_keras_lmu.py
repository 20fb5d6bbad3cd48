"""Make the golden numbers `keras_lmu.<name>.npz`: what keras-lmu 0.9.0 computes, in float64.

Run it in an environment of its own with `keras-lmu==0.9.0` and `tensorflow-cpu`:

    python make_keras_lmu.py

keras-lmu is used through its public interface only. Each file in this folder holds one configuration as
two arrays: `values`, a flat float64 vector, and `index`, UTF-8 JSON in a uint8 array:

    {"config": {"class", "layer", "hidden", "seed", "versions"}, "arrays": {name: [offset, shape], ...}}

`layer` has the arguments of the layer, `hidden` its hidden cells as [class, arguments] (none, one, or the
stack in order). The arrays are x, y (outputs of all steps), m (memory after each step, memory_d-major),
state1, state2, ... (hidden states after each step), A and B (discrete, m' = A m + B u), g_out, every
weight w.<name>, and the gradients grad.x and grad.w.<name> of the loss sum(y * g_out).

Before a file is written, `naive` (plain NumPy, float64) recomputes all of it, gradients by complex steps.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_lmu
import numpy as np
import scipy.linalg
import tensorflow as tf

BATCH, STEPS, UNITS, ORDER, MEMORY_D = 2, 7, 4, 3, 2
TOLERANCE = 1e-12
FIRST_SEED = 26  # one that leaves every relu unit alive
LAYER = {
    "memory_d": MEMORY_D,
    "order": ORDER,
    "theta": 6.0,
    "trainable_theta": False,
    "hidden_to_memory": False,
    "memory_to_memory": False,
    "input_to_hidden": False,
    "discretizer": "zoh",
    "kernel_initializer": "glorot_uniform",
    "use_bias": False,
    "dropout": 0,
    "recurrent_dropout": 0,
}


def dense(units=UNITS):
    return "Dense", {"units": units, "activation": "tanh", "use_bias": True}


def simple(units=UNITS, activation="tanh"):
    return "SimpleRNNCell", {"units": units, "activation": activation, "use_bias": True}


def gated(name, **kwargs):
    kwargs |= {"units": UNITS, "activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True}
    return name, kwargs


H2M, M2M, I2H = {"hidden_to_memory": True}, {"memory_to_memory": True}, {"input_to_hidden": True}
EULER, TRAINABLE = {"discretizer": "euler", "theta": 20.0}, {"trainable_theta": True}
BIAS, NO_KERNEL = {"use_bias": True}, {"kernel_initializer": None}

# name: (hidden cells, layer arguments that differ from LAYER, input size)
CONFIGS = {
    "dense_h2m_m2m": ([dense()], H2M | M2M, 3),
    "gru_euler_trainable": ([gated("GRUCell", reset_after=True)], EULER | TRAINABLE | H2M | I2H, 3),
    "kernel_none_lstm": ([gated("LSTMCell")], NO_KERNEL | I2H, MEMORY_D),
    "none_m2m": ([], M2M, 3),
    "rnn_all_bias_i2h": ([simple()], H2M | M2M | I2H | BIAS, 3),
    "lstm_h2m": ([gated("LSTMCell")], H2M, 3),
    "rnn_relu_trainable_zoh": ([simple(activation="relu")], TRAINABLE, 3),
    "stacked_h2m": ([simple(), simple()], H2M, 3),
    "kernel_none_h2m": ([simple(units=1)], NO_KERNEL | H2M, 1),
    "none_i2h_ff": ([], I2H, 3),
}


# ------------------------------------------------------------------ keras-lmu


def measure_ab(layer):
    """The discrete A and B that keras-lmu uses, measured by stepping a bare memory."""
    names = "order", "theta", "discretizer", "trainable_theta"
    cell = keras_lmu.LMUCell(1, hidden_cell=None, kernel_initializer=None, **{k: layer[k] for k in names})
    cell.build((1, 1))
    for v in cell.weights:
        v.assign(1 / layer["theta"])
    n = layer["order"]
    a, _ = cell(tf.zeros((n, 1), tf.float64), [tf.eye(n, dtype=tf.float64)])
    b, _ = cell(tf.ones((1, 1), tf.float64), [tf.zeros((1, n), tf.float64)])
    return a.numpy().T, b.numpy().T


def run_keras(cells, layer, feedforward, input_size, rng):
    """All arrays of one configuration, with random weights, inputs and output gradient."""
    hidden = [getattr(keras.layers, name)(**kwargs) for name, kwargs in cells]
    top = None if not hidden else hidden[0] if len(hidden) == 1 else keras.layers.StackedRNNCells(hidden)
    if feedforward:
        model = keras_lmu.LMUFeedforward(hidden_cell=top, return_sequences=True, **layer)
    else:
        cell = keras_lmu.LMUCell(hidden_cell=top, **layer)
        model = keras.layers.RNN(cell, return_sequences=True)
    x = tf.constant(rng.uniform(-1, 1, (BATCH, STEPS, input_size)))
    model(x)  # builds the weights

    in_hidden = {id(v) for h in hidden for v in h.weights}
    weights = {f"w.lmu.{v.name}": v for v in model.weights if id(v) not in in_hidden}
    for i, h in enumerate(hidden):
        owner = "hidden" if len(hidden) == 1 else f"hidden{i}"
        weights |= {f"w.{owner}.{v.name}": v for v in h.weights}
    for name, v in weights.items():  # keras-lmu starts theta_inv at a float32 1/theta
        v.assign(1 / layer["theta"] if name == "w.lmu.theta_inv" else rng.uniform(-0.5, 0.5, v.shape))

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x)
        g_out = rng.uniform(-1, 1, y.shape)
        loss = tf.reduce_sum(y * g_out)
    grads = tape.gradient(loss, {"x": x} | {name: v.value for name, v in weights.items()})

    if feedforward:
        over_time = [y[..., : MEMORY_D * ORDER]]
    else:
        states = [tf.zeros((BATCH, size), tf.float64) for size in np.atleast_1d(cell.state_size)]
        trace = []
        for t in range(STEPS):
            _, states = cell(x[:, t], states)
            trace.append(states)
        over_time = [tf.stack(s, axis=1) for s in zip(*trace, strict=True)]

    out = {"x": x, "y": y, "m": over_time[0]}
    out |= {f"state{i}": s for i, s in enumerate(over_time[1:], 1)}
    out |= dict(zip("AB", measure_ab(LAYER | layer), strict=True)) | {"g_out": g_out} | weights
    out |= {f"grad.{name}": g for name, g in grads.items()}
    out = {name: keras.ops.convert_to_numpy(v) for name, v in out.items()}
    assert all(v.dtype == np.float64 for v in out.values())
    return out


# ---------------------------------------------------------------- plain NumPy


def discretize(order, theta_inv, method):
    i, j = np.ogrid[:order, :order]
    a = theta_inv * (2 * i + 1) * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    b = theta_inv * (2 * i + 1) * (-1.0) ** i
    if method == "euler":
        return np.eye(order) + a, b
    e = scipy.linalg.expm(np.block([[a, b], [np.zeros((1, order + 1))]]))
    return e[:order, :order], e[:order, order:]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def cell_step(name, kwargs, w, z, states):
    """One step of a Keras cell: its new states, the output first."""
    act = {"tanh": np.tanh, "relu": lambda v: np.where(v.real > 0, v, 0)}[kwargs["activation"]]
    if name == "Dense":
        return [act(z @ w["kernel"] + w["bias"])]
    h = states[0]
    if name == "SimpleRNNCell":
        return [act(z @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"])]
    if name == "GRUCell":
        zx, rx, cx = np.split(z @ w["kernel"] + w["bias"][0], 3, axis=-1)
        zh, rh, ch = np.split(h @ w["recurrent_kernel"] + w["bias"][1], 3, axis=-1)
        keep = sigmoid(zx + zh)
        return [keep * h + (1 - keep) * act(cx + sigmoid(rx + rh) * ch)]
    gates = z @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"]
    i, f, c, o = np.split(gates, 4, axis=-1)
    c = sigmoid(f) * states[1] + sigmoid(i) * act(c)
    return [sigmoid(o) * act(c), c]


def naive(cells, layer, values):
    """y, m, state1, ... by a plain loop over time; complex values give complex results."""

    def part(owner):
        prefix = f"w.{owner}."
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

    x, lmu = values["x"], part("lmu")
    hidden = [part("hidden" if len(cells) == 1 else f"hidden{i}") for i in range(len(cells))]
    a, b = discretize(ORDER, lmu.get("theta_inv", 1 / layer["theta"]), layer["discretizer"])
    m = np.zeros((BATCH, MEMORY_D * ORDER))
    states = [[np.zeros((BATCH, kw["units"]))] * (1 + (name == "LSTMCell")) for name, kw in cells]
    trace = []
    for t in range(STEPS):
        # of a stack, the *first* cell feeds the memory
        u = np.concatenate([x[:, t], states[0][0]], axis=-1) if layer["hidden_to_memory"] else x[:, t]
        u = u @ lmu["kernel"] if "kernel" in lmu else u
        u = u + lmu.get("bias", 0)
        if layer["memory_to_memory"]:
            u = u + m @ lmu["recurrent_kernel"]
        m = m.reshape(BATCH, MEMORY_D, ORDER) @ a.T + u[..., None] * b.T
        m = m.reshape(BATCH, -1)
        z = np.concatenate([m, x[:, t]], axis=-1) if layer["input_to_hidden"] else m
        for i, (name, kwargs) in enumerate(cells):
            states[i] = cell_step(name, kwargs, hidden[i], z, states[i])
            z = states[i][0]
        trace.append([z, m, *(s for cell in states for s in cell)])
    y, m, *rest = (np.stack(v, axis=1) for v in zip(*trace, strict=True))
    return {"y": y, "m": m} | {f"state{i}": s for i, s in enumerate(rest, 1)}


def check(cells, layer, got):
    """Largest differences (forward, gradients) between keras-lmu and `naive`."""
    want = naive(cells, layer, got)
    want |= dict(zip("AB", discretize(ORDER, 1 / layer["theta"], layer["discretizer"]), strict=True))
    assert max(abs(np.linalg.eigvals(want["A"]))) <= 1
    assert (got["y"] != 0).any((0, 1)).all()
    forward = max(abs(got[k] - v).max() for k, v in want.items())

    backward, h = 0.0, 1e-30
    inputs = {k: got[k] for k in got if f"grad.{k}" in got}
    for name, value in inputs.items():
        for at in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[at] += 1j * h
            y = naive(cells, layer, inputs | {name: moved})["y"]
            slope = (y * got["g_out"]).sum().imag / h
            backward = max(backward, abs(slope - got[f"grad.{name}"][at]))
    assert set(inputs) == {"x"} | {k for k in got if k.startswith("w.")}
    assert set(got) == {"g_out"} | set(want) | set(inputs) | {f"grad.{k}" for k in inputs}
    assert max(forward, backward) < TOLERANCE, (forward, backward)
    return forward, backward


# ----------------------------------------------------------------------- main


def save(path, config, arrays):
    index, offset = {}, 0
    for name, v in arrays.items():
        index[name] = [offset, list(v.shape)]
        offset += v.size
    text = json.dumps({"config": config, "arrays": index}, separators=(",", ":"))
    values = np.concatenate([v.ravel() for v in arrays.values()])
    np.savez_compressed(path, values=values, index=np.frombuffer(text.encode(), np.uint8))


def main():
    keras.config.set_floatx("float64")
    modules = {"keras-lmu": keras_lmu, "keras": keras, "tensorflow": tf, "numpy": np, "scipy": scipy}
    versions = {name: module.__version__ for name, module in modules.items()}
    for seed, (name, (cells, changed, input_size)) in enumerate(CONFIGS.items(), FIRST_SEED):
        layer = LAYER | changed
        feedforward = name.endswith("_ff")
        cell_only = {"trainable_theta", "hidden_to_memory", "memory_to_memory", "recurrent_dropout"}
        given = {k: v for k, v in layer.items() if not (feedforward and k in cell_only)}
        arrays = run_keras(cells, given, feedforward, input_size, np.random.default_rng(seed))
        forward, backward = check(cells, layer, arrays)
        path = Path(__file__).with_name(f"keras_lmu.{name}.npz")
        kind = "LMUFeedforward" if feedforward else "LMUCell"
        config = {"class": kind, "layer": layer, "hidden": cells, "seed": seed, "versions": versions}
        save(path, config, arrays)
        size = path.stat().st_size
        print(f"{name:24}{size:6} bytes, naive differs by {forward:.1e} (gradients {backward:.1e})")


if __name__ == "__main__":
    main()
