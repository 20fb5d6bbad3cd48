"""LMU models in the conventions of transformers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cells import ACTIVATIONS, reset_hidden_cell
from .configuration_lmu import LMUConfig
from .layer import LMU
from .lmu_cell import LMUCell
from .ragged import Packing, blank, last_valid, pack, reverse, to_front, to_place
from .weights import is_loaded


@dataclass
class LMUModelOutput(ModelOutput):
    """Output of :class:`LMUModel`.

    Attributes:
        last_hidden_state: output of the last layer (batch, time, output_size), zero at padded steps; time is 1 where only
            the last step was asked for.
        pooler_output: the output over time pooled as ``config.pooling`` says (batch, output_size).
        hidden_states: with ``output_hidden_states``, the input of the first layer and the output of each.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class LMUFeedForward(nn.Module):
    """Gated linear unit W_down (f(W_gate x) * W_up x)."""

    def __init__(self, config: LMUConfig):
        super().__init__()
        width = config.intermediate_size or 2 * config.width
        self.gate_proj = nn.Linear(config.width, width)
        self.up_proj = nn.Linear(config.width, width)
        self.down_proj = nn.Linear(width, config.width)
        self.act = ACTIVATIONS[config.feed_forward_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class LMUBlock(GradientCheckpointingLayer):
    """One layer: an LMU, in residual nets followed by a gated feed-forward part, each on the normed input and added to it.

    Args:
        config: the model's configuration.
        layer_idx: number of the layer.
        input_size: features per step that it receives.
    """

    def __init__(self, config: LMUConfig, layer_idx: int, input_size: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.lmu: LMU = config.build_layer(layer_idx, input_size)
        self.residual = config.block_type == "residual"
        if self.residual:
            self.mixer_norm = nn.RMSNorm(config.width, eps=config.layer_norm_epsilon)
            size = self.lmu.output_size
            self.out_proj = nn.Identity() if size == config.width else nn.Linear(size, config.width)
            self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.layer_norm_epsilon)
            self.feed_forward = LMUFeedForward(config)
            self.dropout = nn.Dropout(config.residual_dropout)

    @property
    def output_size(self) -> int:
        """Features per step of the output."""
        return self.feed_forward.down_proj.out_features if self.residual else self.lmu.output_size

    def forward(self, hidden_states: Tensor, packing: Packing | None = None, return_sequences: bool = True) -> Tensor:
        """Runs the layer.

        Args:
            hidden_states: (batch, time, features).
            packing: where the valid steps lie; all are valid when None.
            return_sequences: compute every step, or only the last valid one.

        Returns:
            (batch, time or 1, output_size), zero at padded steps.
        """
        lengths = None if packing is None else packing.lengths
        x = hidden_states if packing is None else to_front(hidden_states, packing)
        # Everything but the LMU works step by step, so the valid steps stay in front until the end.
        output, _ = self.lmu.run(
            self.mixer_norm(x) if self.residual else x, None, lengths, return_sequences=return_sequences
        )
        if not return_sequences:
            output = output[:, None]
        elif self.lmu.go_backwards:
            # Back in time order, so that the next layer runs from the end too.
            output = reverse(output, lengths)
        if self.residual:
            residual = x if return_sequences else last_valid(x, lengths)[:, None]
            output = residual + self.dropout(self.out_proj(output))
            output = output + self.dropout(self.feed_forward(self.feed_forward_norm(output)))
        if packing is None:
            return output
        if return_sequences:
            return to_place(output, packing)
        return output.masked_fill((packing.lengths == 0)[:, None, None], 0)


class LMUPreTrainedModel(PreTrainedModel):
    """What all LMU models share: initialisation, loading, and the conventions that transformers asks for."""

    config: LMUConfig
    base_model_prefix = "model"
    main_input_name = "input_values"
    input_modalities = ["text", "audio", "image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["LMUBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["theta_inv"]  # noqa: RUF012
    _is_stateful = True
    _can_record_outputs = {"hidden_states": LMUBlock}  # noqa: RUF012

    def __init__(self, config: LMUConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.vocab_size is not None:
            self.main_input_name = "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LMUCell):
            module.reset_own_parameters()
        elif getattr(module, "is_hidden_cell", False):
            # A cell of the user's may write its weights in a way that transformers' guard of loaded ones does not see.
            loaded = [(parameter, parameter.clone()) for parameter in module.parameters() if is_loaded(parameter)]
            reset_hidden_cell(module)
            for parameter, value in loaded:
                parameter.copy_(value)

    def set_algorithm(self, name: str) -> None:
        """Chooses the memory algorithm of every layer: "auto", "naive", "chunked", "fft", "final" or "lookahead". Not saved.

        Raises:
            ValueError: a layer cannot use it; no layer is changed then.
        """
        layers = [module for module in self.modules() if isinstance(module, LMU)]
        before = [layer.algorithm for layer in layers]
        try:
            for layer in layers:
                layer.algorithm = name
        except ValueError:
            for layer, algorithm in zip(layers, before, strict=True):
                layer.algorithm = algorithm
            raise

    def regularization_loss(self) -> Tensor:
        """The sum of all layers' regularizers, a scalar. The heads add it to their loss."""
        terms = [module.regularization_loss() for module in self.modules() if isinstance(module, LMUCell)]
        return torch.stack([term.to(self.device) for term in terms]).sum()


class LMUModel(LMUPreTrainedModel):
    """LMU layers over tokens, signals or embeddings, without a head."""

    def __init__(self, config: LMUConfig):
        super().__init__(config)
        self.embed_tokens = (
            None
            if config.vocab_size is None
            else nn.Embedding(config.vocab_size, config.input_size, padding_idx=config.pad_token_id)
        )
        residual = config.block_type == "residual"
        self.input_proj = nn.Linear(config.input_size, config.width) if residual else None
        size = config.first_layer_size
        blocks = []
        for index in range(config.num_hidden_layers):
            blocks.append(LMUBlock(config, index, size))
            size = blocks[-1].output_size
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(size, eps=config.layer_norm_epsilon) if residual else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_sequences: bool | None = None,
        **kwargs: Any,
    ) -> LMUModelOutput:
        """Runs the model.

        Args:
            input_ids: tokens (batch, time), for a model with ``vocab_size``.
            attention_mask: non-zero where a step is valid (batch, time). Padding is exact wherever it lies: it never changes
                another step's result, whatever it holds.
            input_values: signals (batch, time, input_size), or (batch, time) if ``input_size`` is 1.
            inputs_embeds: embeddings (batch, time, input_size), in place of tokens or signals.
            return_sequences: compute the output of every step, or only of the last valid one; as the configuration says when
                None.

        Returns:
            :class:`LMUModelOutput`.

        Raises:
            ValueError: not exactly one input was given, or a shape is wrong.
        """
        if return_sequences is None:
            return_sequences = self.config.return_sequences
        if not return_sequences and self.config.pooling != "last":
            raise ValueError(f"return_sequences: {self.config.pooling!r} pooling needs every step; leave out False")
        hidden_states = self._embed(input_ids, input_values, inputs_embeds)
        packing = self._pack(attention_mask, hidden_states)
        if packing is not None:
            # Padding may hold anything, NaN included, and a product with zero does not remove that.
            hidden_states = hidden_states.masked_fill(~packing.mask[..., None], 0)
        if self.input_proj is not None:
            hidden_states = self.input_proj(hidden_states)
        for index, block in enumerate(self.layers):
            last = index == len(self.layers) - 1
            hidden_states = block(hidden_states, packing=packing, return_sequences=return_sequences or not last)
        hidden_states = self.norm(hidden_states)
        pooled = self._pool(hidden_states, packing) if return_sequences else hidden_states[:, 0]
        return LMUModelOutput(last_hidden_state=hidden_states, pooler_output=pooled)

    def _embed(self, input_ids: Tensor | None, input_values: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        given = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        named = [name for name, value in given.items() if value is not None]
        own = "input_ids" if self.embed_tokens is not None else "input_values"
        if len(named) != 1 or named[0] not in (own, "inputs_embeds"):
            raise ValueError(f"{own}: expected {own} or inputs_embeds, found {named or 'no input'}")
        if input_ids is not None:
            if input_ids.ndim != 2 or 0 in input_ids.shape:
                raise ValueError(f"input_ids: expected (batch >= 1, time >= 1), found {tuple(input_ids.shape)}")
            assert self.embed_tokens is not None
            return self.embed_tokens(input_ids)
        values = input_values if input_values is not None else inputs_embeds
        assert values is not None
        size = self.config.input_size
        if values.ndim == 2 and size == 1:
            values = values[..., None]
        if values.ndim != 3 or values.shape[-1] != size or 0 in values.shape:
            raise ValueError(f"{named[0]}: expected (batch >= 1, time >= 1, input_size={size}), found {tuple(values.shape)}")
        return values.to(self.dtype)

    def _pack(self, attention_mask: Tensor | None, hidden_states: Tensor) -> Packing | None:
        if attention_mask is None:
            return None
        if attention_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"attention_mask: expected (batch, time)={tuple(hidden_states.shape[:2])}, found {tuple(attention_mask.shape)}"
            )
        # Most batches of equal lengths come with a mask of ones; looking is cheaper than moving every row onto itself.
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            return None
        return pack(attention_mask)

    def _pool(self, hidden_states: Tensor, packing: Packing | None) -> Tensor:
        lengths = None if packing is None else packing.lengths
        if packing is not None:
            hidden_states = to_front(hidden_states, packing)
        if self.config.pooling == "mean":
            if lengths is None:
                return hidden_states.mean(1)
            total = blank(hidden_states, lengths).sum(1, dtype=torch.float32 if self.dtype.itemsize < 4 else self.dtype)
            return (total / lengths.clamp(min=1)[:, None]).to(hidden_states.dtype)
        if self.config.pooling == "max":
            if packing is None or lengths is None:
                return hidden_states.amax(1)
            hidden_states = hidden_states.masked_fill(blank(torch.ones_like(hidden_states), lengths) == 0, -torch.inf)
            return hidden_states.amax(1).masked_fill((lengths == 0)[:, None], 0)
        if self.config.go_backwards:
            return hidden_states[:, 0]
        last = last_valid(hidden_states, lengths)
        if not self.config.bidirectional:
            return last
        # The direction that runs backwards ends at the first step.
        half = last.shape[-1] // 2
        return torch.cat([last[:, :half], hidden_states[:, 0, half:]], dim=-1)


class LMUForSequenceClassification(LMUPreTrainedModel):
    """An LMU with a linear layer on its pooled output, for one label, several labels or regression per sequence."""

    def __init__(self, config: LMUConfig):
        super().__init__(config)
        self.num_labels = len(config.label_names)
        self.model = LMUModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.output_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classifies sequences.

        Args:
            input_ids: see :meth:`LMUModel.forward`, as for the other inputs.
            attention_mask: non-zero where a step is valid (batch, time).
            input_values: signals (batch, time, input_size).
            inputs_embeds: embeddings (batch, time, input_size).
            labels: class per row (batch,), or 0/1 per label (batch, num_labels) float, or targets (batch, num_labels).

        Returns:
            loss, the regularizers' penalties included, if labels are given; logits (batch, num_labels); hidden_states if
            asked for.
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
            return_sequences=all_steps,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.pooler_output))
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

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
        # This batch's share of the penalty, so that the shares of all accumulation steps add up to one.
        share = 1.0 if num_items_in_batch is None else labels.numel() / num_items_in_batch
        return loss + share * self.regularization_loss().to(loss.device)
