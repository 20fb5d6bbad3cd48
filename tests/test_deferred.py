"""What is imported when, and that the Auto classes know the model type in whatever order things are imported."""

import pickle
import subprocess
import sys

import processes
import pytest

from lmu_hf import LMUConfig, LMUFeatureExtractor, LMUForSequenceClassification

HEAVY = ("torch", "torch._dynamo", "sympy", "triton", "transformers", "datasets", "sklearn", "yaml", "PIL.Image")


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import lmu_hf; lmu_hf.__version__", set()),
        ("import lmu_hf.cli", set()),
        ("from lmu_hf import LMU, LMUCell, LMUState, linear_memory, native, register_hidden_cell", {"torch"}),
    ],
)
def test_imports_are_light(statement, loaded):
    code = f"import sys; {statement}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) <= loaded


def test_all_of_it_is_light():
    code = (
        "import sys, transformers; before = set(sys.modules); from lmu_hf import *; new = set(sys.modules) - before;"
        "heavy = [m for m in ('datasets', 'typer', 'sklearn', 'matplotlib', 'yaml', 'PIL.Image', 'lmu_hf.training') if m in new];"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and its processor, as files and as a pickle."""
    folder = tmp_path_factory.mktemp("saved")
    model = LMUForSequenceClassification(LMUConfig(input_size=1, order=4, hidden_size=3))
    model.save_pretrained(folder)
    LMUFeatureExtractor().save_pretrained(folder)
    (folder / "model.pickle").write_bytes(pickle.dumps(model))
    return folder


@pytest.mark.parametrize(
    "statements",
    [
        "import lmu_hf; from transformers import AutoModel",
        "import transformers, lmu_hf; transformers.AutoConfig",
        "from transformers import AutoModelForSequenceClassification; import lmu_hf",
        "import lmu_hf; from transformers.models.auto.configuration_auto import CONFIG_MAPPING; CONFIG_MAPPING['lmu']",
        "from lmu_hf import LMU; from transformers import PreTrainedModel",
        "import lmu_hf; from transformers.modeling_layers import GradientCheckpointingLayer",
        "import lmu_hf.model.modeling_heads",
        "import lmu_hf; from transformers import AutoFeatureExtractor; AutoFeatureExtractor.from_pretrained(folder)",
        "import lmu_hf; from transformers import pipeline",
        "import pickle, pathlib; pickle.loads(pathlib.Path(folder, 'model.pickle').read_bytes())",
        """
import lmu_hf, transformers  # whose own first import does not bear several threads
from threading import Thread
failed = []
def load():
    try:
        from transformers import AutoConfig
        assert AutoConfig.from_pretrained(folder).model_type == "lmu"
    except BaseException as error:
        failed.append(error)
threads = [Thread(target=load) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failed, failed
""",
    ],
)
def test_auto_classes_know_the_model_type(statements, saved):
    code = f"""
import sys
folder = {str(saved)!r}
{statements}
assert "lmu_hf.registration" in sys.modules
assert not any(type(finder).__module__ == "lmu_hf.deferred" for finder in sys.meta_path)
import lmu_hf, transformers
assert type(transformers.AutoModelForSequenceClassification.from_pretrained(folder)) is lmu_hf.LMUForSequenceClassification
assert type(transformers.AutoFeatureExtractor.from_pretrained(folder)) is lmu_hf.LMUFeatureExtractor
assert lmu_hf.LMUModel._write_card is not None
"""
    done = processes.run([sys.executable, "-c", code])
    assert not done.returncode, done.stderr


def test_a_failing_registration_is_told_once():
    code = """
import sys, lmu_hf
sys.modules["lmu_hf.model.processing_lmu"] = None
try:
    from transformers import AutoModel
except ImportError as error:
    print(repr(error), repr(error.__cause__))  # transformers puts words of its own around it
from transformers import AutoModel
"""
    done = processes.run([sys.executable, "-c", code])
    assert not done.returncode, done.stderr
    assert "lmu_hf.model.processing_lmu" in done.stdout


def test_modules_keep_their_own_loaders():
    code = """
import inspect, pkgutil, lmu_hf.launched, transformers.utils
for module in (lmu_hf.launched, transformers.utils):
    assert type(module.__loader__) is type(module.__spec__.loader) is type(inspect.__loader__), module
    assert inspect.getsource(module)
assert pkgutil.get_data("lmu_hf.tasks", "digits.yaml")
"""
    done = processes.run([sys.executable, "-c", code])
    assert not done.returncode, done.stderr
