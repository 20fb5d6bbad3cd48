"""What is measured: the sizes, for the driver and the workers of both worlds. Plain Python, imports nothing heavy."""

PSMNIST = {"input_size": 1, "memory_d": 1, "order": 256, "theta": 784, "hidden": "rnn", "hidden_size": 212, "steps": 784}
WIDE = {"input_size": 64, "memory_d": 64, "order": 8, "theta": 512, "hidden": "rnn", "hidden_size": 128, "steps": 4096}
SMALL = {"input_size": 28, "memory_d": 10, "order": 3, "theta": 28, "hidden": "lstm", "hidden_size": 10}
MEMORY = {"input_size": 1, "memory_d": 1, "order": 256, "theta": 784, "steps": 784}
PEERS = ["nn.RNN", "nn.LSTM", "nn.GRU"]

# name: what it is, its sizes, further contenders beside ours, the naive loop and keras-lmu.
CASES = {
    **{
        f"{kind}-{batch}": {
            "title": f"{kind}, psMNIST (T 784, order 256, tanh 212), batch {batch}",
            **PSMNIST,
            "coupled": kind == "coupled",
            "batch": batch,
            "peers": PEERS,
        }
        for kind in ("coupled", "uncoupled")
        for batch in (100, 32, 1)
    },
    "memory-all": {"title": "memory only, all states, batch 100", **MEMORY, "batch": 100, "sequence": True, "peers": []},
    "memory-last": {"title": "memory only, last state, batch 100", **MEMORY, "batch": 100, "sequence": False, "peers": []},
    "small-28": {
        "title": "memory_d 10, order 3, LSTM 10, T 28, batch 100",
        **SMALL,
        "steps": 28,
        "batch": 100,
        "peers": ["nn.LSTM"],
    },
    "small-784": {"title": "the same layer, T 784, batch 32", **SMALL, "steps": 784, "batch": 32, "peers": ["nn.LSTM"]},
    "wide-coupled": {
        "title": "coupled, memory_d 64, order 8, T 4096, tanh 128, batch 32",
        **WIDE,
        "coupled": True,
        "batch": 32,
        "peers": PEERS,
    },
    "wide-uncoupled": {
        "title": "uncoupled, memory_d 64, order 8, T 4096, tanh 128, batch 32",
        **WIDE,
        "batch": 32,
        "peers": PEERS,
    },
}

# One size varies, the others stay.
SCALING = {
    "input_size": 1,
    "memory_d": 1,
    "order": 64,
    "theta": 512,
    "hidden": "rnn",
    "hidden_size": 128,
    "steps": 512,
    "batch": 16,
}
SWEEPS = {
    "steps": [64, 256, 1024, 4096, 16384],
    "order": [4, 16, 64, 256, 512],
    "memory_d": [1, 4, 16, 64],
    "batch": [1, 4, 16, 64, 256],
}

# Long sequences, for what a training step holds in memory.
LONG = {**PSMNIST, "batch": 32}
FOOTPRINTS = {
    **{
        f"{name}-{steps}": {**LONG, **more, "steps": steps}
        for steps in (4096, 16384)
        for name, more in {
            "memory-all": {"hidden": None, "sequence": True, "peers": []},
            "memory-last": {"hidden": None, "sequence": False, "peers": []},
            "uncoupled": {"coupled": False, "peers": ["nn.RNN", "nn.LSTM"]},
            "coupled": {"coupled": True, "peers": ["nn.RNN", "nn.LSTM"]},
        }.items()
    },
    # The last output only, so that nothing as long as the sequence has to exist; ours, whole and in segments.
    "coupled-100000": {**LONG, "coupled": True, "sequence": False, "steps": 100_000, "peers": [], "segments": 2048},
}
