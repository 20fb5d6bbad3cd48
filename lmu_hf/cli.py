"""The command line: ``lmu-hf train | evaluate | predict | push | convert``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import HubError, InputError
from .launched import is_first, is_first_here

app = typer.Typer(
    name="lmu-hf",
    help="Legendre Memory Units for Hugging Face: train, evaluate, use and publish them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelDir = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a trained model.")]
Data = Annotated[str | None, typer.Option(help="Local file or folder, or id of a dataset on the Hub.")]
Config = Annotated[
    str | None, typer.Argument(metavar="[CONFIG.yaml]", help="The experiment; the built-in digits without one.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as model.order=64.")]
Output = Annotated[str | None, typer.Option(help="Folder for the model; runs/NAME by default.")]
Seed = Annotated[int | None, typer.Option(help="Seed, in place of the experiment's.")]
Base = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Begin with the weights of this folder, or of this id on the Hub."),
]
Progress = Annotated[
    bool | None, typer.Option(help="Show a progress bar rather than a line per epoch; by default on a terminal.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a table.")]


def _kind(command: Callable[..., None]) -> Callable[..., None]:
    """Turns wrong input into one line and exit code 2, a failure of the Hub into one line and 1.

    Anything else is a defect and keeps its traceback.
    """

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (InputError, HubError) as error:
            if is_first_here():
                typer.secho(f"lmu-hf: {' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from error

    return wrapper


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _prepare(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    # The libraries' bars for reading a few hundred kilobytes hide the one bar that matters.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # it logs a second line for what it raises
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


@app.command()
@_kind
def train(
    config: Config = None,
    overrides: Overrides = None,
    data: Data = None,
    output: Output = None,
    model: Base = None,
    seed: Seed = None,
    report_to: Annotated[
        str | None, typer.Option(metavar="TRACKER", help="tensorboard, trackio, wandb, ...; several with commas.")
    ] = None,
    progress: Progress = None,
) -> None:
    """Train a model: the best epoch on the validation part is kept, scored on the test part, saved, reloaded and checked.

    A run that was interrupted goes on where it was when its command is repeated with --output FOLDER.
    """
    if report_to is not None:
        overrides = [*(overrides or []), f"training.report_to=[{report_to}]"]
    experiment = _experiment(config, overrides, seed)

    from . import training

    output_dir = _output_dir(output, experiment.name, experiment)
    if is_first():
        typer.echo(f"{experiment.name}: training into {output_dir}")
    progress = sys.stderr.isatty() if progress is None else progress
    result = training.train(experiment, output_dir, data, base_model=model, progress=progress)
    if result is not None:
        _print_result(result, output_dir)


def _experiment(config: str | None, overrides: list[str] | None, seed: int | None) -> Any:
    config, overrides = _split(config, overrides)
    if seed is not None:
        overrides.append(f"seed={seed}")

    from .experiment import Experiment

    return Experiment.read(config or str(files("lmu_hf") / "tasks" / "digits.yaml"), overrides)


def _split(config: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """The file, if one is named, and the overrides."""
    overrides = list(overrides or [])
    return (None, [config, *overrides]) if config is not None and "=" in config else (config, overrides)


def _output_dir(output: str | None, name: str, experiment: Any) -> Path:
    from .launched import connect, of_the_first
    from .running import free_output_dir

    if output is not None and not output.strip():
        raise InputError("output: expected a folder, found an empty text")
    if output is not None:
        return Path(output)
    connect(experiment.training.get("use_cpu", False))
    return of_the_first(free_output_dir(name))


@app.command()
@_kind
def search(
    config: Config = None,
    overrides: Overrides = None,
    data: Data = None,
    output: Annotated[str | None, typer.Option(help="Folder for the results; runs/NAME-search by default.")] = None,
    trials: Annotated[int, typer.Option(help="How many settings to try.")] = 20,
    seed: Seed = None,
) -> None:
    """Search learning rate, weight decay, dropout, order, theta and hidden size, by the validation part alone.

    Writes best.yaml, which train takes, and trials.json.
    """
    experiment = _experiment(config, overrides, seed)

    from . import search as module

    output_dir = _output_dir(output, f"{experiment.name}-search", experiment)
    typer.echo(f"{experiment.name}: {trials} trials into {output_dir}")
    result = module.search(experiment, output_dir, data, trials=trials)
    from rich.table import Table

    best = result["best"]
    title = f"trial {best['trial'] + 1} is the best: {result['metric']} {best['value']:.4f} on the validation part"
    table = Table(title=title)
    table.add_column("setting")
    table.add_column("value", justify="right")
    for name, value in best["settings"].items():
        table.add_row(name, f"{value:.4g}")
    _console().print(table)
    typer.echo(f"train with: lmu-hf train {output_dir / module.BEST}")


@app.command()
@_kind
def evaluate(
    model_dir: ModelDir,
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml]", help="Whose task to take in place of the model's own.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The task, such as task.name=psmnist, or changes to it."),
    ] = None,
    data: Data = None,
    part: Annotated[str, typer.Option(help="train, validation, test, or all for every row of the data.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Score a trained model on a part of its task; a model without one, such as a converted one, on the task that is named."""
    from .evaluation import evaluate as run

    config, overrides = _split(config, overrides)
    scores = run(model_dir, part, data, config, overrides)
    if as_json:
        typer.echo(json.dumps(scores))
        return
    from rich.table import Table

    from .kinds import KINDS

    listed = ", ".join(f"{name} {scores[name]:.4f}" for name in KINDS[scores["kind"]].metrics)
    table = Table(title=f"{scores['task']}, {part}: {listed}")
    if "targets" in scores:
        for heading in ("target", *KINDS[scores["kind"]].metrics):
            table.add_column(heading, justify="left" if heading == "target" else "right")
        for name, metrics in scores["targets"].items():
            table.add_row(name, *(f"{value:.4g}" for value in metrics.values()))
        _console().print(table)
        return
    confusion = scores["confusion"]
    for heading in ("label", "rows", "recall", "precision", "most often taken for"):
        table.add_column(heading, justify="left" if heading in ("label", "most often taken for") else "right")
    names = scores["labels"]
    for index, row in enumerate(confusion):
        predicted = sum(other[index] for other in confusion)
        wrong = [(count, names[other]) for other, count in enumerate(row) if other != index and count]
        worst = max(wrong, default=None)
        table.add_row(
            names[index],
            str(sum(row)),
            f"{row[index] / sum(row):.4f}" if sum(row) else "-",
            f"{row[index] / predicted:.4f}" if predicted else "-",
            f"{worst[1]} ({worst[0]})" if worst else "",
        )
    _console().print(table)


@app.command()
@_kind
def predict(
    model_dir: ModelDir,
    paths: Annotated[list[str], typer.Argument(metavar="FILE...", help="Images, or CSV or NPY tables of signals.")],
    as_json: AsJson = False,
) -> None:
    """Classify files, or predict from them: images for models of pixels, CSV (a row per step) or NPY for signals."""
    from .evaluation import load_model
    from .predict import predict as run

    results = run(*load_model(model_dir), paths)
    if as_json:
        typer.echo(json.dumps(results))
        return
    from rich.table import Table

    table = Table()
    if "predictions" in results[0]:
        for heading in ("file", "target", "steps", "at the last step"):
            table.add_column(heading, justify="left" if heading in ("file", "target") else "right")
        for result in results:
            for name, values in result["predictions"].items():
                last = values[-1] if isinstance(values, list) else values
                shown = ", ".join(f"{value:.6g}" for value in (last if isinstance(last, list) else [last]))
                table.add_row(result["file"], name, str(len(values)) if isinstance(values, list) else "1", shown)
        _console().print(table)
        return
    if "values" in results[0]:
        for heading in ("file", *results[0]["values"]):
            table.add_column(heading, justify="left" if heading == "file" else "right")
        for result in results:
            table.add_row(result["file"], *(f"{value:.6g}" for value in result["values"].values()))
        _console().print(table)
        return
    for heading in ("file", "prediction", "probability", "then"):
        table.add_column(heading, justify="right" if heading == "probability" else "left")
    for result in results:
        (label, probability), *others = result["probabilities"].items()
        then = ", ".join(f"{name} {value:.3f}" for name, value in others[:2])
        table.add_row(result["file"], label, f"{probability:.3f}", then)
    _console().print(table)


@app.command()
@_kind
def push(
    model_dir: ModelDir,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="USER/NAME on the Hub, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is missing; the main one by default.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights; that of the present card, or apache-2.0, by default.")
    ] = None,
) -> None:
    """Publish a trained model on the Hub: weights, processor, code, result.json and a card made from it."""
    from huggingface_hub.utils import disable_progress_bars

    from .hub import push as run

    if not sys.stderr.isatty():
        disable_progress_bars()
    published = run(model_dir, repo_id, private=private, create_pr=create_pr, revision=revision, license=license)
    typer.echo(f"{len(published.files)} files: {published.url}")
    if published.left_out:
        typer.echo(f"not published: {', '.join(published.left_out)}")


@app.command()
@_kind
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A .keras, .h5 or .hdf5 file; with --to keras a MODEL_DIR.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the model; with --to keras a .keras file.")],
    config: Annotated[
        str | None,
        typer.Option(
            help="For weights alone: JSON of Keras' to_json(), or fields of LMUConfig that they do not tell; a file or the text."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--verify", metavar="DATA.npz", help="Inputs x and outputs y of the original to compare with."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference that --verify accepts.")] = 1e-3,
    to: Annotated[str, typer.Option(help="lmu-hf, or keras for the way back.")] = "lmu-hf",
) -> None:
    """Convert a Keras LMU checkpoint (keras-lmu, or the cell of 2019) to a model folder, or back to Keras."""
    if to not in ("lmu-hf", "keras"):
        raise InputError(f"to: expected lmu-hf or keras, found {to!r}")
    if not tolerance >= 0:
        raise InputError(f"tolerance: expected a number >= 0, found {tolerance}")
    if to == "keras" and (config is not None or data is not None):
        raise InputError("--config and --verify: for conversion from Keras only")

    from . import convert as conversion

    if to == "keras":
        written = conversion.export(source, output)
        typer.echo(f"{' -> '.join(written['layers'])}, {written['parameters']:,} parameters: {output}")
        return
    try:
        result = conversion.convert(source, output, config, data, tolerance)
    except conversion.VerificationError as error:
        typer.secho(f"lmu-hf: {error}; nothing was written", fg="red", err=True)
        raise typer.Exit(1) from error
    for note in result["notes"]:
        typer.secho(f"note: {note}", err=True)
    if result["difference"] is not None:
        typer.echo(f"largest difference from the original's outputs: {result['difference']:.2e}")
    typer.echo(f"{result['model']}, {result['parameters']:,} parameters: {output}")


def _print_result(result: dict[str, Any], output_dir: Path) -> None:
    from rich.table import Table

    table = Table(title=f"{result['name']}, seed {result['experiment']['seed']}", show_header=True)
    metrics = list(result["scores"]["test"])
    for heading in ("part", "rows", *metrics):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, scores in result["scores"].items():
        rows = result["dataset"]["rows"].get(part)
        table.add_row(part, "" if rows is None else f"{rows:,}", *(f"{scores[name]:.4f}" for name in metrics))
    _console().print(table)
    best = result["best_epoch"]
    kept = "last epoch" if best is None else f"best epoch {best:g}"
    typer.echo(
        f"{result['parameters']['trainable']:,} parameters, {kept} of {result['history'][-1]['epoch']:g}, trained in "
        f"{result['seconds']['train']:.0f} s; reloaded in a fresh process, same score\n"
        f"model, processor and result.json: {output_dir}"
    )


def _console() -> Any:
    from rich.console import Console

    # Piped output has no width of its own; a table squeezed into 80 columns loses the file names.
    return Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Entry point of the ``lmu-hf`` command."""
    app()


if __name__ == "__main__":
    main()
