"""Legendre Memory Units as first-class Hugging Face models.

Importing this package makes the model type "lmu" known to the Auto classes of transformers, as soon as these are loaded. All
else is imported when it is asked for: ``import lmu_hf`` costs next to nothing, and the layer needs torch only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .deferred import register_with_transformers

if TYPE_CHECKING:
    from . import native as native
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

_FILES = {
    "cache_lmu": ("LMUCache",),
    "cell_registry": ("register_hidden_cell",),
    "configuration_lmu": ("LMUConfig",),
    "layer": ("LMU",),
    "lmu_cell": ("LMUCell",),
    "memory": ("linear_memory",),
    "modeling_heads": (
        "LMUForCausalLM",
        "LMUForSequenceClassification",
        "LMUForTokenClassification",
        "LMUTokenClassifierOutput",
    ),
    "modeling_lmu": ("LMUModel", "LMUModelOutput", "LMUPreTrainedModel"),
    "modeling_series": ("LMUForTimeSeriesPrediction", "LMUTimeSeriesOutput"),
    "processing_lmu": ("LMUFeatureExtractor", "LMUImageProcessor"),
    "state": ("BidirectionalState", "LMUState"),
    "streaming": ("LMUStreamer",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

if not TYPE_CHECKING:  # type checkers know the names above, and only these

    def __getattr__(name: str) -> Any:
        if name in _FILE_OF:
            value = getattr(import_module(f"{__name__}.model.{_FILE_OF[name]}"), name)
        elif name in ("model", "native"):
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
