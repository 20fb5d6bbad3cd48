"""Make checkpoints with the real packages, to convert them: `NAME.keras`, `NAME.h5`, weights alone, and `NAME.npz`.

    python make_keras_checkpoints.py FOLDER
    LMU_HF_KERAS_FILES=FOLDER python -m pytest tests/convert/test_real_files.py     # in the environment of this project

Run it once in each of several environments, which all write into the same folder:

| packages (Python 3.11)                                  | generation               |
|---------------------------------------------------------|--------------------------|
| keras-lmu==0.9.0 tensorflow-cpu                         | 0.9, Keras 3             |
| keras-lmu==0.9.0 tensorflow-cpu==2.15.1                 | 0.9, tf.keras 2          |
| keras-lmu==0.4.2 or 0.5.0 tensorflow-cpu==2.12.1        | their successors         |
| lmu==0.2.0 or keras-lmu==0.3.1 tensorflow-cpu==2.12.1   | first releases: A, B     |
| keras-lmu==0.3.1 tensorflow-cpu==2.3.4 (Python 3.8)     | the same                 |
| lmu==0.1.0 nengolib tensorflow-cpu==2.12.1              | the cell of 2019: AT, BT |

The packages are used through their public interface only. `NAME.npz` has inputs x and the outputs y of the original.
"""

import collections
import collections.abc
import inspect
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np


def revive_old_imports():
    """Names that nengo 2 expects of Python 3.6 and NumPy 1.15."""
    for name in collections.abc.__all__:
        if not hasattr(collections, name):
            setattr(collections, name, getattr(collections.abc, name))
    for kind in (float, int, bool, object, complex, str):
        if kind.__name__ not in vars(np):
            setattr(np, kind.__name__, kind)
    if not hasattr(inspect, "getargspec"):
        Spec = collections.namedtuple("Spec", "args varargs keywords defaults")
        inspect.getargspec = lambda function: Spec(*inspect.getfullargspec(function)[:4])


try:
    import keras_lmu as package

    NAME = "keras_lmu"
except ImportError:
    revive_old_imports()
    import lmu as package

    NAME = "lmu"
import tensorflow as tf  # noqa: E402

keras = tf.keras
KERAS_VERSION = keras.__version__  # the oldest have no package keras beside
layers = keras.layers
# Before, what ends like this became a folder of another format.
KERAS_FILES = (".keras",) if tuple(map(int, KERAS_VERSION.split(".")[:2])) >= (2, 12) else ()
VERSION = f"{NAME}-{package.__version__}-keras{KERAS_VERSION}"
OLDEST = NAME == "lmu" and package.__version__ == "0.1.0"
FIRST = not OLDEST and "use_bias" not in inspect.signature(package.LMUCell).parameters
BATCH, STEPS = 3, 23

H2M, M2M, I2H = {"hidden_to_memory": True}, {"memory_to_memory": True}, {"input_to_hidden": True}
ALL = {**H2M, **M2M, **I2H}


def lmu(cell, memory_d=2, order=6, theta=9.0, sequences=False, **kwargs):
    return package.LMU(memory_d, order, theta, cell, return_sequences=sequences, **kwargs)


def rnn(cell, memory_d=2, order=6, theta=9.0, sequences=False, **kwargs):
    return layers.RNN(package.LMUCell(memory_d, order, theta, cell, **kwargs), return_sequences=sequences)


def feedforward(cell, memory_d=2, order=6, theta=9.0, sequences=False, **kwargs):
    kind = getattr(package, "LMUFeedforward", None) or package.LMUFFT
    memory_d = 1 if FIRST else memory_d  # LMUFFT knew no other
    return kind(memory_d, order, theta, cell, return_sequences=sequences, **kwargs)


def old(units=5, order=6, theta=9.0, sequences=False, **kwargs):
    return layers.RNN(package.LMUCell(units, order, theta, **kwargs), return_sequences=sequences)


def stack(*cells):
    return layers.StackedRNNCells(list(cells))


def softmax(classes=4):
    return layers.Dense(classes, activation="softmax")


def both(cell, **kwargs):
    return layers.Bidirectional(rnn(cell, **kwargs))


def models():
    """name -> (input size, layers, loss); a negative size is a number of tokens."""
    if OLDEST:
        return {
            "zoh": (3, lambda: [old(), softmax()], "categorical_crossentropy"),
            "euler": (3, lambda: [old(theta=20.0, method="euler"), layers.Dense(2)], "mse"),
            "relu_sequences": (
                1,
                lambda: [
                    old(hidden_activation="relu", sequences=True),
                    old(hidden_activation="relu", theta=30, sequences=True),
                ],
                None,
            ),
            "order64": (1, lambda: [old(8, 64, 200.0), softmax()], "categorical_crossentropy"),
            "psmnist": (1, lambda: [old(212, 256, 784), softmax(10)], "categorical_crossentropy"),
        }
    made = {
        "rnn_softmax": (3, lambda: [lmu(layers.SimpleRNNCell(5), **ALL), softmax()], "sparse_categorical_crossentropy"),
        "relu_sigmoid": (
            3,
            lambda: [rnn(layers.SimpleRNNCell(5, activation="relu")), layers.Dense(1, activation="sigmoid")],
            "binary_crossentropy",
        ),
        "lstm_linear": (3, lambda: [lmu(layers.LSTMCell(5), **H2M), layers.Dropout(0.1), layers.Dense(2)], "mse"),
        "gru": (3, lambda: [lmu(layers.GRUCell(5), **I2H), softmax()], "sparse_categorical_crossentropy"),
        "dense_ff": (3, lambda: [feedforward(layers.Dense(5, activation="relu"), **I2H), softmax()], "mse"),
        "none_ff": (3, lambda: [lmu(None), softmax()], "sparse_categorical_crossentropy"),
        "no_kernel": (2, lambda: [lmu(layers.LSTMCell(5), kernel_initializer=None), softmax()], "mse"),
        "two_layers": (
            3,
            lambda: [lmu(layers.SimpleRNNCell(5), sequences=True), lmu(layers.SimpleRNNCell(5), theta=15.0), softmax()],
            "mse",
        ),
        "no_head_sequences": (3, lambda: [lmu(layers.SimpleRNNCell(5), sequences=True, **M2M)], None),
        "dense_behind": (3, lambda: [lmu(None), layers.Dense(7, activation="tanh"), softmax()], "mse"),
        "dropouts": (
            3,
            lambda: [
                lmu(layers.SimpleRNNCell(5, dropout=0.1), dropout=0.1, recurrent_dropout=0.2, **M2M),
                layers.Dropout(0.2),
                softmax(),
            ],
            "mse",
        ),
        "order64": (1, lambda: [lmu(layers.SimpleRNNCell(8), 1, 64, 200.0, **ALL), softmax()], "mse"),
        "psmnist": (1, lambda: [lmu(layers.SimpleRNNCell(212), 1, 256, 784, **I2H), softmax(10)], "mse"),
        "psmnist_coupled": (1, lambda: [rnn(layers.SimpleRNNCell(212), 1, 256, 784, **ALL), softmax(10)], "mse"),
        "pooled": (
            3,
            lambda: [lmu(layers.SimpleRNNCell(5), sequences=True), layers.GlobalAveragePooling1D(), softmax()],
            "mse",
        ),
        "head_per_step": (
            3,
            lambda: [lmu(layers.SimpleRNNCell(5), sequences=True), layers.TimeDistributed(layers.Dense(2))],
            "mse",
        ),
    }
    more = {
        "gru_reset_before": (3, lambda: [rnn(layers.GRUCell(5, reset_after=False), **H2M), softmax()], "mse"),
        "lstm_hard": (3, lambda: [rnn(layers.LSTMCell(5, recurrent_activation="hard_sigmoid")), softmax()], "mse"),
        "bidirectional": (
            3,
            lambda: [
                both(layers.LSTMCell(5), sequences=True, **H2M),
                both(layers.LSTMCell(5), theta=14.0, **H2M),
                softmax(),
            ],
            "mse",
        ),
        "bidirectional_steps": (3, lambda: [both(layers.GRUCell(5), sequences=True), softmax()], "mse"),
        "backwards": (
            3,
            lambda: [layers.RNN(package.LMUCell(2, 6, 9.0, layers.SimpleRNNCell(5)), go_backwards=True), softmax()],
            "mse",
        ),
        "tokens": (-17, lambda: [layers.Embedding(17, 4), rnn(layers.LSTMCell(5), **I2H), softmax()], "mse"),
        "nested": (3, lambda: [keras.Sequential([rnn(layers.SimpleRNNCell(5))]), softmax()], "mse"),
        "steps_softmax": (3, lambda: [lmu(layers.SimpleRNNCell(5), sequences=True), softmax()], "mse"),
    }
    made.update(more)
    if not FIRST:  # whose stacks fail in every TensorFlow that can still be installed
        later = {
            "stacked_cells": (
                3,
                lambda: [rnn(stack(layers.SimpleRNNCell(4), layers.SimpleRNNCell(4), layers.GRUCell(5))), softmax()],
                "mse",
            ),
            "stacked_h2m": (3, lambda: [lmu(stack(layers.LSTMCell(4), layers.SimpleRNNCell(4)), **H2M), softmax()], "mse"),
            "euler_theta": (
                3,
                lambda: [
                    lmu(layers.GRUCell(5), trainable_theta=True, discretizer="euler", theta=20.0, use_bias=True, **ALL),
                    softmax(),
                ],
                "mse",
            ),
            "zoh_theta": (3, lambda: [rnn(layers.Dense(5), trainable_theta=True, use_bias=True, **H2M), softmax()], "mse"),
        }
        made.update(later)
    return made


def randomise(model, rng):
    for variable in model.weights:
        path = getattr(variable, "path", variable.name)
        leaf = path.split("/")[-1].split(":")[0]
        if leaf in ("AT", "BT", "A", "B", "seed_generator_state"):
            continue
        if leaf == "theta_inv":
            # Moved, as training moves it.
            variable.assign(0.8 * np.asarray(variable))
            continue
        shape = tuple(variable.shape)
        scale = 0.3 if len(shape) < 2 else 0.7 / np.sqrt(shape[0])
        # Sixteenths, which compress well.
        variable.assign(np.round(16 * rng.normal(size=shape) * scale) / 16)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, (size, build, loss)) in enumerate(models().items()):
        rng = np.random.default_rng(seed)
        steps = 784 if name.startswith("psmnist") else STEPS
        tf.keras.backend.clear_session()
        # Fixed lengths let the older packages choose their parallel form; the functional model is the other way to build.
        length = steps if package.__version__ >= "0.9" or name.endswith("_ff") or steps == 784 else None
        inputs = keras.Input((length, size) if size > 0 else (length,))
        try:
            parts = build()
            if seed % 2:
                outputs = inputs
                for part in parts:
                    outputs = part(outputs)
                model = keras.Model(inputs, outputs)
            else:
                model = keras.Sequential([inputs, *parts])
        except Exception as error:  # some combinations of versions cannot make all models
            print(f"{VERSION}.{name}: not built: {str(error).splitlines()[0][:90]}")
            continue
        x = np.round(16 * rng.uniform(-1, 1, (BATCH, steps, abs(size)))) / 16
        x = (x if size > 0 else rng.integers(-size, size=(BATCH, steps))).astype(np.float32)
        randomise(model, rng)
        stem = folder / f"{VERSION}.{name}"
        if loss is not None:
            model.compile("adam", loss)
            before = model.get_weights()
            y = model.predict(x, verbose=0)
            # One step without a gradient, so that the optimizer has weights to save.
            model.fit(
                x,
                np.zeros(y.shape[:1] if loss.startswith("sparse") else y.shape),
                sample_weight=np.zeros(y.shape[:-1]),
                verbose=0,
            )
            model.set_weights(before)
        y = model.predict(x, verbose=0)
        for ending in (*KERAS_FILES, ".h5", ".weights.h5", "_weights.h5"):
            save = model.save_weights if "weights" in ending else model.save
            try:
                save(f"{stem}{ending}")
            except Exception as error:
                Path(f"{stem}{ending}").unlink(missing_ok=True)
                print(f"{stem.name}{ending}: not written: {str(error).splitlines()[0][:90]}")
        Path(f"{stem}.json").write_text(model.to_json())
        np.savez_compressed(f"{stem}.npz", x=x, y=y)
        print(stem.name, y.shape, float(np.abs(y).max()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
