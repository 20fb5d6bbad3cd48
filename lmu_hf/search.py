"""Hyper-parameter search: Trainer's own, through optuna, over what matters for an LMU, on the validation part alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .errors import InputError
from .evaluation import task_of
from .experiment import Experiment
from .kinds import KINDS
from .launched import processes
from .model.configuration_lmu import LMUConfig
from .record import hardware, versions
from .reports import EpochLine
from .running import claim, write_json
from .tasks import TaskData
from .training import build_model, build_trainer

TRIALS = "trials.json"
BEST = "best.yaml"


def default_space(experiment: Experiment, task: TaskData) -> dict[str, Callable[[Any], Any]]:
    """What is searched: setting -> how optuna's trial draws it.

    Around the experiment's own values: learning rate a factor of 10 to both sides, order, hidden size and theta a factor of 2
    (theta not below the order: a window of fewer steps than polynomials has nothing to show for the rest), dropout before the
    classifier 0 to 0.6, weight decay 1e-4 to 0.3. A value that is no plain number, such as a list of thetas, stays as it is.
    """
    model = {**_defaults(), **experiment.model}
    rate = experiment.training.get("learning_rate", 5e-5)
    space: dict[str, Callable[[Any], Any]] = {
        "training.learning_rate": lambda trial: trial.suggest_float(
            "training.learning_rate", rate / 10, rate * 10, log=True
        ),
        "training.weight_decay": lambda trial: trial.suggest_float("training.weight_decay", 1e-4, 0.3, log=True),
        "model.classifier_dropout": lambda trial: trial.suggest_float("model.classifier_dropout", 0.0, 0.6, step=0.05),
    }
    sized = ("order",) if model["hidden_cell"] in (None, "readout") else ("order", "hidden_size")
    for name in sized:
        if isinstance(value := model[name], int) and not isinstance(value, bool):
            space[f"model.{name}"] = _whole(f"model.{name}", max(1, value // 2), value * 2)
    order = model["order"]
    if isinstance(theta := model["theta"], int | float) and isinstance(order, int):
        low = max(theta / 2, float(order))
        space["model.theta"] = lambda trial: trial.suggest_float("model.theta", low, max(low, theta * 2.0), log=True)
    return space


def _whole(name: str, low: int, high: int) -> Callable[[Any], int]:
    return lambda trial: trial.suggest_int(name, low, high, log=True)


def _defaults() -> dict[str, Any]:
    config = LMUConfig()
    return {name: getattr(config, name) for name in ("order", "hidden_size", "hidden_cell", "theta")}


def search(
    experiment: Experiment, output_dir: str | Path, data: str | None = None, *, trials: int = 20, progress: bool = False
) -> dict[str, Any]:
    """Trains once per trial and writes the best settings and the table of all trials.

    The score of a trial is that of its best evaluation on the validation part, by ``training.metric_for_best_model``. The test
    part is never looked at. Trials that cannot win are stopped early, by the median of those before.

    Args:
        experiment: what to vary.
        output_dir: folder for ``best.yaml``, which `lmu-hf train` takes, and ``trials.json``; new or empty.
        data: as for :func:`lmu_hf.training.train`.
        trials: how many.
        progress: a bar per trial rather than a line per epoch.

    Returns:
        The content of ``trials.json``.

    Raises:
        InputError: optuna is missing, the model is no LMU, or configuration, data or folder are wrong.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError("search: needs optuna; install lmu-hf[search]")
    if processes() > 1:
        raise InputError("search: runs in one process; start it without a launcher")
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise InputError(f"trials: expected a whole number >= 1, found {trials!r}")
    if experiment.model.get("model_type", "lmu") != "lmu":
        raise InputError("model.model_type: the search is for LMUs; leave it out")
    import optuna
    import yaml

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    output_dir = Path(output_dir)
    # A trial keeps nothing: its score is that of its best evaluation, and the best settings are trained again by `lmu-hf train`.
    lean = _changed(experiment, {"training.save_strategy": "no", "training.load_best_model_at_end": False})
    # A search that is interrupted begins anew.
    with claim(output_dir, {"experiment": experiment.to_dict(), "trials": trials, "processes": 1}) as run:
        task = task_of(experiment, data)
        metric = str(experiment.training.get("metric_for_best_model", KINDS[task.kind].best)).removeprefix("eval_")
        space = default_space(experiment, task)

        def settings(trial: Any) -> dict[str, Any]:
            drawn = {name: draw(trial) for name, draw in space.items()}
            return {name.removeprefix("training."): value for name, value in drawn.items() if name.startswith("training.")}

        def model_init(trial: Any) -> PreTrainedModel:
            return build_model(_changed(lean, {} if trial is None else trial.params), task)

        trainer = build_trainer(None, lean, task, run, progress, model_init=model_init)
        if not progress:
            trainer.remove_callback(EpochLine)  # a line per trial is enough
        greater = bool(trainer.args.greater_is_better)

        def best(metrics: dict[str, float]) -> float:
            found = [log[f"eval_{metric}"] for log in trainer.state.log_history if f"eval_{metric}" in log]
            found.append(metrics[f"eval_{metric}"])
            return max(found) if greater else min(found)

        direction = "maximize" if greater else "minimize"
        storage = optuna.storages.InMemoryStorage()
        try:
            trainer.hyperparameter_search(
                settings,
                compute_objective=best,
                n_trials=trials,
                direction=direction,
                backend="optuna",
                storage=storage,
                study_name=experiment.name,
                sampler=_sampler(experiment.seed, metric, trials),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
                catch=(InputError,),  # settings that exclude one another
            )
            study = optuna.load_study(study_name=experiment.name, storage=storage)
            chosen = study.best_trial
        except ValueError as error:
            raise InputError(f"search: none of {trials} trials came to its end: {error}") from error
        found = _changed(experiment, chosen.params)
        heading = f"# The best of {trials} trials by the {metric} of the validation part: {chosen.value:.6g}\n"
        text = yaml.safe_dump(found.to_dict(), sort_keys=False)
        (output_dir / BEST).write_text(heading + text, encoding="utf-8")
        result = {
            "name": experiment.name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "metric": metric,
            "part": "validation",
            "direction": direction,
            "best": {"trial": chosen.number, "value": chosen.value, "settings": chosen.params},
            "trials": [_row(trial) for trial in study.trials],
            "experiment": experiment.to_dict(),
            "hardware": hardware(),
            "versions": {**versions(), "optuna": optuna.__version__},
        }
        write_json(output_dir / TRIALS, result)
        run.finish()
    return result


def _sampler(seed: int, metric: str, trials: int) -> Any:
    import optuna

    class Telling(optuna.samplers.TPESampler):
        """Tells of each trial when it ends."""

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            super().after_trial(study, trial, state, values)
            shown = f"{metric} {values[0]:.4f}" if values else "stopped early" if state.name == "PRUNED" else "failed"
            print(f"trial {trial.number + 1} of {trials}: {shown}", flush=True)

    return Telling(seed=seed)  # the same search gives the same trials


def _row(trial: Any) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "settings": trial.params,
        "seconds": round((trial.datetime_complete - trial.datetime_start).total_seconds(), 2),
    }


def _changed(experiment: Experiment, settings: dict[str, Any]) -> Experiment:
    changed = deepcopy(experiment)
    for name, value in settings.items():
        section, _, key = name.partition(".")
        getattr(changed, section)[key] = value
    return changed
