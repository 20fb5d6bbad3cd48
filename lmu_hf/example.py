"""The usage example of a model card: written for one model, then run exactly as it will be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError

_COMMIT = "0" * 40  # of the files that are about to become one


def usage_example(
    config: dict[str, Any], processor: dict[str, Any], repo_id: str, revision: str | None = None, image: str | None = None
) -> str:
    """The code that shows how to use a model.

    Args:
        config: content of ``config.json``.
        processor: content of ``preprocessor_config.json``, or nothing.
        repo_id: ``user/name``.
        revision: branch to load; None for the main one.
        image: name of a file in the repository that holds an example image.
    """
    where = "model_id" if revision is None else "model_id, revision=revision"
    head = [f'model_id = "{repo_id}"'] + ([] if revision is None else [f'revision = "{revision}"'])
    trusted = f"({where}, trust_remote_code=True)"
    classifier = config.get("architectures") == ["LMUForSequenceClassification"]
    if not classifier or not ({"image_processor_type", "feature_extractor_type"} & set(processor)):
        auto = next((name for name in config.get("auto_map", {}) if name not in ("AutoConfig", "AutoModel")), "AutoModel")
        return "\n".join(
            [
                f"from transformers import {auto}",
                "",
                *head,
                f"model = {auto}.from_pretrained{trusted}",
                'print(f"{type(model).__name__}, {model.num_parameters():,} parameters")',
            ]
        )
    if "image_processor_type" in processor:
        kind, auto, imports = "AutoImageProcessor", "AutoModelForImageClassification", ["from PIL import Image"]
        size, mode = (processor["size"]["width"], processor["size"]["height"]), processor["image_mode"]
        if image is None:
            sample = [f'image = Image.new("{mode}", {size})  # a black one: put yours in its place']
        else:
            imports.insert(0, "from huggingface_hub import hf_hub_download")
            sample = [
                f"image = Image.open(hf_hub_download({where.replace('model_id', f'model_id, {image!r}', 1)}))".replace(
                    "'", '"'
                )
            ]
        inputs = 'processor(image, return_tensors="pt")'
    else:
        kind, auto, imports = "AutoFeatureExtractor", "AutoModelForSequenceClassification", []
        channels = processor["feature_size"]
        wave = (
            "np.sin(np.arange(100) / 5)" if channels == 1 else f"np.sin(np.arange(100)[:, None] / 5 + np.arange({channels}))"
        )
        shape = "(time,)" if channels == 1 else f"(time, {channels})"
        sample = [f"signal = {wave}  # {shape}, made up: put yours in its place"]
        inputs = 'processor([signal], return_tensors="pt")'
    if config.get("problem_type") == "regression":
        call, shown = f"values = model(**{inputs}).logits[0]", ["print(values.tolist())"]
    else:
        function = "sigmoid()" if config.get("problem_type") == "multi_label_classification" else "softmax(-1)"
        call = f"probabilities = model(**{inputs}).logits.{function}[0]"
        shown = [
            "for index in probabilities.argsort(descending=True)[:3].tolist():",
            '    print(f"{model.config.id2label[index]}: {probabilities[index]:.3f}")',
        ]
    return "\n".join(
        [
            *(["import numpy as np"] if not imports else []),
            "import torch",
            *imports,
            f"from transformers import {kind}, {auto}",
            "",
            *head,
            f"processor = {kind}.from_pretrained{trusted}",
            f"model = {auto}.from_pretrained{trusted}",
            "",
            *sample,
            "with torch.inference_mode():",
            f"    {call}",
            *shown,
        ]
    )


def run_example(code: str, files: dict[str, Path], repo_id: str, revision: str | None = None) -> str:
    """Runs code as if the files were on the Hub already, in a new process, offline, without lmu_hf.

    Args:
        code: what to run.
        files: content of the repository, name -> local file.
        repo_id: ``user/name``.
        revision: branch that the files are on; None for the main one.

    Returns:
        What it printed.

    Raises:
        InputError: it failed, or printed nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The cache of huggingface_hub, as it is after a download.
        repo = Path(folder, "hub", f"models--{repo_id.replace('/', '--')}")
        snapshot, reference = repo / "snapshots" / _COMMIT, repo / "refs" / (revision or "main")
        snapshot.mkdir(parents=True)
        reference.parent.mkdir(parents=True)
        reference.write_text(_COMMIT, encoding="utf-8")
        for name, path in files.items():
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_MODULES_CACHE")}
        environment = {
            **kept,
            "HF_HOME": folder,
            "HF_HUB_CACHE": str(Path(folder, "hub")),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        # What a reader has who has not installed lmu_hf: with None there, importing it fails.
        hidden = f"import sys; sys.modules['lmu_hf'] = None\n{code}"
        finished = subprocess.run(
            [sys.executable, "-c", hidden], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    if finished.returncode or not finished.stdout.strip():
        # The error itself, which may go over several lines, without the way to it.
        errors = re.findall(r"^[\w.]+(?:Error|Exception|Exit)\b.*", finished.stderr, re.MULTILINE | re.DOTALL)
        reason = " ".join((errors[-1] if errors else finished.stderr or "it printed nothing").split())
        raise InputError(
            f"model: the usage example of its card does not run: {reason[-300:] if not errors else reason[:300]}"
        )
    return finished.stdout.strip()
