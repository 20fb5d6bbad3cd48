"""Heads on an LMU: a label per sequence, a label per step, the next token."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils import can_return_tuple

from .cache_lmu import LMUCache, own_mask
from .configuration_lmu import LMUConfig
from .modeling_lmu import LMUModel, LMUPreTrainedModel
from .ragged import Packing, hold, pack, to_front, to_place

# What transformers' losses leave out.
IGNORED = -100


class _LMUClassifier(LMUPreTrainedModel):
    """What the heads that answer with labels share: dropout and a linear layer."""

    def __init__(self, config: LMUConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.model = LMUModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.output_size, self.num_labels)
        self.post_init()

    def project(self, hidden: Tensor) -> Tensor:
        """The logits (..., num_labels) of outputs (..., output_size)."""
        return self.score(self.dropout(hidden))


class LMUForSequenceClassification(_LMUClassifier):
    """An LMU with a linear layer on its pooled output, for one label, several labels or regression per sequence."""

    _auto_classes = (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    )

    pools = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LMUCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classifies sequences.

        Args:
            input_ids: see :meth:`LMUModel.forward`, as for the other inputs.
            attention_mask: non-zero where a step is valid (batch, time).
            input_values: signals (batch, time, input_size).
            inputs_embeds: embeddings (batch, time, input_size).
            past_key_values: the state to go on from; the logits are then those of everything since the beginning.
            labels: class per row (batch,), or 0/1 per label (batch, num_labels) float, or targets (batch, num_labels).
            use_cache: return the state after the last step.

        Returns:
            loss, the regularizers' penalties included, if labels are given; logits (batch, num_labels); past_key_values and
            hidden_states if asked for.
        """
        # With "last" pooling no other step's output is needed, unless somebody asked to see them. The two directions of a
        # bidirectional net end at different steps, which only the sequence shows.
        all_steps = (
            self.config.pooling != "last"
            or self.config.bidirectional
            or bool(kwargs.get("output_hidden_states", self.config.output_hidden_states))
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_values=input_values,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_sequences=all_steps,
            **kwargs,
        )
        logits = self.project(outputs.pooler_output)
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            whole = not labels.is_floating_point()
            problem = (
                "regression"
                if self.num_labels == 1
                else "single_label_classification"
                if whole
                else "multi_label_classification"
            )
        if problem == "single_label_classification":
            labels = labels.to(torch.int64)
            loss = self.loss_function(
                labels=labels,
                pooled_logits=logits,
                config=self.config,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        else:
            # transformers' own losses for these two ignore num_items_in_batch, so that four accumulation steps would count
            # four times.
            elementwise = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
            if labels.shape != logits.shape and (logits.shape[1] != 1 or labels.shape != logits.shape[:1]):
                raise ValueError(f"labels: expected {tuple(logits.shape)} for {problem}, found {tuple(labels.shape)}")
            targets = labels.to(device=logits.device, dtype=logits.dtype).view(logits.shape)
            if num_items_in_batch is None:
                loss = elementwise(logits, targets)
            else:
                loss = elementwise(logits, targets, reduction="sum") / num_items_in_batch
        return self.penalized(loss, labels.numel(), num_items_in_batch)


@dataclass
class LMUTokenClassifierOutput(TokenClassifierOutput):
    """A :class:`TokenClassifierOutput` with the state after the last step, ``past_key_values``."""

    past_key_values: LMUCache | None = None


class LMUForTokenClassification(_LMUClassifier):
    """An LMU with a linear layer on the output of every step: one label per token or per step of a signal."""

    _auto_classes = ("AutoModelForTokenClassification",)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LMUCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LMUTokenClassifierOutput:
        """Classifies steps.

        Args:
            input_ids: see :meth:`LMUModel.forward`, as for the other inputs.
            attention_mask: non-zero where a step is valid (batch, time).
            input_values: signals (batch, time, input_size).
            inputs_embeds: embeddings (batch, time, input_size).
            past_key_values: the state to go on from.
            labels: class per step (batch, time); -100, and any label at a padded step, is left out of the loss.
            use_cache: return the state after the last step.
            num_items_in_batch: labels in all accumulated batches, as the Trainer counts them.

        Returns:
            loss, the regularizers' penalties included, if labels are given; logits (batch, time, num_labels); past_key_values
            and hidden_states if asked for.

        Raises:
            ValueError: the labels have another shape.
        """
        mask = own_mask(attention_mask, past_key_values, input_ids, input_values, inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            input_values=input_values,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_sequences=True,
            **kwargs,
        )
        logits = self.project(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            labels = _check_labels(labels, logits)
            labels = labels if mask is None else labels.masked_fill(~mask.to(labels.device), IGNORED)
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch, **kwargs)
            loss = self.penalized(loss, (labels != IGNORED).sum(), num_items_in_batch)
        return LMUTokenClassifierOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


class LMUForCausalLM(LMUPreTrainedModel, GenerationMixin):
    """An LMU that predicts the next token, with ``generate``.

    Raises:
        ValueError: the configuration has no tokens, reads sequences from their end, or ties weights of different sizes.
    """

    _auto_classes = ("AutoModelForCausalLM",)

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LMUConfig):
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("vocab_size: a language model needs the number of tokens, found None; set vocab_size")
        for field in ("bidirectional", "go_backwards"):
            if getattr(config, field):
                raise ValueError(f"{field}: a language model must not see the tokens that it predicts; leave {field} out")
        if config.tie_word_embeddings and config.input_size != config.output_size:
            raise ValueError(
                f"tie_word_embeddings: needs embeddings as wide as the model's output, found input_size={config.input_size} "
                f"and an output of {config.output_size}; make them equal or set tie_word_embeddings=False"
            )
        self.model = LMUModel(config)
        self.lm_head = nn.Linear(config.output_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The model makes its own; generate's would have room for keys and values.
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LMUCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts each next token.

        Args:
            input_ids: tokens (batch, time).
            attention_mask: non-zero where a token is valid (batch, time), or with the tokens before, as ``generate`` gives it.
            inputs_embeds: embeddings (batch, time, input_size), in place of tokens.
            past_key_values: the state to go on from.
            labels: ``input_ids`` again (batch, time), shifted here; -100 is left out of the loss. Across padding the next
                valid token counts, so the loss of a padded row is that of the row alone.
            use_cache: return the state after the last token; outside training when None.
            logits_to_keep: compute the logits of that many last steps only, or of the steps with these numbers; of all
                when 0.
            num_items_in_batch: targets in all accumulated batches, as the Trainer counts them.
            **kwargs: for the model; ``shift_labels`` (batch, time) are labels that are shifted already, in place of ``labels``.

        Returns:
            loss, the regularizers' penalties included, if labels are given; logits (batch, time, vocab_size), at padded
            steps those of the last valid one before; past_key_values; hidden_states if asked for.

        Raises:
            ValueError: the labels have another shape.
        """
        # Not among the arguments, because the Trainer waits for every one that is named like a label.
        shift_labels = kwargs.pop("shift_labels", None)
        mask = own_mask(attention_mask, past_key_values, input_ids, inputs_embeds)
        before = getattr(past_key_values, "output", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=(not self.training) if use_cache is None else use_cache,
            return_sequences=True,
            **kwargs,
        )
        # At a padded step nothing has happened since the last token, so what comes next is what came next there. It lets
        # generate, which reads the last column, start from batches that are padded on the right too.
        hidden = outputs.last_hidden_state if mask is None else hold(outputs.last_hidden_state, mask, before)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.project(hidden[:, keep])
        loss = None
        if labels is not None or shift_labels is not None:
            if shift_labels is None:
                assert labels is not None
                packing = None if mask is None else pack(mask.to(labels.device))
                shift_labels = _next_labels(_check_labels(labels, hidden), packing)
            # The rest are shifted labels in place of labels, which transformers' loss takes as they are.
            loss = self.loss_function(
                logits=logits,
                labels=None,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels[:, keep],
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
            loss = self.penalized(loss, (shift_labels != IGNORED).sum(), num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def project(self, hidden: Tensor) -> Tensor:
        """The logits (..., vocab_size) of the token after outputs (..., output_size)."""
        return self.lm_head(hidden)


def _check_labels(labels: Tensor, outputs: Tensor) -> Tensor:
    if labels.shape != outputs.shape[:2]:
        raise ValueError(f"labels: expected (batch, time)={tuple(outputs.shape[:2])}, found {tuple(labels.shape)}")
    return labels.to(torch.int64)


def _next_labels(labels: Tensor, packing: Packing | None) -> Tensor:
    """For each step the label of the next valid one (batch, time); IGNORED at padded steps and after the last."""
    if packing is None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    # Counted from IGNORED, because zeros are what is put where there is no step.
    packed = to_front(labels - IGNORED, packing)
    return to_place(F.pad(packed[:, 1:], (0, 1)), packing) + IGNORED
