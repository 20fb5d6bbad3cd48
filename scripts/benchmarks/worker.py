"""One contender in a process of its own: reads commands from stdin, answers with one line of JSON each.

    python worker.py CONTENDER CASE_JSON

Commands: "check" compares a run with the naive loop in float64; "run" times forward and backward passes, in ms each: one alone,
or, where it is short, as many as follow one another in a tenth of a second, after one that wakes the threads; "stream" times
single steps without gradients, in microseconds each; "memory", which has to come first, says by how many MiB a training step
exceeds what the process held before it, at its peak; "version" tells what runs. The keras-lmu contenders run in the Python of
their own environment, which needs nothing of ours.
"""

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path

# Steps that come before a measurement of memory, so that what is built once is there.
WARM_STEPS = 64
STREAM_STEPS = 1000
# Seconds of a run that is timed alone. Shorter ones would measure how their threads wake up.
LONG = 0.1


class TorchContender:
    """A layer of ours, "ours", "ours in segments" or "naive", or of torch, "nn.LSTM"."""

    def __init__(self, name, case):
        import torch
        from torch import nn

        torch.manual_seed(0)
        self.version = f"torch {torch.__version__}"
        self.x = torch.randn(case["batch"], case["steps"], case["input_size"])
        self.ours = not name.startswith("nn.")
        if not self.ours:
            self.layer = getattr(nn, name[3:])(case["input_size"], case["hidden_size"], batch_first=True)
        else:
            from lmu_hf import LMU

            coupled, hidden = case.get("coupled", False), case.get("hidden")
            arguments = {"hidden_to_memory": coupled, "memory_to_memory": coupled, "input_to_hidden": hidden is not None}
            sizes = (case["input_size"], case["memory_d"], case["order"], float(case["theta"]))
            cell = (hidden, case["hidden_size"]) if hidden else ()
            self.layer = LMU(*sizes, *cell, return_sequences=case.get("sequence", True), **arguments)
            self.layer.algorithm = "naive" if name == "naive" else "auto"
        self.segments = case["segments"] if name == "ours in segments" else None
        with torch.no_grad():
            shape = self.call(self.x[:, :2]).shape
        self.grad = torch.randn(*shape[:1], case["steps"], *shape[2:]) if len(shape) == 3 else torch.randn(shape)

    def call(self, x):
        output = self.layer(x)
        return output[0] if isinstance(output, tuple) else output

    def run(self, steps=None):
        if self.segments:  # short runs have some, too
            self.layer.checkpoint_steps = min(self.segments, (steps or self.x.shape[1]) // 2)
        self.layer.zero_grad()
        output = self.call(self.x[:, :steps])
        output.backward(self.grad[:, :steps] if self.grad.ndim == 3 else self.grad)

    def release(self):
        """Gives back what is kept for the next run."""
        if self.ours:
            from lmu_hf import native

            native.release_memory()

    def check(self):
        """The largest relative error of output and gradients beside the naive loop in float64."""
        layer = self.layer
        self.run()
        ours = [self.call(self.x).detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
        algorithm, layer.algorithm = layer.algorithm, "naive"
        layer.double().zero_grad()
        output = layer(self.x.double())
        output.backward(self.grad.double())
        exact = [output.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]
        layer.float()
        layer.algorithm = algorithm
        return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))

    def streaming(self):
        """A function that feeds one sample more."""
        import torch
        from torch import nn

        sample = self.x[:, 0].contiguous()
        if self.ours:
            self.version += f", {(step := self.layer.stepper(len(sample))).loop}"
            return lambda: step(sample)
        layer = self.layer
        kind = {"RNN": nn.RNNCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell}[type(layer).__name__]
        cell = kind(layer.input_size, layer.hidden_size)
        state = None

        def run():
            nonlocal state
            with torch.inference_mode():
                state = cell(sample, state)

        return run


class KerasContender:
    """keras-lmu's layer, as one traced function, compiled by XLA if the name says so."""

    def __init__(self, name, case):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import keras
        import keras_lmu
        import numpy as np
        import tensorflow as tf

        self.version = f"keras-lmu {keras_lmu.__version__}, tensorflow {tf.__version__}"
        hidden = {"rnn": keras.layers.SimpleRNNCell, "lstm": keras.layers.LSTMCell}.get(case.get("hidden"))
        coupled = case.get("coupled", False)
        sizes = (case["memory_d"], case["order"], case["theta"], hidden(case["hidden_size"]) if hidden else None)
        connections = {"hidden_to_memory": coupled, "memory_to_memory": coupled, "input_to_hidden": hidden is not None}
        layer = keras_lmu.LMU(*sizes, **connections, return_sequences=case.get("sequence", True))
        self.build_cell = lambda: keras_lmu.LMUCell(*sizes, **connections)
        self.tf = tf
        size = (case["batch"], case["steps"], case["input_size"])
        self.x = tf.constant(np.random.default_rng(0).standard_normal(size), tf.float32)
        grad = tf.random.normal(layer(self.x).shape)

        @tf.function(jit_compile=name.endswith("XLA"))
        def step():
            with tf.GradientTape() as tape:
                output = layer(self.x)
            return tape.gradient(output, layer.trainable_variables, grad)

        self.step = step

    def run(self, steps=None):
        for part in self.step():
            part.numpy()

    def release(self):
        pass

    def streaming(self):
        tf, cell = self.tf, self.build_cell()
        sample = self.x[:, 0]
        cell.build(sample.shape)
        step = tf.function(cell.call)
        states = [tf.zeros((sample.shape[0], size)) for size in tf.nest.flatten(cell.state_size)]

        def run():
            nonlocal states
            output, states = step(sample, states)
            output.numpy()

        return run


def timed(run, long=LONG):
    """What a run takes, in ms; one that takes less than ``long`` seconds is repeated for so long."""
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    if took > long:
        return 1e3 * took
    runs, start, took = 0, time.perf_counter(), 0.0
    while took < long:
        run()
        runs, took = runs + 1, time.perf_counter() - start
    return 1e3 * took / runs


def memory(contender):
    """MiB at the peak of a training step beyond what is held before it."""
    contender.run(WARM_STEPS)
    contender.run(WARM_STEPS)
    gc.collect()
    contender.release()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    contender.run()
    return (resident("VmHWM") - before) / 1024


def resident(name):
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main():
    name, case = sys.argv[1], json.loads(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr
    contender = (KerasContender if name.startswith("keras") else TorchContender)(name, case)
    warm, streaming = False, None
    for line in sys.stdin:
        command = line.strip()
        if command == "version":
            answer = contender.version
        elif command == "memory":
            answer = memory(contender)
        elif command == "check":
            answer = contender.check()
        elif command == "stream":
            if streaming is None:
                streaming = contender.streaming()
                for _ in range(STREAM_STEPS):
                    streaming()
            start = time.perf_counter()
            for _ in range(STREAM_STEPS):
                streaming()
            answer = 1e6 * (time.perf_counter() - start) / STREAM_STEPS
        else:
            if not warm:
                contender.run()  # compiles, allocates
                warm = True
            answer = timed(contender.run)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
