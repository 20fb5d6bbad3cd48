"""The model card of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from .conversion import Conversion

_CARD = """---
library_name: transformers
tags: [lmu, legendre-memory-unit{tag}]
---

# {title}

A Legendre Memory Unit, converted from Keras by [lmu-hf]. Its weights are those of the original, and so is their licence.

| | |
|---|---|
| original | `{name}`{version} |
| SHA-256 | `{sha256}` |
| class | `{model}` |
| parameters | {parameters:,} |
| memory | {memory_d} x order {order}, theta {theta}, {discretizer} |
| input | (batch, time, {input_size}) as `input_values` |
| output | {output} |
| checked | {checked} |

{notes}```python
import torch
import lmu_hf  # makes the model type known
from transformers import {auto}

model = {auto}.from_pretrained("PATH_OR_ID")
outputs = model(input_values=torch.randn(1, 100, {input_size}))
```

[lmu-hf]: https://pypi.org/project/lmu-hf/
"""


def render(conversion: Conversion, difference: float | None) -> str:
    """The card's text."""
    model, config = conversion.model, conversion.model.config
    name = Path(conversion.source).name
    classifier = "Classification" in type(model).__name__
    outputs = f"{len(config.label_names)} logits" if classifier else f"{config.output_size} features"
    if conversion.activation != "linear":
        outputs += f"; the original applied a {conversion.activation} to them"
    notes = "".join(f"- {note}\n" for note in conversion.notes)
    return _CARD.format(
        tag=", time-series" if classifier and config.problem_type == "regression" else "",
        title=Path(name).stem,
        name=name,
        version=f", Keras {conversion.keras_version}" if conversion.keras_version else "",
        sha256=conversion.sha256,
        model=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory_d=config.memory_d,
        order=config.order,
        theta=config.theta,
        discretizer=config.discretizer,
        input_size=config.input_size,
        output=outputs,
        checked="not against outputs of the original"
        if difference is None
        else f"largest difference from the original's outputs {difference:.1e}",
        notes=f"Not carried over, or worth knowing:\n\n{notes}\n" if notes else "",
        auto="AutoModelForSequenceClassification" if classifier else "AutoModel",
    )
