"""transformers' own tests of models, of the very version that is installed, made to run against classes outside its tree.

``scripts/fetch_test_material`` puts them beside the environment. They import a few modules that its source distribution does
not hold; those are replaced here by what they are used for.
"""

import importlib
import os
import re
import sys
import unittest
from functools import wraps
from pathlib import Path
from types import ModuleType
from unittest import mock

import transformers
from transformers.models.auto import modeling_auto

PLACE = Path(sys.prefix) / "test-material" / f"transformers-{transformers.__version__}"
MISSING = f"transformers' tests of version {transformers.__version__} are not there; run scripts/fetch_test_material"

#: Settings that every configuration takes, none of them at its default.
COMMON_SETTINGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["LMUModel"],
    "id2label": {0: "zero", 1: "one", 2: "two"},
    "label2id": {"zero": 0, "one": 1, "two": 2},
    "problem_type": "regression",
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "bos_token_id": 6,
    "pad_token_id": 7,
    "eos_token_id": 8,
}


def available() -> bool:
    """Whether the tests were fetched."""
    return (PLACE / "test_modeling_common.py").exists()


def load(tiny_models: Path, pipeline_tests: dict[str, type]) -> dict[str, ModuleType]:
    """Imports the mixins.

    Args:
        tiny_models: folder with ``reports/tiny_model_summary.json`` and checkpoints ``lmu/<class name>`` for pipelines.
        pipeline_tests: class per module of ``tests.pipelines``, which the source distribution lacks.

    Returns:
        The modules ``modeling``, ``configuration``, ``training`` and ``pipeline``.
    """
    # What tells the tests which labels a class takes. Kept for good: they look when they run.
    for mapping, name in {
        "MODEL_MAPPING_NAMES": "LMUModel",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "LMUForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "LMUForTokenClassification",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "LMUForCausalLM",
    }.items():
        getattr(modeling_auto, mapping)["lmu"] = name

    package = _module("tests", __path__=[str(PLACE)])
    _module("tests.exporters", __path__=[])
    _module("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _module("tests.generation", __path__=[])
    _module("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _module("tests.utils", __path__=[])
    _module("tests.utils.test_configuration_utils", config_common_kwargs=COMMON_SETTINGS)
    _module("tests.pipelines", __path__=[])
    for name, cls in pipeline_tests.items():
        _module(f"tests.pipelines.{name}", **{cls.__name__: cls})
    # They load a second copy of transformers to look names up in; the one that knows our classes will do.
    with (
        mock.patch("transformers.utils.direct_transformers_import", return_value=transformers),
        mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=str(tiny_models)),
    ):
        names = {
            "modeling": "test_modeling_common",
            "configuration": "test_configuration_common",
            "training": "test_training_mixin",
            "pipeline": "test_pipeline_mixin",
        }
        loaded = {short: importlib.import_module(f"{package.__name__}.{name}") for short, name in names.items()}
    loaded["generation"] = sys.modules["tests.generation.test_utils"]
    return loaded


def _module(name: str, **contents: object) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    return module


def with_reasons(reasons: dict[str, str]):
    """Decorates a test class: a test may be skipped only for a reason given here, by a pattern of its full name."""

    def decorate(cls: type) -> type:
        for name in dir(cls):
            if not name.startswith("test_") or not callable(test := getattr(cls, name)):
                continue
            reason = next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)
            setattr(cls, name, unittest.skip(reason)(test) if reason else _never_skipped(test))
        return cls

    return decorate


def _never_skipped(test):
    if getattr(test, "__unittest_skip__", False):
        why = test.__unittest_skip_why__

        def skipped(self):
            raise AssertionError(f"skipped by transformers without a reason of ours: {why}")

        return skipped

    def refuse(reason):
        raise AssertionError(f"skipped by transformers without a reason of ours: {reason}")

    @wraps(test)
    def wrapper(self, *args, **kwargs):
        self.skipTest = refuse  # also within a subTest
        try:
            return test(self, *args, **kwargs)
        except unittest.SkipTest as skip:
            raise AssertionError(f"skipped by transformers without a reason of ours: {skip}") from skip

    return wrapper
