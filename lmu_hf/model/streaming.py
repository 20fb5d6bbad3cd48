"""Steps as they come: the same model, one sample at a time, for ever, in constant memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache_lmu import LMUCache
from .stepper import check_streams


class LMUStreamer:
    """A batch of independent streams through a model.

    Equals the model on everything fed so far, at the cost of the new steps only. Build one with ``model.streamer()``.

    Args:
        model: any LMU model; one that reads sequences from their end too is refused.
        batch_size: number of streams.

    Attributes:
        cache: the state; ``cache.state_dict()`` saves it, and assigning a cache goes on from it.

    Raises:
        ValueError: the model has no state to carry, or ``batch_size`` is no whole number >= 1.
    """

    def __init__(self, model: Any, batch_size: int = 1):
        config = model.config
        if config.bidirectional or config.go_backwards:
            field = "bidirectional" if config.bidirectional else "go_backwards"
            raise ValueError(
                f"streamer: a model with {field}=True needs the end of a sequence before its first output, so it cannot follow "
                "a stream; use a model that runs forward only"
            )
        self.model, self.batch_size = model, check_streams(batch_size)
        self.cache = LMUCache(config.num_hidden_layers)

    def step(self, sample: Tensor, active: Tensor | None = None) -> Tensor:
        """Feeds one step of each stream.

        Args:
            sample: (batch_size, input_size), or (batch_size,) for tokens or where ``input_size`` is 1.
            active: True where a stream has a new sample (batch_size,); the others stay as they are. All when None.

        Returns:
            The current prediction of each stream; see :meth:`feed`.

        Raises:
            ValueError: a shape is wrong.
        """
        if sample.ndim == 0 or sample.shape[0] != self.batch_size:
            raise ValueError(f"sample: expected one step of {self.batch_size} streams, found {tuple(sample.shape)}")
        return self.feed(sample[:, None], None if active is None else active[:, None])

    @torch.no_grad()
    def feed(self, steps: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Feeds some steps of each stream.

        Args:
            steps: (batch_size, time, input_size), or (batch_size, time) for tokens or where ``input_size`` is 1.
            attention_mask: non-zero where there is a sample (batch_size, time); everywhere when None.

        Returns:
            The prediction after the newest sample of each stream (batch_size, ...): the logits of a classifier over all that
            was fed since the beginning, of a tagger or language model for the newest step, the values of a forecaster, the
            output of a model without a head.

        Raises:
            ValueError: a shape is wrong.
        """
        if steps.ndim < 2 or steps.shape[0] != self.batch_size:
            raise ValueError(f"steps: expected {self.batch_size} streams with a time axis, found {tuple(steps.shape)}")
        model = self.model
        training = model.training
        if training:
            model.eval()
        try:
            outputs = model.base_model(
                **{model.main_input_name: steps},
                attention_mask=attention_mask,
                past_key_values=self.cache,
                return_sequences=model.config.pooling != "last",
            )
            current = outputs.pooler_output if model.pools else self.cache.output
            return model.project(current)
        finally:
            if training:
                model.train()

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Starts all streams anew, or the given ones (an index or boolean tensor or list)."""
        self.cache.reset(rows)
