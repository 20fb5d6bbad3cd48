"""The usage example of a model card: written for one model, then run exactly as it will be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .description import Kind
from .errors import InputError

_COMMIT = "0" * 40  # of the files that are about to become one


def usage_example(
    config: dict[str, Any],
    processor: dict[str, Any],
    kind: Kind,
    repo_id: str,
    revision: str | None = None,
    *,
    image: str | None = None,
    tokenizer: bool = False,
) -> str:
    """The code that shows how to use a model.

    Args:
        config: content of ``config.json``.
        processor: content of ``preprocessor_config.json``, or nothing.
        kind: what the model is for.
        repo_id: ``user/name``.
        revision: branch to load; None for the main one.
        image: name of a file in the repository that holds an example image.
        tokenizer: whether there is one beside the model.
    """
    where = "model_id" if revision is None else "model_id, revision=revision"
    trusted = f"({where}, trust_remote_code=True)"
    imports, autos, inputs = [], [kind.auto], "input_values=signal"
    if kind.name == "image":
        imports, autos = ["from PIL import Image"], ["AutoImageProcessor", kind.auto]
        inputs = '**processor(image, return_tensors="pt")'
        if image is None:
            size, mode = (processor["size"]["width"], processor["size"]["height"]), processor["image_mode"]
            sample = [f'image = Image.new("{mode}", {size})  # a black one: put yours in its place']
        else:
            imports.insert(0, "from huggingface_hub import hf_hub_download")
            file = where.replace("model_id", f'model_id, "{image}"', 1)
            sample = [f"image = Image.open(hf_hub_download({file}))"]
    elif config.get("vocab_size") and tokenizer:
        autos = ["AutoTokenizer", kind.auto]
        sample = ['text = "The weather today is"  # put yours in its place']
        inputs = '**tokenizer(text, return_tensors="pt")'
    elif config.get("vocab_size"):
        count = min(8, config["vocab_size"])
        sample = [f"tokens = torch.arange({count})[None]  # (batch, time), made up: put yours in their place"]
        inputs = "input_ids=tokens"
    elif "feature_extractor_type" in processor:
        autos = ["AutoFeatureExtractor", kind.auto]
        sample = [_wave("np", processor["feature_size"])]
        inputs = '**processor([signal], return_tensors="pt")'
    else:
        sample = [_wave("torch", config["input_size"])]
    loaders = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "processor", "AutoFeatureExtractor": "processor"}
    load = [f"{loaders.get(auto, 'model')} = {auto}.from_pretrained{trusted}" for auto in autos]
    return "\n".join(
        [
            *(["import numpy as np"] if "np." in sample[0] else []),
            "import torch",
            *imports,
            f"from transformers import {', '.join(sorted(autos))}",
            "",
            f'model_id = "{repo_id}"',
            *([] if revision is None else [f'revision = "{revision}"']),
            *load,
            "",
            *sample,
            "with torch.inference_mode():",
            *_use(config, kind, inputs, "text" if tokenizer else "tokens"),
        ]
    )


def _wave(library: str, channels: int) -> str:
    """A line that makes a signal: (time, channels) for a processor, (1, time, channels) for a model."""
    if channels == 1:
        shape, axes = ("(time,)", "") if library == "np" else ("(1, time, 1)", "[None, :, None]")
        wave = f"{library}.sin({library}.arange(100) / 5)"
    else:
        shape, axes = (f"(time, {channels})", "") if library == "np" else (f"(1, time, {channels})", "[None]")
        wave = f"{library}.sin({library}.arange(100)[:, None] / 5 + {library}.arange({channels}))"
    return f"signal = {wave}{axes}  # {shape}, made up: put yours in its place"


def _use(config: dict[str, Any], kind: Kind, inputs: str, given: str) -> list[str]:
    """The lines that compute, inside a block, and those that show what came out."""
    if kind.name == "language":
        out = f"    output = model.generate({inputs}, max_new_tokens=20, do_sample=False)[0]"
        return [out, "print(tokenizer.decode(output))" if given == "text" else "print(output.tolist())"]
    if kind.name == "features":
        return [f"    outputs = model({inputs})", "print(outputs.last_hidden_state.shape, outputs.pooler_output.shape)"]
    if kind.name == "series":
        target = config.get("target_size") or config["input_size"]
        if inputs == "input_values=signal" and target == config["input_size"] and config["return_sequences"]:
            return ["    values = model.forecast(signal, steps=5)[0]  # the next five", "print(values.numpy().round(3))"]
        last = "[0, -1]" if config["return_sequences"] else "[0]"
        return [f"    values = model({inputs}).predictions{last}", "print(values.numpy().round(3))"]
    if kind.name == "steps":
        return [
            f"    labels = model({inputs}).logits[0].argmax(-1)[-8:]  # of the last eight",
            "print([model.config.id2label[index] for index in labels.tolist()])",
        ]
    if config.get("problem_type") == "regression":
        return [f"    values = model({inputs}).logits[0]", "print(values.numpy().round(3))"]
    function = "sigmoid()" if config.get("problem_type") == "multi_label_classification" else "softmax(-1)"
    return [
        f"    probabilities = model({inputs}).logits.{function}[0]",
        "for index in probabilities.argsort(descending=True)[:3].tolist():",
        '    print(f"{model.config.id2label[index]}: {probabilities[index]:.3f}")',
    ]


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
