"""transformers' own test suite, over every class. A skip needs a reason that is written here."""

import atexit
import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from made_data import tokenizer
from PIL import Image
from transformers import pipeline
from upstream import MISSING, available, load, with_reasons

from lmu_hf import (
    LMUConfig,
    LMUFeatureExtractor,
    LMUForCausalLM,
    LMUForSequenceClassification,
    LMUForTimeSeriesPrediction,
    LMUForTokenClassification,
    LMUImageProcessor,
    LMUModel,
)

if not available():
    if os.environ.get("LMU_HF_ALL_TESTS"):
        raise RuntimeError(MISSING)
    pytest.skip(MISSING, allow_module_level=True)

BATCH, STEPS, VOCABULARY, WIDTH = 3, 9, 41, 16

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "input_size": WIDTH,
    "memory_d": 2,
    "order": 5,
    "theta": 7.0,
    "trainable_theta": True,
    "initializer_range": 0.2,
}

SKIPPED = {
    r"test_(?!config|retain|get_).*(attention|attn|sdpa|sliding_window).*": "an LMU has no attention",
    r"test_.*(rope|position_vector).*": "an LMU has no position embeddings",
    r"test_eager_matches_batched_and_grouped.*|test_.*router_logits.*": "an LMU has no experts",
    r"test_internal_model_config_and_subconfig_are_same": "the configuration has no parts",
    r"test_encoder_decoder.*": "an LMU is no encoder and decoder",
    r"test_(tp_plan|tied_head_has_a_tp_plan).*": "no plan for tensor parallelism: a layer is too small to be split",
    r"test_(reverse_loading_mapping|can_load_from_already_mapped_keys)": "no checkpoint with other names to convert",
    r"test_kernels_can_load.*": "no kernels from the Hub",
    r"test_(disk|cpu)_offload.*|test_can_load_with_(device_context_manager|global_device_set)": "needs an accelerator",
    r"test_model_parallelism": "needs several accelerators",
    r"test_torch_compile_for_training": "needs an accelerator; test_tracing.py compiles on the CPU",
    r"test_.*deepspeed.*": "needs DeepSpeed and an accelerator",
}

NO_TOKENS = {
    r"test_resize_.*": "signals have no vocabulary",
    r"test_inputs_embeds.*|test_model_get_set_embeddings": "signals have no embeddings",
    r"test_enable_input_require_grads_with_gradient_checkpointing": "looks at gradients of embeddings",
    r"test_load_with_mismatched_shapes": "changes the size of the vocabulary",
    r"test_retain_grad_hidden_states_attentions": "the first hidden state is the signal, which has no gradient",
    r"test_causal_lm_loss_honors_shift_labels": "no language model among these",
}


class Inputs:
    """What the mixins ask for configurations and inputs."""

    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers = BATCH, STEPS, WIDTH, 2

    def __init__(self, case, **kwargs):
        self.case, self.kwargs = case, kwargs
        self.vocab_size = kwargs.get("vocab_size")
        self.causal_lm_class = LMUForCausalLM if self.vocab_size else None

    def get_config(self):
        return LMUConfig(**SMALL, **self.kwargs)

    def prepare_config_and_inputs_for_common(self):
        if self.vocab_size:
            inputs = {"input_ids": torch.randint(1, self.vocab_size, (BATCH, STEPS))}
        else:
            inputs = {"input_values": torch.randn(BATCH, STEPS, WIDTH)}
        return self.get_config(), {**inputs, "attention_mask": torch.ones(BATCH, STEPS, dtype=torch.long)}


def save_tiny_models(folder: Path) -> None:
    """Checkpoints for the pipelines, one folder per kind of input, where the pipeline mixin looks for them."""
    text = tokenizer()
    tokens = {"vocab_size": len(text), "pad_token_id": text.pad_token_id, "eos_token_id": text.eos_token_id}
    signals = {**SMALL, "input_size": 1}
    made = {
        "text": {
            LMUForSequenceClassification: ({**SMALL, **tokens}, text),
            LMUForTokenClassification: ({**SMALL, **tokens}, text),
            LMUForCausalLM: ({**SMALL, **tokens}, text),
        },
        "image": {LMUForSequenceClassification: (signals, LMUImageProcessor(size={"height": 4, "width": 4}))},
        "audio": {LMUForSequenceClassification: (signals, LMUFeatureExtractor(sampling_rate=100))},
    }
    for kind, classes in made.items():
        for cls, (kwargs, processor) in classes.items():
            place = folder / kind / "lmu" / cls.__name__
            cls(LMUConfig(**kwargs)).save_pretrained(place)
            processor.save_pretrained(place)
            name = type(processor).__name__
            names = {"tokenizer_classes": [name] if kind == "text" else [], "processor_classes": [name]}
            summary = folder / kind / "reports" / "tiny_model_summary.json"
            summary.parent.mkdir(exist_ok=True)
            known = json.loads(summary.read_text()) if summary.exists() else {}
            summary.write_text(json.dumps({**known, cls.__name__: names}))


class PipelineTests:
    """What transformers' pipeline tests do per task, which its source distribution does not hold."""

    task, examples = "", ()

    def get_test_pipeline(self, model, tokenizer=None, dtype="float32", **processors):
        made = pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, device="cpu", **processors)
        return made, list(self.examples)

    def run_pipeline_test(self, pipe, examples):
        for example in examples:
            self.check(pipe, pipe(example))

    @staticmethod
    def check(pipe, found):
        assert {entry["label"] for entry in found} <= set(pipe.model.config.id2label.values())
        assert all(0 <= entry["score"] <= 1 for entry in found)


class TextClassificationPipelineTests(PipelineTests):
    task, examples = "text-classification", ("the cat sees a bird .", "not here")


class TokenClassificationPipelineTests(PipelineTests):
    task, examples = "token-classification", ("the cat sees a bird .", "not here")

    @staticmethod
    def check(pipe, found):
        assert {entry["entity"] for entry in found} <= set(pipe.model.config.id2label.values())
        assert {entry["word"] for entry in found} <= set(pipe.tokenizer.get_vocab())


class TextGenerationPipelineTests(PipelineTests):
    task, examples = "text-generation", ("the cat", "a big dog sees")

    def get_test_pipeline(self, *args, **kwargs):
        made, examples = super().get_test_pipeline(*args, **kwargs)
        made.tokenizer.padding_side = "left"
        made.model.generation_config.max_new_tokens = 5
        return made, examples

    @staticmethod
    def check(pipe, found):
        assert found[0]["generated_text"].startswith(("the cat", "a big dog sees"))


class ImageClassificationPipelineTests(PipelineTests):
    task = "image-classification"
    examples = tuple(Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (0, 90, 255))


class AudioClassificationPipelineTests(PipelineTests):
    task = "audio-classification"
    examples = (np.zeros(50, dtype=np.float32), np.sin(np.arange(80, dtype=np.float32)))


FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
save_tiny_models(FOLDER)
upstream = load(
    FOLDER / "text",
    {
        "test_pipelines_text_classification": TextClassificationPipelineTests,
        "test_pipelines_token_classification": TokenClassificationPipelineTests,
        "test_pipelines_text_generation": TextGenerationPipelineTests,
        "test_pipelines_image_classification": ImageClassificationPipelineTests,
        "test_pipelines_audio_classification": AudioClassificationPipelineTests,
    },
)
# The pipeline mixin looks our processors up by name among transformers' own.
for processor in (LMUImageProcessor, LMUFeatureExtractor):
    setattr(upstream["pipeline"].transformers_module, processor.__name__, processor)


class Common:
    """What the classes below share."""

    test_can_init_all_missing_weights_before_2023 = True
    has_attentions = False
    settings: dict = {}  # noqa: RUF012

    def setUp(self):
        self._tester = Inputs(self, **self.settings)
        self.config_tester = upstream["configuration"].ConfigTester(
            self,
            config_class=LMUConfig,
            has_text_modality="vocab_size" in self.settings,
            common_properties=["hidden_size", "num_hidden_layers"],
            hidden_size=37,
        )

    @property
    def model_tester(self):
        return self._tester

    def test_config(self):
        self.config_tester.run_common_tests()


class Text(Common):
    settings = {"vocab_size": VOCABULARY, "pad_token_id": 0, "hidden_cell": "gru"}  # noqa: RUF012
    all_model_classes = (LMUModel, LMUForSequenceClassification, LMUForTokenClassification, LMUForCausalLM)


@with_reasons(SKIPPED)
class TestText(
    Text,
    upstream["modeling"].ModelTesterMixin,
    upstream["generation"].GenerationTesterMixin,
    upstream["training"].TrainingTesterMixin,
    unittest.TestCase,
):
    training_overfit_learning_rate = 0.01


@with_reasons(SKIPPED)
class TestResidualText(
    Text,
    upstream["modeling"].ModelTesterMixin,
    upstream["generation"].GenerationTesterMixin,
    upstream["training"].TrainingTesterMixin,
    unittest.TestCase,
):
    settings = {  # noqa: RUF012
        **Text.settings,
        "hidden_cell": "readout",
        "block_type": "residual",
        "tie_word_embeddings": True,
        "pooling": "mean",
    }


@with_reasons({**SKIPPED, **NO_TOKENS})
class TestSignals(Common, upstream["modeling"].ModelTesterMixin, unittest.TestCase):
    settings = {"hidden_cell": "lstm", "hidden_to_memory": True, "memory_to_memory": True}  # noqa: RUF012
    all_model_classes = (LMUModel, LMUForSequenceClassification, LMUForTokenClassification, LMUForTimeSeriesPrediction)
    test_resize_embeddings = False

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is LMUForTimeSeriesPrediction:
            inputs["labels"] = torch.zeros_like(inputs["input_values"])
        return inputs


class Pipelines(upstream["pipeline"].PipelineTesterMixin):
    kind = ""

    def setUp(self):
        module = upstream["pipeline"]
        folder = FOLDER / self.kind
        summary = json.loads((folder / "reports" / "tiny_model_summary.json").read_text())
        for name, value in {"TRANSFORMERS_TINY_MODEL_PATH": str(folder), "tiny_model_summary": summary}.items():
            patched = mock.patch.object(module, name, value)
            patched.start()
            self.addCleanup(patched.stop)


def other_tasks(mapping):
    """Reasons to skip every pipeline but those of the given tasks."""
    names = "|".join(task.replace("-", "_") for task in mapping)
    return {rf"test_pipeline_(?!({names})(_fp16)?$).*": "no task of these checkpoints"}


TEXT = {
    "text-classification": LMUForSequenceClassification,
    "token-classification": LMUForTokenClassification,
    "text-generation": LMUForCausalLM,
}


@with_reasons(other_tasks(TEXT))
class TestTextPipelines(Pipelines, unittest.TestCase):
    kind, pipeline_model_mapping = "text", TEXT


IMAGE = {"image-classification": LMUForSequenceClassification}


@with_reasons(other_tasks(IMAGE))
class TestImagePipelines(Pipelines, unittest.TestCase):
    kind, pipeline_model_mapping = "image", IMAGE


AUDIO = {"audio-classification": LMUForSequenceClassification}


@with_reasons(other_tasks(AUDIO))
class TestAudioPipelines(Pipelines, unittest.TestCase):
    kind, pipeline_model_mapping = "audio", AUDIO
