"""The model card of a converted checkpoint.

The part that push would generate stands between its marks, so that a push renews it; where the weights come from stands behind
them, and is kept.
"""

from __future__ import annotations

from pathlib import Path

from ..card import BEGIN, END
from .conversion import Conversion

# The licence of the weights is that of the original, which its file does not tell; without a word push would say Apache-2.0.
_CARD = """---
library_name: transformers
license: other
license_name: that-of-the-original
tags: [lmu, legendre-memory-unit]
---

{begin}

# {title}

A Legendre Memory Unit, converted from Keras by [lmu-hf](https://pypi.org/project/lmu-hf/).

```python
import torch
import lmu_hf  # makes the model type known
from transformers import {auto}

model = {auto}.from_pretrained("PATH_OR_ID")
outputs = model({example})
```

{end}

## Converted from Keras

The weights are those of the original, and so is their licence: put its identifier in place of `other` above.

| | |
|---|---|
| original | `{name}`{version} |
| SHA-256 | `{sha256}` |
| class | `{model}` |
| parameters | {parameters:,} |
| memory | {memory_d} x order {order}, theta {theta}, {discretizer} |
| input | {input} |
| output | {output} |
| checked | {checked} |
{notes}"""


def render(conversion: Conversion, difference: float | None) -> str:
    """The card's text."""
    model, config = conversion.model, conversion.model.config
    name, kind = _plain(Path(conversion.source).name), type(model).__name__
    if "Classification" in kind:
        per = " per step" if kind == "LMUForTokenClassification" else ""
        outputs = f"{len(config.label_names)} logits{per}"
    elif kind == "LMUForTimeSeriesPrediction":
        outputs = f"{config.target_size or config.input_size} predicted values per step"
    else:
        outputs = f"{config.output_size} features" + (" per step" if config.return_sequences else "")
    if conversion.activation != "linear":
        outputs += f"; the original applied a {conversion.activation} to them"
    tokens = config.vocab_size is not None
    notes = "".join(f"- {_plain(note)}\n" for note in conversion.notes)
    return _CARD.format(
        begin=BEGIN,
        end=END,
        title=Path(name).stem,
        name=name,
        version=f", Keras {_plain(conversion.keras_version)}" if conversion.keras_version else "",
        sha256=conversion.sha256,
        model=kind,
        parameters=model.num_parameters(),
        memory_d=config.memory_d,
        order=config.order,
        theta=config.theta,
        discretizer=config.discretizer,
        input=f"(batch, time), tokens below {config.vocab_size:,} as `input_ids`"
        if tokens
        else f"(batch, time, {config.input_size}) as `input_values`",
        output=outputs,
        checked="not against outputs of the original"
        if difference is None
        else f"largest difference from the original's outputs {difference:.1e}",
        notes=f"\nNot carried over, or worth knowing:\n\n{notes}" if notes else "",
        auto=model._auto_classes[0],
        example=f"input_ids=torch.randint({config.vocab_size}, (1, 100))"
        if tokens
        else f"input_values=torch.randn(1, 100, {config.input_size})",
    )


def _plain(text: str) -> str:
    """Text of a file, whoever wrote it, as one line without Markdown's and HTML's marks."""
    line = " ".join(text.split()).translate(str.maketrans("`|<>[]", "'/()()"))
    return line if len(line) <= 400 else f"{line[:400]} ..."
