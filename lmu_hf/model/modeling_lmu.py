"""The LMU model in the conventions of transformers; its heads are in ``modeling_heads`` and ``modeling_series``."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_lmu import LMUCache, valid_steps
from .cells import ACTIVATIONS, reset_hidden_cell
from .configuration_lmu import LMUConfig
from .layer import LMU
from .offload import weights_at_hand
from .plan import Plan
from .ragged import Packing, blank, last_valid, pack, reverse, to_front, to_place
from .streaming import LMUStreamer
from .weights import is_loaded


@dataclass
class LMUModelOutput(ModelOutput):
    """Output of :class:`LMUModel`.

    Attributes:
        last_hidden_state: output of the last layer (batch, time, output_size), zero at padded steps; time is 1 where only
            the last step was asked for.
        pooler_output: the output over time pooled as ``config.pooling`` says (batch, output_size); over all steps since the
            beginning where a state is carried.
        past_key_values: the state after the last step, if asked for.
        hidden_states: with ``output_hidden_states``, the input of the first layer and the output of each.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: LMUCache | None = None
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

    def forward(
        self,
        hidden_states: Tensor,
        packing: Packing | None = None,
        past_key_values: LMUCache | None = None,
        return_sequences: bool = True,
    ) -> Tensor:
        """Runs the layer.

        Args:
            hidden_states: (batch, time, features).
            packing: where the valid steps lie; all are valid when None.
            past_key_values: where the layer's state comes from and goes to.
            return_sequences: compute every step, or only the last valid one.

        Returns:
            (batch, time or 1, output_size), zero at padded steps.
        """
        lengths = None if packing is None else packing.lengths
        x = hidden_states if packing is None else to_front(hidden_states, packing)
        # Everything but the LMU works step by step, so the valid steps stay in front until the end.
        start = None if past_key_values is None else past_key_values.states[self.layer_idx]
        inputs = self.mixer_norm(x) if self.residual else x
        wanted = {"return_sequences": return_sequences, "return_state": past_key_values is not None}
        with weights_at_hand(self.lmu):
            output, state = self.lmu.run(inputs, start, lengths, **wanted)
        if past_key_values is not None:
            past_key_values.states[self.layer_idx] = state
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
    main_input_name = "input_ids"
    input_modalities = ["text", "audio", "image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["LMUBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["theta_inv"]  # noqa: RUF012
    _is_stateful = True
    _can_record_outputs = {"hidden_states": LMUBlock}  # noqa: RUF012
    # The Auto classes of a head, beside AutoConfig and AutoModel: what its checkpoints can be loaded with.
    _auto_classes: tuple[str, ...] = ()

    # Writes the card of a folder that is about to be uploaded as a repository, to a branch or None; the package lmu_hf offers it.
    _write_card: Callable[[str, str, str | None], None] | None = None

    #: Whether the head reads the pooled output rather than that of each step.
    pools = False

    def __init__(self, config: LMUConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.vocab_size is None:
            self.main_input_name = "input_values"

    # A memory without kernel and hidden cell has no parameters, of which transformers asks the first.
    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Parts are known by what they have: of the files that travel with a checkpoint a class may be loaded twice.
        if callable(reset := getattr(module, "reset_own_parameters", None)):
            reset()
        elif getattr(module, "is_hidden_cell", False):
            # A cell of the user's may write its weights in a way that transformers' guard of loaded ones does not see.
            loaded = [(parameter, parameter.clone()) for parameter in module.parameters() if is_loaded(parameter)]
            reset_hidden_cell(module)
            for parameter, value in loaded:
                parameter.copy_(value)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers; this code travels along, so that ``trust_remote_code=True`` loads the model without lmu_hf.

        Args:
            save_directory: folder for weights, configuration and code; made if it is missing.
            *args: see ``PreTrainedModel.save_pretrained``.
            **kwargs: see ``PreTrainedModel.save_pretrained``.
        """
        # register_for_auto_class() would list one class only, and take a wrapper's (FSDP) file for the model's.
        home = next(
            cls for cls in type(self).__mro__ if issubclass(cls, LMUPreTrainedModel) and "_auto_classes" in vars(cls)
        )
        module = home.__module__.rpartition(".")[2]
        self.config.auto_map = {
            "AutoModel": "modeling_lmu.LMUModel",
            **dict.fromkeys(home._auto_classes, f"{module}.{home.__name__}"),
        }
        if kwargs.get("is_main_process", True) and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(home, save_directory)
            if not self.state_dict():
                # Of a model without weights transformers would write no file, and miss it when loading.
                save_file({}, os.path.join(save_directory, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        super().save_pretrained(save_directory, *args, **kwargs)

    def explain(
        self, batch: int, steps: int, *, return_sequences: bool | None = None, training: bool | None = None
    ) -> list[Plan]:
        """How each layer would compute inputs of this size, and why; see :meth:`LMU.explain`."""
        layers = self._lmus()
        every = self.config.return_sequences if return_sequences is None else return_sequences
        last = len(layers) - 1
        return [
            layer.explain(batch, steps, return_sequences=every or index < last, training=training)
            for index, layer in enumerate(layers)
        ]

    def _upload_modified_files(  # type: ignore[override]  # the rest is passed on as it is
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        # The last step of push_to_hub: everything lies there, with a card that is all gaps where there was none yet.
        if self._write_card is not None:
            self._write_card(str(working_dir), repo_id, None if kwargs.get("create_pr") else kwargs.get("revision"))
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)

    def set_algorithm(self, name: str) -> None:
        """Chooses the memory algorithm of every layer by name: "auto" or one that :class:`LMU` lists. Not saved.

        Raises:
            ValueError: a layer cannot use it; no layer is changed then.
        """
        layers = self._lmus()
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
        terms = [layer.regularization_loss() for layer in self._lmus()]
        return torch.stack([term.to(self.device) for term in terms]).sum()

    def _lmus(self) -> list[LMU]:
        blocks: Any = self.base_model.layers
        return [block.lmu for block in blocks]

    def penalized(self, loss: Tensor, items: Tensor | int, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Adds the regularizers' penalty to the loss of ``items`` targets.

        Of a batch that is one accumulation step of many, only its share is added, so that the shares add up to one.
        """
        penalty = self.regularization_loss().to(loss.device)
        if num_items_in_batch is None:
            return loss + penalty
        total = num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        return loss + items / total * penalty

    def project(self, hidden: Tensor) -> Tensor:
        """What the head makes of the model's outputs (..., output_size); without a head these themselves."""
        return hidden

    def streamer(self, batch_size: int = 1) -> LMUStreamer:
        """Feeds steps as they come, for ever and in constant memory; see :class:`LMUStreamer`."""
        return LMUStreamer(self, batch_size)


class LMUModel(LMUPreTrainedModel):
    """LMU layers over tokens, signals or embeddings, without a head."""

    _auto_classes = ("AutoModel",)

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
        past_key_values: LMUCache | None = None,
        use_cache: bool | None = None,
        return_sequences: bool | None = None,
        **kwargs: Any,
    ) -> LMUModelOutput:
        """Runs the model.

        Args:
            input_ids: tokens (batch, time), for a model with ``vocab_size``.
            attention_mask: non-zero where a step is valid (batch, time). Padding is exact wherever it lies: it never changes
                another step's result, whatever it holds. With ``past_key_values`` it may cover the steps before too.
            input_values: signals (batch, time, input_size), or (batch, time) if ``input_size`` is 1.
            inputs_embeds: embeddings (batch, time, input_size), in place of tokens or signals.
            past_key_values: the state to go on from, updated in place.
            use_cache: return the state after the last step; only where ``past_key_values`` is given when None.
            return_sequences: compute the output of every step, or only of the last valid one; as the configuration says when
                None.

        Returns:
            :class:`LMUModelOutput`.

        Raises:
            ValueError: not exactly one input was given, a shape is wrong, or a state is asked of a model that has none.
        """
        if return_sequences is None:
            return_sequences = self.config.return_sequences
        if not return_sequences and self.config.pooling != "last":
            raise ValueError(f"return_sequences: {self.config.pooling!r} pooling needs every step; leave out False")
        hidden_states = self._embed(input_ids, input_values, inputs_embeds)
        batch, steps = hidden_states.shape[:2]
        cache = self._cache(past_key_values, use_cache, batch)
        mask = valid_steps(attention_mask, batch, steps, cache)
        packing = None if mask is None else pack(mask)
        if packing is not None:
            # Padding may hold anything, NaN included, and a product with zero does not remove that.
            hidden_states = hidden_states.masked_fill(~packing.mask[..., None], 0)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and not hidden_states.requires_grad:
            # A reentrant checkpoint gives the weights of a layer gradients only if the layer's input asks for one.
            hidden_states = hidden_states.detach().requires_grad_()
        if self.input_proj is not None:
            hidden_states = self.input_proj(hidden_states)
        for index, block in enumerate(self.layers):
            last = index == len(self.layers) - 1
            every = return_sequences or not last
            hidden_states = block(hidden_states, packing=packing, past_key_values=cache, return_sequences=every)
        hidden_states = self.norm(hidden_states)
        pooled = self._pool(hidden_states, packing) if return_sequences else hidden_states[:, 0]
        if cache is not None:
            lengths = None if packing is None else packing.lengths
            newest = pooled if self.config.pooling == "last" else self._last(hidden_states, packing)
            pooled = cache.advance(self.config.pooling, pooled, newest, lengths, steps)
        return LMUModelOutput(
            last_hidden_state=hidden_states, pooler_output=pooled.to(hidden_states.dtype), past_key_values=cache
        )

    def _cache(self, past_key_values: LMUCache | None, use_cache: bool | None, batch: int) -> LMUCache | None:
        if past_key_values is None and not use_cache:
            return None
        if self.config.bidirectional or self.config.go_backwards:
            field = "bidirectional" if self.config.bidirectional else "go_backwards"
            raise ValueError(
                f"use_cache: a model with {field}=True reads each sequence from its end, so the steps to come change what it "
                "made of those before and no state can be carried on; run whole sequences"
            )
        if past_key_values is None:
            return LMUCache(len(self.layers))
        if not hasattr(past_key_values, "advance") or len(past_key_values) != len(self.layers):
            raise ValueError(f"past_key_values: expected LMUCache({len(self.layers)}), found {past_key_values!r}")
        if self.gradient_checkpointing and self.training:
            raise ValueError(
                "past_key_values: gradient checkpointing runs every layer twice and would advance the state twice; leave out one"
            )
        past_key_values.check_batch(batch)
        return past_key_values

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
        # Without weights, of a memory alone, there is no type to go by.
        weight = next(self.parameters(), None)
        return values if weight is None else values.to(self.dtype)

    def _pool(self, hidden_states: Tensor, packing: Packing | None) -> Tensor:
        lengths = None if packing is None else packing.lengths
        if packing is not None:
            hidden_states = to_front(hidden_states, packing)
        if self.config.pooling == "mean":
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            if lengths is None:
                return hidden_states.mean(1, dtype=dtype)
            total = blank(hidden_states, lengths).sum(1, dtype=dtype)
            return total / lengths.clamp(min=1)[:, None]
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

    @staticmethod
    def _last(hidden_states: Tensor, packing: Packing | None) -> Tensor:
        if packing is None:
            return hidden_states[:, -1]
        return last_valid(to_front(hidden_states, packing), packing.lengths)
