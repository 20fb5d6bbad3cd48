"""Files with the structure that the packages write (compared with theirs in test_anchors.py), and a plain computation of the
models in them: NumPy, float64, one step after the other."""

import io
import json
import zipfile

import h5py
import numpy as np
import scipy.linalg

GATES = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3, "Dense": 1}
SNAKE = {"SimpleRNN": "simple_rnn_cell", "LSTM": "lstm_cell", "GRU": "gru_cell", "Dense": "dense"}


def discrete(order, theta, method="zoh"):
    i, j = np.ogrid[:order, :order]
    a = (2 * i + 1) * np.where(i < j, -1.0, (-1.0) ** (i - j + 1)) / theta
    b = (2 * i[:, 0] + 1) * (-1.0) ** i[:, 0] / theta
    if method == "euler":
        return np.eye(order) + a, b
    e = scipy.linalg.expm(np.block([[a, b[:, None]], [np.zeros((1, order + 1))]]))
    return e[:order, :order], e[:order, order]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def hard_sigmoid(z):
    """That of Keras 2."""
    return np.clip(0.2 * z + 0.5, 0, 1)


def cell_step(kind, w, z, states, reset_after=True, sigmoid=sigmoid):
    """One step of a Keras cell: its new states, the output first."""
    if kind == "Dense":
        return [np.tanh(z @ w["kernel"] + w["bias"])]
    h = states[0]
    if kind == "SimpleRNN":
        return [np.tanh(z @ w["kernel"] + h @ w["recurrent_kernel"] + w.get("bias", 0))]
    if kind == "GRU" and not reset_after:
        zx, rx, cx = np.split(z @ w["kernel"] + w["bias"], 3, axis=-1)
        zh, rh, ch = np.split(w["recurrent_kernel"], 3, axis=-1)
        keep = sigmoid(zx + h @ zh)
        return [keep * h + (1 - keep) * np.tanh(cx + (sigmoid(rx + h @ rh) * h) @ ch)]
    if kind == "GRU":
        zx, rx, cx = np.split(z @ w["kernel"] + w["bias"][0], 3, axis=-1)
        zh, rh, ch = np.split(h @ w["recurrent_kernel"] + w["bias"][1], 3, axis=-1)
        keep = sigmoid(zx + zh)
        return [keep * h + (1 - keep) * np.tanh(cx + sigmoid(rx + rh) * ch)]
    i, f, c, o = np.split(z @ w["kernel"] + h @ w["recurrent_kernel"] + w["bias"], 4, axis=-1)
    c = sigmoid(f) * states[1] + sigmoid(i) * np.tanh(c)
    return [sigmoid(o) * np.tanh(c), c]


class Made:
    """One LMU with random weights and a softmax classifier.

    ``generation`` is "2019", "first" (keras-lmu with A and B as weights) or "0.9"; ``cells`` are classes of Keras, one, none or
    a stack. The input is (batch, time, ``inputs``).
    """

    def __init__(self, generation="0.9", cells=("SimpleRNN",), seed=0, *, units=4, order=6, theta=9.0, inputs=3, **options):
        self.generation, self.cells, self.units = generation, list(cells), units
        self.order, self.theta, self.inputs = order, theta, inputs
        self.memory_d = 1 if generation == "2019" else options.pop("memory_d", 2)
        self.method = options.pop("method", "zoh")
        self.classes = options.pop("classes", 3)
        self.reset_after, self.hard = options.pop("reset_after", True), options.pop("hard_sigmoid", False)
        if generation == "2019":
            self.hidden_bias = options.pop("hidden_bias", False)
            options = {"hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True}
        self.options = options
        rng = np.random.default_rng(seed)

        def weight(*shape):
            return (rng.normal(size=shape) * (0.7 / np.sqrt(shape[0]) if len(shape) > 1 else 0.3)).astype(np.float32)

        fed_back = units if options.get("hidden_to_memory") else 0
        has_kernel = options.get("kernel_initializer", "") is not None
        self.own = {"kernel": weight(inputs + fed_back, self.memory_d)} if has_kernel else {}
        if options.get("use_bias"):
            self.own["bias"] = weight(self.memory_d)
        if options.get("trainable_theta"):
            self.own["theta_inv"] = np.float32(1.25 / theta)
        if options.get("memory_to_memory"):
            self.own["recurrent_kernel"] = weight(self.memory_d * order, self.memory_d)
        size = self.memory_d * order + (inputs if options.get("input_to_hidden") else 0)
        self.hidden = []
        for kind in self.cells:
            w = {"kernel": weight(size, GATES[kind] * units)}
            if kind != "Dense":
                w["recurrent_kernel"] = weight(units, GATES[kind] * units)
            if generation != "2019" or self.hidden_bias:
                w["bias"] = weight(2, 3 * units) if kind == "GRU" and self.reset_after else weight(GATES[kind] * units)
            self.hidden.append(w)
            size = units
        self.head = {"kernel": weight(size, self.classes), "bias": weight(self.classes)}

    def __call__(self, x):
        """The model's output, float64."""
        return self.classify(self.steps(x)[:, -1])

    def classify(self, z):
        """The head."""
        head = double(self.head)
        return softmax(z @ head["kernel"] + head["bias"])

    def steps(self, x):
        """Output of the LMU at every step, float64."""
        theta = 1 / float(self.own["theta_inv"]) if "theta_inv" in self.own else self.theta
        ad, bd = discrete(self.order, theta, self.method)
        own, hidden = double(self.own), [double(w) for w in self.hidden]
        x = x.astype(np.float64)
        m = np.zeros((len(x), self.memory_d, self.order))
        states = [[np.zeros((len(x), self.units))] * (1 + (kind == "LSTM")) for kind in self.cells]
        outputs = []
        for t in range(x.shape[1]):
            e = np.concatenate([x[:, t], states[0][0]], -1) if self.options.get("hidden_to_memory") else x[:, t]
            u = (e @ own["kernel"] if "kernel" in own else e) + own.get("bias", 0)
            if "recurrent_kernel" in own:
                u = u + m.reshape(len(x), -1) @ own["recurrent_kernel"]
            m = m @ ad.T + u[..., None] * bd
            z = m.reshape(len(x), -1)
            z = np.concatenate([z, x[:, t]], -1) if self.options.get("input_to_hidden") else z
            for index, kind in enumerate(self.cells):
                states[index] = cell_step(
                    kind, hidden[index], z, states[index], self.reset_after, hard_sigmoid if self.hard else sigmoid
                )
                z = states[index][0]
            outputs.append(z)
        return np.stack(outputs, axis=1)

    def x(self, batch=3, steps=17):
        return np.random.default_rng(99).uniform(-1, 1, (batch, steps, self.inputs)).astype(np.float32)

    # ------------------------------------------------------------ configuration

    def hidden_config(self):
        serialized = []
        for index, kind in enumerate(self.cells):
            config = {"name": SNAKE[kind] + (f"_{index}" if index else ""), "units": self.units, "activation": "tanh"}
            config["use_bias"] = True
            if kind in ("LSTM", "GRU"):
                config["recurrent_activation"] = "hard_sigmoid" if self.hard else "sigmoid"
            if kind == "GRU":
                config["reset_after"] = self.reset_after
            serialized.append({"class_name": kind if kind == "Dense" else f"{kind}Cell", "config": config})
        if len(serialized) < 2:
            return serialized[0] if serialized else None
        return {"class_name": "StackedRNNCells", "config": {"name": "stacked_rnn_cells", "cells": serialized}}

    def cell_config(self):
        if self.generation == "2019":
            config = {"units": self.units, "order": self.order, "theta": self.theta, "method": self.method}
            return {"name": "lmu_cell", **config, "factor": "LegendreDelay", "hidden_activation": "tanh"}
        config = {"memory_d": self.memory_d, "order": self.order, "theta": self.theta, "hidden_cell": self.hidden_config()}
        if self.generation == "0.9":
            config["discretizer"] = self.method
        return {"name": "lmu_cell", **config, **self.options}

    def config(self):
        """The model as Keras 2 serializes it."""
        cell = {"class_name": "LMUCell", "config": self.cell_config()}
        layers = [
            {"class_name": "InputLayer", "config": {"batch_input_shape": [None, None, self.inputs], "name": "input_1"}},
            {"class_name": "RNN", "config": {"name": "rnn", "return_sequences": False, "time_major": False, "cell": cell}},
            {
                "class_name": "Dense",
                "config": {"name": "dense_9", "units": self.classes, "activation": "softmax", "use_bias": True},
            },
        ]
        return {"class_name": "Sequential", "config": {"name": "sequential", "layers": layers}}

    # ------------------------------------------------------------ files

    def named(self):
        """Layer -> path -> array, as in Keras 2."""
        ad, bd = discrete(self.order, self.theta, self.method)
        own = dict(self.own)
        arrays = {}
        if self.generation == "2019":
            (cell,) = self.hidden
            arrays["input_encoders"], arrays["hidden_encoders"] = np.split(own["kernel"], [self.inputs])
            arrays["memory_encoders"] = own["recurrent_kernel"]
            arrays["memory_kernel"], arrays["input_kernel"] = np.split(cell["kernel"], [self.order])
            arrays["hidden_kernel"] = cell["recurrent_kernel"]
            if "bias" in cell:
                arrays["bias"] = cell["bias"]
            arrays["AT"], arrays["BT"] = (ad - np.eye(self.order)).T, bd[None]
        else:
            for (index, kind), w in zip(enumerate(self.cells), self.hidden, strict=True):
                name = SNAKE[kind] + (f"_{index}" if index else "")
                arrays |= {f"{name}/{role}": array for role, array in w.items()}
            arrays |= own
            if self.generation == "first":
                arrays["A"], arrays["B"] = ad.T, bd[None]
        return {
            "rnn": {f"rnn/lmu_cell/{path}:0": np.asarray(array, np.float32) for path, array in arrays.items()},
            "dense_9": {f"dense_9/{role}:0": array for role, array in self.head.items()},
        }

    def h5(self, path, *, layers=None, config=True, text=str, pieces=1, prefix="", optimizer=True):
        """Keras 2's HDF5. ``text=bytes`` and ``pieces`` vary how attributes are stored, ``prefix`` the names of weights."""
        layers = self.named() if layers is None else layers

        def encode(value):
            return value.encode() if text is bytes else value

        def names(group, key, values):
            values = [encode(value) for value in values]
            if pieces == 1:
                group.attrs[key] = values
                return
            for index, piece in enumerate(np.array_split(np.array(values, dtype=object), pieces)):
                group.attrs[f"{key}{index}"] = list(piece)

        with h5py.File(path, "w") as file:
            weights = file.create_group("model_weights") if config else file
            if config:
                file.attrs["model_config"] = encode(json.dumps(self.config() if config is True else config))
                file.attrs["training_config"] = encode(json.dumps({"loss": "categorical_crossentropy"}))
                file.attrs["keras_version"] = encode("2.12.0")
                if optimizer:
                    file["optimizer_weights/Adam/m/rnn/kernel:0"] = np.zeros((3, 1), np.float32)
            names(weights, "layer_names", ["input_1", *layers])
            names(weights.create_group("input_1"), "weight_names", [])
            for name, arrays in layers.items():
                group = weights.create_group(name)
                names(group, "weight_names", [prefix + key for key in arrays])
                for key, array in arrays.items():
                    group[prefix + key] = array
        return path

    def groups(self):
        """Group -> arrays, as in Keras 3."""
        base = "layers/rnn/cell"
        order = ("kernel", "bias", "theta_inv", "recurrent_kernel")
        groups = {base: [self.own[role] for role in order if role in self.own]}
        if self.generation == "2019":
            roles = (
                "input_encoders",
                "hidden_encoders",
                "memory_encoders",
                "input_kernel",
                "hidden_kernel",
                "memory_kernel",
            )
            named = self.named()["rnn"]
            groups = {base: [named[f"rnn/lmu_cell/{role}:0"] for role in (*roles, "AT", "BT")]}
        elif len(self.cells) == 1:
            groups[f"{base}/hidden_cell"] = list(self.hidden[0].values())
        else:
            counts = {}
            for kind, w in zip(self.cells, self.hidden, strict=True):
                counts[kind] = counts.get(kind, -1) + 1
                name = SNAKE[kind] + (f"_{counts[kind]}" if counts[kind] else "")
                groups[f"{base}/hidden_cell/cells/{name}"] = list(w.values())
        groups["layers/dense"] = list(self.head.values())
        return groups

    def weights_h5(self, path):
        with h5py.File(path, "w") as file:
            for group, arrays in self.groups().items():
                for place, array in enumerate(arrays):
                    file[f"{group}/vars/{place}"] = array
            file["optimizer/vars/0"] = np.int64(1)
        return path

    def keras(self, path, **members):
        """Keras 3's archive; ``members`` replace what is in it."""
        buffer = io.BytesIO()
        self.weights_h5(buffer)
        contents = {
            "metadata.json": json.dumps({"keras_version": "3.15.1"}),
            "config.json": json.dumps(self.config()),
            "model.weights.h5": buffer.getvalue(),
        } | {name.replace("_", "."): value for name, value in members.items()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                if content is not None:
                    archive.writestr(name, content)
        return path


def double(arrays):
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}
