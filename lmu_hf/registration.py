"""Makes the model type "lmu" known to transformers, for all its Auto classes; importing this module does it."""

from contextlib import suppress

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
)

from .model.configuration_lmu import LMUConfig
from .model.modeling_heads import LMUForCausalLM, LMUForSequenceClassification, LMUForTokenClassification
from .model.modeling_lmu import LMUModel, LMUPreTrainedModel
from .model.modeling_series import LMUForTimeSeriesPrediction
from .model.processing_lmu import LMUFeatureExtractor, LMUImageProcessor


def _write_card(folder: str, repo_id: str, revision: str | None) -> None:
    from .hub import replace_draft  # only who publishes needs it

    replace_draft(folder, repo_id, revision)


LMUPreTrainedModel._write_card = staticmethod(_write_card)

AutoConfig.register("lmu", LMUConfig, exist_ok=True)
AutoModel.register(LMUConfig, LMUModel, exist_ok=True)
for _auto in (AutoModelForSequenceClassification, AutoModelForImageClassification, AutoModelForAudioClassification):
    # One head for all three: a sequence is a sequence. The pipelines look for their own Auto class.
    _auto.register(LMUConfig, LMUForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(LMUConfig, LMUForTokenClassification, exist_ok=True)
AutoModelForCausalLM.register(LMUConfig, LMUForCausalLM, exist_ok=True)
AutoModelForTimeSeriesPrediction.register(LMUConfig, LMUForTimeSeriesPrediction, exist_ok=True)
with suppress(ImportError):
    # Early versions of transformers 5 have AutoImageProcessor only with torchvision; LMUImageProcessor itself needs none.
    AutoImageProcessor.register(LMUConfig, image_processor_classes={"pil": LMUImageProcessor}, exist_ok=True)
AutoFeatureExtractor.register(LMUConfig, LMUFeatureExtractor, exist_ok=True)
