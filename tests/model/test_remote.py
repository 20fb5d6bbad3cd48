"""Every class from the files that travel with its checkpoint, in a process that does not have the package."""

import os
import sys

import processes
import pytest
import tiny
import torch
from test_heads import AUTO

from lmu_hf import LMUForCausalLM, LMUModel

# Loads, computes and says what it found.
CODE = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lmu_hf":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import json, torch, transformers
auto, folder = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
given = torch.load(folder + "/given.pt")
model.set_algorithm("naive")
model.set_algorithm("auto")
outputs = model(**given)
(values,) = (value for key, value in given.items() if key.startswith("input"))
found = {"outputs": [v.detach() for v in outputs.values() if isinstance(v, torch.Tensor)]}
found["stream"] = model.streamer(4).feed(values)
if auto == "AutoModelForCausalLM":
    found["tokens"] = model.generate(values, attention_mask=torch.ones_like(values), max_new_tokens=5, num_beams=2)
torch.save(found, folder + "/found.pt")
"""


# The files that travel hold the Python loop only.
@pytest.mark.usefixtures("python_loop")
@pytest.mark.parametrize(("cls", "auto"), [(LMUModel, "AutoModel"), *((cls, a.__name__) for cls, a in AUTO.items())])
def test_equals_the_package_bit_for_bit(cls, auto, tmp_path):
    model = tiny.build(cls, "deep", hidden_cell="gru", kernel_regularizer="l2")
    model.save_pretrained(tmp_path)
    given = tiny.inputs(model)
    (values,) = given.values()
    given |= {"attention_mask": tiny.padding("left", 15, [15, 6, 2, 9])}
    given |= {} if cls is LMUModel else {"labels": tiny.labels(model)}
    torch.save(given, tmp_path / "given.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = processes.run([sys.executable, "-c", CODE, auto, str(tmp_path)], env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    outputs = [value for value in model(**given).values() if isinstance(value, torch.Tensor)]
    for a, b in zip(found["outputs"], outputs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found["stream"], model.streamer(4).feed(values))
    if cls is LMUForCausalLM:
        mask = torch.ones_like(values)
        assert torch.equal(found["tokens"], model.generate(values, attention_mask=mask, max_new_tokens=5, num_beams=2))
