"""Legendre Memory Units as first-class Hugging Face models.

Importing this package makes the model type "lmu" known to the Auto classes of transformers.
"""

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

from . import native
from .model import compiled
from .model.cache_lmu import LMUCache
from .model.cell_registry import register_hidden_cell
from .model.configuration_lmu import LMUConfig
from .model.layer import LMU
from .model.lmu_cell import LMUCell
from .model.memory import linear_memory
from .model.modeling_heads import (
    LMUForCausalLM,
    LMUForSequenceClassification,
    LMUForTokenClassification,
    LMUTokenClassifierOutput,
)
from .model.modeling_lmu import LMUModel, LMUModelOutput, LMUPreTrainedModel
from .model.modeling_series import LMUForTimeSeriesPrediction, LMUTimeSeriesOutput
from .model.processing_lmu import LMUFeatureExtractor, LMUImageProcessor
from .model.state import BidirectionalState, LMUState
from .model.streaming import LMUStreamer

__version__ = "0.1.0"

compiled.offer(native.load)


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

__all__ = [
    "LMU",
    "BidirectionalState",
    "LMUCache",
    "LMUCell",
    "LMUConfig",
    "LMUFeatureExtractor",
    "LMUForCausalLM",
    "LMUForSequenceClassification",
    "LMUForTimeSeriesPrediction",
    "LMUForTokenClassification",
    "LMUImageProcessor",
    "LMUModel",
    "LMUModelOutput",
    "LMUPreTrainedModel",
    "LMUState",
    "LMUStreamer",
    "LMUTimeSeriesOutput",
    "LMUTokenClassifierOutput",
    "linear_memory",
    "register_hidden_cell",
]
