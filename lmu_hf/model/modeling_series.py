"""Values to come: an LMU that predicts a time series, and rolls out its own predictions."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple

from .cache_lmu import LMUCache, own_mask, valid_steps
from .configuration_lmu import LMUConfig
from .modeling_lmu import LMUModel, LMUPreTrainedModel
from .ragged import pack, past, to_front, to_place


@dataclass
class LMUTimeSeriesOutput(ModelOutput):
    """Output of :class:`LMUForTimeSeriesPrediction`.

    Attributes:
        loss: mean error of the predictions, the regularizers' penalties included, if labels are given.
        predictions: (batch, time, prediction_length, target_size), without the time axis where the configuration says
            ``return_sequences=False`` and without the third where ``prediction_length`` is 1.
        past_key_values: the state after the last step, if asked for.
        hidden_states: if asked for.
    """

    loss: Tensor | None = None
    predictions: Tensor | None = None
    past_key_values: LMUCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class LMUForTimeSeriesPrediction(LMUPreTrainedModel):
    """An LMU with a linear layer that predicts values to come, after every step or after the last one.

    The prediction made at step t is of the steps t + horizon .. t + horizon + prediction_length - 1.

    Raises:
        ValueError: the configuration is one of tokens, or predicts every step from both ends.
    """

    _auto_classes = ("AutoModelForTimeSeriesPrediction",)

    main_input_name = "input_values"

    def __init__(self, config: LMUConfig):
        super().__init__(config)
        if config.vocab_size is not None:
            raise ValueError("vocab_size: a time series has values, not tokens; leave vocab_size out")
        for field in ("bidirectional", "go_backwards"):
            if getattr(config, field) and config.return_sequences:
                raise ValueError(
                    f"{field}: a prediction at every step must not see the steps to come; leave {field} out, or set "
                    "return_sequences=False for one prediction per sequence"
                )
        self.target_size = config.input_size if config.target_size is None else config.target_size
        self.model = LMUModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.output_size, config.prediction_length * self.target_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LMUCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LMUTimeSeriesOutput:
        """Predicts.

        Args:
            input_values: series (batch, time, input_size), or (batch, time) if ``input_size`` is 1.
            attention_mask: non-zero where a step is valid (batch, time).
            inputs_embeds: the same as ``input_values``.
            past_key_values: the state to go on from.
            labels: the true values, shaped like ``predictions``; a last axis of 1 may be missing. NaN where a value is not
                known: it is left out of the loss, as is every padded step. :meth:`targets` makes them from a series.
            use_cache: return the state after the last step.
            num_items_in_batch: numbers in the labels of all accumulated batches, as the Trainer counts them.

        Returns:
            :class:`LMUTimeSeriesOutput`.

        Raises:
            ValueError: the labels have another shape.
        """
        every = self.config.return_sequences
        mask = own_mask(attention_mask, past_key_values, input_values, inputs_embeds)
        outputs = self.model(
            input_values=input_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_sequences=every or self.config.bidirectional or bool(kwargs.get("output_hidden_states")),
            **kwargs,
        )
        predictions = self.project(outputs.last_hidden_state if every else outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self._loss(predictions, labels, mask if every else None, num_items_in_batch)
        return LMUTimeSeriesOutput(
            loss=loss,
            predictions=predictions,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def project(self, hidden: Tensor) -> Tensor:
        """Predictions (..., prediction_length, target_size) of outputs (..., output_size); the first left out if it is 1."""
        predictions = self._project(hidden)
        return predictions.squeeze(-2) if self.config.prediction_length == 1 else predictions

    def _project(self, hidden: Tensor) -> Tensor:
        return self.score(self.dropout(hidden)).unflatten(-1, (self.config.prediction_length, self.target_size))

    def _loss(
        self, predictions: Tensor, labels: Tensor, mask: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        labels = labels.to(predictions.device)
        if labels.shape != predictions.shape and (*labels.shape, 1) != predictions.shape:
            raise ValueError(
                f"labels: expected {tuple(predictions.shape)} like the predictions, found {tuple(labels.shape)}"
            )
        # Errors of values that are small differences of large ones need more than half precision.
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        predictions, labels = predictions.to(dtype), labels.reshape(predictions.shape).to(dtype)
        known = ~labels.isnan()
        if mask is not None:
            known = known & mask.to(known.device).view(*mask.shape, *[1] * (known.ndim - 2))
        labels = torch.where(known, labels, predictions.detach())
        if self.config.prediction_loss == "huber":
            total = F.huber_loss(predictions, labels, reduction="sum", delta=self.config.huber_delta)
        else:
            total = F.mse_loss(predictions, labels, reduction="sum")
        items = known.sum()
        loss = total / (items.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return self.penalized(loss, items, num_items_in_batch)

    def targets(self, series: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The labels for training on a series to predict itself, NaN past its end.

        Args:
            series: what is to be predicted (batch, time, target_size), or (batch, time) if that is 1.
            attention_mask: non-zero where a step is valid (batch, time).

        Returns:
            The true values of every step's prediction, shaped like ``predictions`` with ``return_sequences=True``.

        Raises:
            ValueError: a shape is wrong.
        """
        series = self._check_series("series", series, self.target_size)
        steps, unknown = series.shape[1], torch.full_like(series, torch.nan)
        mask = valid_steps(attention_mask, series.shape[0], steps)
        packing = None if mask is None else pack(mask)
        if packing is not None:
            series = torch.where(past(packing.lengths, steps)[..., None], unknown, to_front(series, packing))
        first, length = self.config.horizon, self.config.prediction_length
        longer = torch.cat([series, unknown[:, :1].expand(-1, first + length - 1, -1)], dim=1)
        ahead = torch.stack([longer[:, first + k : first + k + steps] for k in range(length)], dim=2)
        ahead = ahead if packing is None else to_place(ahead, packing)
        return ahead[:, :, 0] if length == 1 else ahead

    @torch.no_grad()
    def forecast(
        self,
        input_values: Tensor,
        steps: int,
        attention_mask: Tensor | None = None,
        past_key_values: LMUCache | None = None,
    ) -> Tensor:
        """Rolls out: predicts, takes the predictions for the values to come, and predicts from there.

        Each block of horizon + prediction_length - 1 values is predicted at once. Each value is the newest prediction of it.

        Args:
            input_values: the series so far (batch, time, input_size), or (batch, time) if ``input_size`` is 1; each row needs
                ``horizon`` valid steps.
            steps: number of values to predict.
            attention_mask: non-zero where a step is valid (batch, time).
            past_key_values: the state that ``input_values`` go on from. It is left as it is.

        Returns:
            The values after each row's last valid step (batch, steps, input_size).

        Raises:
            ValueError: the model does not predict its own inputs or has no state to go on from, or a row is too short.
        """
        config = self.config
        if self.target_size != config.input_size:
            raise ValueError(
                f"forecast: needs a model that predicts its own inputs, found target_size={self.target_size} and "
                f"input_size={config.input_size}"
            )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected a whole number >= 1, found {steps!r}")
        values = self._check_series("input_values", input_values, config.input_size)
        training = self.training
        self.eval()
        try:
            mask = valid_steps(attention_mask, values.shape[0], values.shape[1], past_key_values)
            shortest = values.shape[1] if mask is None else int(mask.sum(1).min())
            if shortest < config.horizon:
                raise ValueError(
                    f"input_values: needs horizon={config.horizon} valid steps per row, found a row with {shortest}; the values "
                    "right after the series are predicted from those"
                )
            outputs = self.model(
                input_values=values,
                attention_mask=mask,
                past_key_values=None if past_key_values is None else past_key_values.copy(),
                use_cache=True,
                return_sequences=True,
            )
            hidden = outputs.last_hidden_state
            if mask is not None:
                packing = pack(mask)
                index = packing.lengths[:, None] - config.horizon + torch.arange(config.horizon, device=hidden.device)
                hidden = to_front(hidden, packing).gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
            blocks, count = [], 0
            while True:
                made = self._project(hidden[:, -config.horizon :])
                # Each of the older predictions tells one value, the newest one all others.
                blocks.append(torch.cat([made[:, :-1, 0], made[:, -1]], dim=1))
                count += blocks[-1].shape[1]
                if count >= steps:
                    return torch.cat(blocks, dim=1)[:, :steps]
                hidden = self.model(
                    input_values=blocks[-1], past_key_values=outputs.past_key_values, return_sequences=True
                ).last_hidden_state
        finally:
            self.train(training)

    def _check_series(self, field: str, values: Tensor, size: int) -> Tensor:
        values = values[..., None] if values.ndim == 2 and size == 1 else values
        if values.ndim != 3 or values.shape[-1] != size or 0 in values.shape:
            raise ValueError(f"{field}: expected (batch >= 1, time >= 1, {size}), found {tuple(values.shape)}")
        return values
