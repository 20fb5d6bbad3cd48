"""Tiny models, processors and inputs, made on the spot."""

import torch

from lmu_hf import (
    LMUConfig,
    LMUForCausalLM,
    LMUForSequenceClassification,
    LMUForTimeSeriesPrediction,
    LMUForTokenClassification,
    LMUModel,
)

CLASSES = (
    LMUModel,
    LMUForSequenceClassification,
    LMUForTokenClassification,
    LMUForCausalLM,
    LMUForTimeSeriesPrediction,
)
SMALL = {"order": 6, "theta": 12.0, "hidden_size": 8, "num_labels": 3, "initializer_range": 0.3}
CONFIGS = {
    "signal": {"input_size": 2},
    "tokens": {"vocab_size": 11, "input_size": 5, "pad_token_id": 0},
    "coupled": {"input_size": 2, "hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True},
    "dense": {"input_size": 2, "hidden_cell": "dense", "hidden_act": "relu", "input_to_hidden": True},
    "memory": {"input_size": 2, "hidden_cell": None},
    "deep": {"input_size": 2, "num_hidden_layers": 3, "memory_d": 2, "theta": [[5.0], [9.0, 14.0], [30.0]]},
    "mean": {"input_size": 2, "pooling": "mean", "hidden_cell": "gru"},
    "max": {"input_size": 2, "pooling": "max", "hidden_cell": "lstm"},
    "both_ways": {"input_size": 2, "num_hidden_layers": 2, "bidirectional": True},
    "backwards": {"input_size": 2, "num_hidden_layers": 2, "go_backwards": True},
    "residual": {
        "input_size": 2,
        "block_type": "residual",
        "num_hidden_layers": 2,
        "memory_d": 8,
        "theta": [[5.0], [30.0]],
        "kernel_initializer": None,
        "hidden_cell": "readout",
        "pooling": "mean",
    },
    "residual_last": {"input_size": 2, "block_type": "residual", "num_hidden_layers": 2, "memory_d": 3, "hidden_cell": None},
    "trained_theta": {"input_size": 2, "trainable_theta": True, "memory_d": 2, "theta": [5.0, 20.0]},
}
# Those that can go on from a state.
FORWARD = [name for name in CONFIGS if name not in ("both_ways", "backwards")]

# Every class with every configuration that it takes.
EVERY = [
    (cls, name)
    for cls in CLASSES
    for name, kwargs in CONFIGS.items()
    if (cls is not LMUForTimeSeriesPrediction or (name in FORWARD and "vocab_size" not in kwargs))
    and (cls is not LMUForCausalLM or name in FORWARD)
]


def config(name, **kwargs):
    """One of the configurations."""
    return LMUConfig(**{**SMALL, **CONFIGS[name], **kwargs})


def build(cls, name, **kwargs):
    """A model in eval mode with fixed weights; a language model gets tokens in place of signals."""
    torch.manual_seed(3)
    if cls is LMUForCausalLM:
        kwargs = {"vocab_size": 11, "pad_token_id": 0, **kwargs}
    return cls(config(name, **kwargs)).eval()


def inputs(model, batch=4, steps=15):
    """Random inputs for a model."""
    if model.config.vocab_size is not None:
        return {"input_ids": torch.randint(1, model.config.vocab_size, (batch, steps))}
    return {"input_values": torch.randn(batch, steps, model.config.input_size)}


def labels(model, batch=4, steps=15):
    """Random labels for a model with a head."""
    count = model.config.num_labels
    return {
        LMUForSequenceClassification: lambda: torch.randint(count, (batch,)),
        LMUForTokenClassification: lambda: torch.randint(count, (batch, steps)),
        LMUForCausalLM: lambda: torch.randint(model.config.vocab_size, (batch, steps)),
        LMUForTimeSeriesPrediction: lambda: torch.randn(batch, steps, model.config.input_size),
    }[type(model)]()


def padding(side, steps, lengths):
    """A mask (rows, steps) with the given numbers of valid steps, on one side or scattered."""
    lengths = torch.tensor(lengths)[:, None]
    if side == "holes":
        return torch.rand(len(lengths), steps).argsort(1) < lengths
    position = torch.arange(steps)
    return position < lengths if side == "right" else position >= steps - lengths


def poison(batch, mask):
    """The inputs with NaN, or a wrong token, at padded steps."""
    ((key, values),) = batch.items()
    poisoned = values.clone()
    poisoned[~mask] = 7 if key == "input_ids" else torch.nan
    return {key: poisoned}


def cut(batch, rows=slice(None), steps=slice(None)):
    """Some rows and steps of the inputs."""
    return {key: value[rows][:, steps] for key, value in batch.items()}
