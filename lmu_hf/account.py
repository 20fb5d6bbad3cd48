"""The record of a run in words, for a card: nothing that is not in it, and no empty sentence."""

from __future__ import annotations

import math
from typing import Any

from .description import Kind, count, label_names

_USES = {"train": "fitted the weights", "validation": "chose the epoch to keep", "test": "scored once, at the end"}

# Tasks whose data come out of a formula, so that whoever trains again has the same.
_COMPUTED = ("delay", "mackey_glass")


def scores_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The scores of each part that has some."""
    return {part: scores for part, scores in result.get("scores", {}).items() if scores}


def metrics_of(result: dict[str, Any]) -> list[str]:
    """The names of all scores."""
    return list(dict.fromkeys(metric for scores in scores_of(result).values() for metric in scores))


def score_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of scores."""
    scores, rows = scores_of(result), result.get("dataset", {}).get("rows", {})
    if not scores:
        return []
    uses = dict(_USES) if result.get("best_epoch") else {**_USES, "validation": "watched during training"}
    return [
        {
            "part": part,
            "rows": f"{rows[part]:,}" if part in rows else "",
            "use": uses.get(part, ""),
            "metrics": [_shown(metric, scores.get(part, {}).get(metric)) for metric in metrics_of(result)],
        }
        for part in dict.fromkeys([*rows, *scores])
    ]


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if metric in ("accuracy", "nrmse") else f"{value:.4g}"


def reading(result: dict[str, Any]) -> str:
    """What the scores mean: of the test accuracy what chance alone can do to it, Wilson's interval of a share (1927)."""
    if "nrmse" in metrics_of(result):
        unit = result.get("dataset", {}).get("unit")
        return (
            "NRMSE is the root of the mean squared error (MSE) over the standard deviation of the true values: 0 is perfect, 100 "
            "% is what always answering with their mean would give." + (f" Values are in {unit}." if unit else "")
        )
    share, rows = (
        result.get("scores", {}).get("test", {}).get("accuracy"),
        result.get("dataset", {}).get("rows", {}).get("test"),
    )
    if share is None or not rows:
        return ""
    z = 1.96
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return (
        f"{round(share * rows):,} of {rows:,} test rows are right; the 95 % confidence interval of the accuracy is "
        f"{100 * (centre - half):.1f} to {100 * (centre + half):.1f} %."
    )


def data(result: dict[str, Any]) -> str:
    """What the model was trained and scored on."""
    dataset = result.get("dataset", {})
    if not dataset.get("name"):
        return ""
    identifier = dataset.get("id")
    if identifier and identifier.partition("/")[0] != "sklearn":
        where = f", [{identifier}](https://huggingface.co/datasets/{identifier})"
    elif result.get("experiment", {}).get("task", {}).get("name") in _COMPUTED:
        where = ", computed by lmu-hf"
    else:
        where = "" if identifier else ", not published with this model"
    words = f"{dataset['name'][:1].upper()}{dataset['name'][1:]}{where}."
    if rows := dataset.get("rows"):
        words += f" {sum(rows.values()):,} rows: " + ", ".join(f"{number:,} {part}" for part, number in rows.items()) + "."
    return words + (f" Split: {dataset['split']}." if dataset.get("split") else "")


def _machine(hardware: dict[str, Any]) -> str:
    if gpus := hardware.get("gpus"):
        return ", ".join(gpus)
    used, there = hardware["torch_threads"], hardware["cores"]
    cores = count(there, "core") if used >= there else f"{used} of {count(there, 'core')}"
    return f"{cores} of a CPU ({hardware['cpu']}), no GPU"


def training(result: dict[str, Any]) -> str:
    """How it was trained."""
    if not result.get("history") and not result.get("seconds"):
        return ""
    sentences = []
    history, seconds, hardware = result.get("history", []), result.get("seconds", {}), result.get("hardware", {})
    words = f"Trained on {result['created'][:10]}" if "created" in result else "Trained"
    if history:
        epochs = history[-1]["epoch"]
        words += f" for {epochs:g} epoch{'' if epochs == 1 else 's'}"
    if "train" in seconds:
        words += f" in {_duration(seconds['train'])}"
    if hardware:
        machines = [machine["hardware"] for machine in result.get("machines", [])] or [hardware]
        words += " on " + ", then on ".join(_machine(one) for one in machines)
    sentences.append(words)
    if (best := result.get("best_epoch")) is not None:
        # Records from before this field chose by accuracy where the experiment said nothing.
        default = result.get("experiment", {}).get("training", {}).get("metric_for_best_model", "accuracy")
        metric = result.get("chosen_by", default).removeprefix("eval_")
        metric = {"nrmse": "NRMSE", "mse": "MSE"}.get(metric, metric)
        sentences.append(f"The weights of epoch {best:g} were kept, those with the best validation {metric}")
    elif history:
        sentences.append("The weights of the last epoch were kept")
    if "seed" in result.get("experiment", {}):
        sentences.append(f"Seed {result['experiment']['seed']}, for initial weights, order of the data and dropout")
    if result.get("reloaded", {}).get("same"):
        sentences.append("The saved model was loaded again in a new process and scored the same")
    return ". ".join(sentences) + "."


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def recipe(result: dict[str, Any]) -> str:
    """The settings that train it again, as YAML."""
    import yaml

    settings = result.get("experiment") or result.get("settings")
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=False).strip() if settings else ""


def recipe_words(result: dict[str, Any]) -> str:
    """What to do with these."""
    if not (experiment := result.get("experiment")):
        return "Settings that differ from the defaults of `transformers.TrainingArguments`:"
    file = f"{experiment['name']}.yaml"
    data = " --data FILE" if experiment["task"]["name"] in ("signals", "text") else ""
    if source := result.get("fine_tuned_from"):
        data += f" --model {source['name']}"
    return f"To train it again, save this as `{file}` and run `lmu-hf train {file}{data}`:"


def limits(result: dict[str, Any], config: dict[str, Any], processor: dict[str, Any], kind: Kind) -> list[str]:
    """What a user has to know before relying on the model."""
    limits = []
    if result.get("dataset", {}).get("name"):
        limits.append("It was trained and scored on one dataset; how it does on other data is not known.")
    if "seed" in result.get("experiment", {}):
        limits.append("The scores are those of one run; another seed gives somewhat different ones.")
    one_label = config.get("problem_type") in (None, "single_label_classification") and len(label_names(config)) > 1
    if kind.name in ("image", "signal", "text") and one_label:
        limits.append("It always answers with one of its classes, also where none of them fits.")
    if kind.name == "image" and not processor["do_resize"]:
        size = f"{processor['size']['height']} x {processor['size']['width']}"
        limits.append(f"Images of another size than {size} pixels are refused, not resized.")
    if "feature_extractor_type" in processor:
        limits.append(
            "Signals have to come in the unit and at the sampling rate of the training data, whose mean and deviation scale them."
        )
        if kind.name == "series" and config.get("target_size") is None:
            limits.append(
                "Its predictions are scaled in the same way: times the deviation, plus the mean, gives the unit back."
            )
    theta = config["theta"]
    forgets = config["num_hidden_layers"] == 1 and config["pooling"] == "last" and config["hidden_cell"] in (None, "dense")
    if kind.name == "language":
        limits.append("It writes what is likely after the text so far; nothing makes that true.")
    if isinstance(theta, int | float) and kind.name != "image" and forgets:
        limits.append(f"The memory looks back {theta:g} steps; what lies further in the past fades.")
    if not result:
        limits.append(
            "Nothing is known here of how it was trained or how well it does; ask its author before you rely on it."
        )
    return limits or ["How it does on other data than that of its training is not known."]
