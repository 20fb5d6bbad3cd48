"""Kinds of tasks: what each asks of a model, and how its answers are scored.

``classification`` wants one class per sequence, ``regression`` one or more values per sequence, ``series`` values at every step.
The same meters measure during training, in ``lmu-hf evaluate`` and in a record, batch by batch, so that nothing larger than a
batch is ever held and rows of different lengths need no common shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel

from .errors import InputError
from .model.modeling_heads import IGNORED, LMUForSequenceClassification
from .model.modeling_series import LMUForTimeSeriesPrediction
from .tasks.base import TaskData, collate

SHOWN_STEPS = 500  # of a series, or rows of a regression: as much as a picture can show


class Meter(Protocol):
    """Measures answers as they come."""

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Takes the answers to one batch and what they should have been."""

    def scores(self) -> dict[str, float]:
        """The metrics of everything added so far."""

    def details(self) -> dict[str, Any]:
        """What a record and a picture need beside the metrics."""


class Kind:
    """One kind of task.

    Attributes:
        name: as a task gives it.
        head: the model's class.
        metrics: names of the scores, in the order of reports.
        best: the metric that chooses the epoch to keep where the experiment says nothing.
    """

    name: ClassVar[str]
    head: ClassVar[type[PreTrainedModel]]
    metrics: ClassVar[tuple[str, ...]]
    best: ClassVar[str]

    def fields(self, task: TaskData) -> dict[str, Any]:
        """The fields of the model's configuration that the task decides."""
        names = dict(enumerate(task.label_names))
        return {"id2label": names, "label2id": {name: index for index, name in names.items()}, **task.fields}

    def meter(self, names: list[str], every: int = 1) -> Meter:
        """A new meter for classes or targets of these names; of a series it keeps every n-th step for the picture."""
        raise NotImplementedError

    @staticmethod
    def answers(outputs: Any) -> Tensor:
        """The part of a model's output that is scored."""
        return outputs.logits


class Classification(Kind):
    """One class per sequence."""

    name = "classification"
    head = LMUForSequenceClassification
    metrics = ("accuracy", "loss")
    best = "accuracy"

    def fields(self, task: TaskData) -> dict[str, Any]:
        return {"problem_type": "single_label_classification", **super().fields(task)}

    def meter(self, names: list[str], every: int = 1) -> Meter:
        return _Classes(len(names))


class Regression(Kind):
    """One or more values per sequence."""

    name = "regression"
    head = LMUForSequenceClassification
    metrics = ("nrmse", "mse")
    best = "nrmse"

    def fields(self, task: TaskData) -> dict[str, Any]:
        return {"problem_type": "regression", **super().fields(task)}

    def meter(self, names: list[str], every: int = 1) -> Meter:
        return _Errors(names, None)


class Series(Kind):
    """Values at every step: of steps to come, or of anything else that goes along with the series."""

    name = "series"
    head = LMUForTimeSeriesPrediction
    metrics = ("nrmse", "mse")
    best = "nrmse"

    def fields(self, task: TaskData) -> dict[str, Any]:
        size = len(task.label_names)
        # None says that the model predicts its own inputs, so that it can roll out.
        own = {} if task.predicts_input else {"target_size": size}
        return {"return_sequences": True, **own, **super().fields(task)}

    def meter(self, names: list[str], every: int = 1) -> Meter:
        return _Errors(names, every)

    @staticmethod
    def answers(outputs: Any) -> Tensor:
        return outputs.predictions


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classification(), Regression(), Series())}
METRICS = tuple(dict.fromkeys(metric for kind in KINDS.values() for metric in (*kind.metrics, "loss")))
GREATER_IS_BETTER = ("accuracy",)


class _Classes:
    """Accuracy, mean cross-entropy in nats, and how often each class was taken for which."""

    def __init__(self, classes: int):
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.loss = 0.0

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        logits, classes = outputs.float(), len(self.confusion)
        self.loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        pairs = labels * classes + logits.argmax(-1)
        self.confusion += torch.bincount(pairs.cpu(), minlength=classes * classes).view(classes, classes)

    def scores(self) -> dict[str, float]:
        rows = int(self.confusion.sum())
        return {"accuracy": float(self.confusion.diagonal().sum()) / rows, "loss": self.loss / rows}

    def details(self) -> dict[str, Any]:
        return {"rows": int(self.confusion.sum()), "confusion": self.confusion.tolist()}


class _Errors:
    """Mean squared error and NRMSE, over all targets and for each; NaN in the labels is a value that is not known.

    NRMSE is the root of the mean squared error over the standard deviation of the true values, both over everything that is
    measured: 0 is perfect, 1 is what always answering with the mean would give.
    """

    def __init__(self, names: list[str], every: int | None):
        self.names, self.every, self.first = names, every, 0
        size = len(names)
        self.rows = 0
        # Welford's update, batch by batch: sums of squares lose a small spread around a large mean.
        self.count, self.mean, self.spread, self.squares = (torch.zeros(size, dtype=torch.float64) for _ in range(4))
        self.shown: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        size = len(self.names)
        true, found = labels.detach().double().cpu(), outputs.detach().double().cpu()
        true, found = true.reshape(len(true), -1, size), found.reshape(len(found), -1, size)
        self._show(true, found)
        self.rows += len(true)
        # Where processes hold batches of different lengths, the Trainer fills up both with this number.
        known = ~true.isnan() & ~((true == IGNORED) & (found == IGNORED))
        error = torch.where(known, found - true, 0.0)
        count = known.sum((0, 1)).double()
        mean = torch.where(known, true, 0.0).sum((0, 1)) / count.clamp(min=1)
        spread = torch.where(known, true - mean, 0.0).square().sum((0, 1))
        total = self.count + count
        delta = mean - self.mean
        self.spread += spread + delta.square() * self.count * count / total.clamp(min=1)
        self.mean += delta * count / total.clamp(min=1)
        self.squares += error.square().sum((0, 1))
        self.count = total

    def _show(self, true: Tensor, found: Tensor) -> None:
        if self.every is None:
            room = SHOWN_STEPS - sum(len(part) for part, _ in self.shown)
            self.shown.append((true[: max(0, room), 0], found[: max(0, room), 0]))
        elif not self.shown:
            # What is known of the first series, without the padding behind it.
            known = (~true[0].isnan().all(-1)).nonzero()[:, 0]
            self.first = int(known.min()) if len(known) else 0
            end = int(known.max()) + 1 if len(known) else 0
            shown = slice(self.first, min(end, self.first + SHOWN_STEPS * self.every), self.every)
            self.shown.append((true[0, shown], found[0, shown]))

    def scores(self) -> dict[str, float]:
        spread, count = float(self.spread.sum()), float(self.count.sum())
        if count == 0 or spread == 0:
            raise InputError(
                "labels: expected values that differ within a part, found a constant or none; NRMSE needs a spread"
            )
        squares = float(self.squares.sum())
        return {"nrmse": (squares / spread) ** 0.5, "mse": squares / count}

    def details(self) -> dict[str, Any]:
        measured = zip(self.names, self.squares.tolist(), self.spread.tolist(), self.count.tolist(), strict=True)
        targets = {
            name: {"nrmse": (squares / spread) ** 0.5, "mse": squares / count}
            for name, squares, spread, count in measured
            if spread > 0
        }
        true, found = (_short(torch.cat(values)) for values in zip(*self.shown, strict=True))
        of = {"of": "rows"} if self.every is None else {"of": "steps", "first": self.first, "every": self.every}
        return {
            "rows": self.rows,
            "targets": targets,
            "predictions": {**of, "true": true, "predicted": found},
        }


def _short(values: Tensor) -> list[list[float | None]]:
    """Numbers for a picture (time or rows, targets), None where not known."""
    return [[None if value != value else float(f"{value:.4g}") for value in row] for row in values.tolist()]


def same_labels(names: list[str], wanted: list[str]) -> bool:
    """Whether a model's labels are those that a task wants. Labels that nobody named are known by their number alone."""
    unnamed = [f"LABEL_{index}" for index in range(len(wanted))]
    return names in (wanted, unnamed)


class WeightedCrossEntropy:
    """Cross-entropy in which each class counts with a weight, as the ``loss_function`` of a classifier.

    It divides by the number of rows, not by the sum of their weights, so that accumulated batches give what one large batch
    gives.

    Args:
        weights: per class; those of balanced classes have the mean 1 over the training rows.
    """

    def __init__(self, weights: list[float]):
        self.weights = torch.tensor(weights)

    def __call__(self, labels: Tensor, pooled_logits: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        logits = pooled_logits.float()
        weights = self.weights.to(logits.device)
        total = torch.nn.functional.cross_entropy(logits, labels.to(logits.device), weight=weights, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class TrainerMetrics:
    """The ``compute_metrics`` of a Trainer with ``batch_eval_metrics``: the same meters, batch by batch."""

    def __init__(self, kind: Kind, names: list[str]):
        self.kind, self.names = kind, names
        self.meter = kind.meter(names)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        outputs: Any = prediction.predictions
        labels: Any = prediction.label_ids
        self.meter.add(outputs[0] if isinstance(outputs, tuple) else outputs, labels)
        if not compute_result:
            return {}
        scores = self.meter.scores()
        self.meter = self.kind.meter(self.names)
        scores.pop("loss", None)  # the Trainer has its own, which includes penalties
        return scores


@torch.inference_mode()
def score(model: PreTrainedModel, part: Any, kind: Kind, batch_size: int = 500, every: int = 1) -> dict[str, Any]:
    """Measures a model on a dataset.

    Args:
        model: a model of the kind's class, or one with the same outputs.
        part: dataset of rows as :func:`lmu_hf.tasks.base.collate` takes them.
        kind: of the task.
        batch_size: rows at once.
        every: of the first series, keep every n-th step for the picture.

    Returns:
        The kind's metrics, ``rows``, and for classes ``confusion`` (true class by predicted class), for values ``targets``
        (name -> metrics) and ``predictions``, the first of them with the truth.
    """
    model.eval()
    names: Any = model.config
    meter = kind.meter(names.label_names, every)
    batches: Iterable[dict[str, Tensor]] = torch.utils.data.DataLoader(part, batch_size=batch_size, collate_fn=collate)
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        meter.add(kind.answers(model(**batch)), labels)
    return {**meter.scores(), **meter.details()}
