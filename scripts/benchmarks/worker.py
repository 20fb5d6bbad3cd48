"""One contender in a process of its own: reads commands from stdin, answers with one line of JSON each.

    python worker.py CONTENDER CASE_JSON

Commands: "check" compares a run with the naive loop in float64; "run" times one forward and backward pass, in ms.
The keras-lmu contenders run in the Python of their own environment, which needs nothing of ours.
"""

import json
import os
import sys
import time


def torch_contender(name, case):
    import torch
    from torch import nn

    torch.manual_seed(0)
    x = torch.randn(case["batch"], case["steps"], case["input_size"])
    sequence = case.get("sequence", True)
    if name.startswith("nn."):
        layer = getattr(nn, name[3:])(case["input_size"], case["hidden_size"], batch_first=True)

        def call():
            return layer(x)[0]
    else:
        from lmu_hf import LMU

        coupled = case.get("coupled", False)
        arguments = {"hidden_to_memory": coupled, "memory_to_memory": coupled, "input_to_hidden": "hidden" in case}
        sizes = (case["input_size"], case["memory_d"], case["order"], float(case["theta"]))
        hidden = (case.get("hidden"), case.get("hidden_size"))
        layer = LMU(*sizes, *hidden, return_sequences=sequence, **arguments)
        layer.algorithm = "naive" if name == "naive" else "auto"

        def call():
            return layer(x)

    grad = torch.randn_like(call())

    def run():
        layer.zero_grad()
        call().backward(grad)

    def check():
        run()
        ours = [call().detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
        algorithm, layer.algorithm = layer.algorithm, "naive"
        layer.double().zero_grad()
        output = layer(x.double())
        output.backward(grad.double())
        exact = [output.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]
        layer.float()
        layer.algorithm = algorithm
        return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))

    return run, check, f"torch {torch.__version__}"


def keras_contender(name, case):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import keras_lmu
    import numpy as np
    import tensorflow as tf

    hidden = {"rnn": keras.layers.SimpleRNNCell, "lstm": keras.layers.LSTMCell}.get(case.get("hidden"))
    coupled = case.get("coupled", False)
    layer = keras_lmu.LMU(
        case["memory_d"],
        case["order"],
        case["theta"],
        hidden(case["hidden_size"]) if hidden else None,
        hidden_to_memory=coupled,
        memory_to_memory=coupled,
        input_to_hidden=hidden is not None,
        return_sequences=case.get("sequence", True),
    )
    x = tf.constant(np.random.default_rng(0).standard_normal((case["batch"], case["steps"], case["input_size"])), tf.float32)
    grad = tf.random.normal(layer(x).shape)

    @tf.function(jit_compile=name.endswith("XLA"))
    def step():
        with tf.GradientTape() as tape:
            output = layer(x)
        return tape.gradient(output, layer.trainable_variables, grad)

    def run():
        for part in step():
            part.numpy()

    return run, None, f"keras-lmu {keras_lmu.__version__}, tensorflow {tf.__version__}"


def main():
    name, case = sys.argv[1], json.loads(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr
    run, check, version = (keras_contender if name.startswith("keras") else torch_contender)(name, case)
    run()  # compiles, allocates
    for command in sys.stdin:
        if command.strip() == "check":
            answer = check() if check else None
        elif command.strip() == "run":
            start = time.perf_counter()
            run()
            answer = 1e3 * (time.perf_counter() - start)
        else:
            answer = version
        print(json.dumps(answer), file=answers, flush=True)


main()
