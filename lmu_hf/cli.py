"""The command line: ``lmu-hf train | evaluate | predict``."""

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

from .errors import InputError

app = typer.Typer(
    name="lmu-hf",
    help="Legendre Memory Units for Hugging Face: train, evaluate and use them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelDir = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Folder of a trained model.")]
Data = Annotated[str | None, typer.Option(help="Local file or folder, or id of a dataset on the Hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a table.")]


def _kind(command: Callable[..., None]) -> Callable[..., None]:
    """Turns wrong input into one line and exit code 2; anything else is a defect and keeps its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            typer.secho(f"lmu-hf: {' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(2) from error

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
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml]", help="The experiment; the built-in digits without one.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as model.order=64.")
    ] = None,
    data: Data = None,
    output: Annotated[str | None, typer.Option(help="Folder for the model; runs/NAME by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, in place of the experiment's.")] = None,
    progress: Annotated[
        bool | None, typer.Option(help="Show a progress bar rather than a line per epoch; by default on a terminal.")
    ] = None,
) -> None:
    """Train a model: the best epoch on the validation part is kept, scored on the test part, saved, reloaded and checked."""
    overrides = list(overrides or [])
    if config is not None and "=" in config:
        overrides.insert(0, config)
        config = None
    if seed is not None:
        overrides.append(f"seed={seed}")

    from .experiment import Experiment

    experiment = Experiment.read(config or str(files("lmu_hf") / "tasks" / "digits.yaml"), overrides)

    from . import training

    if output is not None and not output.strip():
        raise InputError("output: expected a folder, found an empty text")
    output_dir = Path(output) if output is not None else training.free_output_dir(experiment.name)
    typer.echo(f"{experiment.name}: training into {output_dir}")
    result = training.train(experiment, output_dir, data, progress=sys.stderr.isatty() if progress is None else progress)
    _print_result(result, output_dir)


@app.command()
@_kind
def evaluate(
    model_dir: ModelDir,
    data: Data = None,
    part: Annotated[str, typer.Option(help="train, validation, test, or all for every row of the data.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Score a trained model on a part of its task."""
    from .training import evaluate as run

    scores = run(model_dir, part, data)
    if as_json:
        typer.echo(json.dumps(scores))
        return
    from rich.table import Table

    confusion = scores["confusion"]
    table = Table(title=f"{scores['task']}, {part}: accuracy {scores['accuracy']:.4f}, loss {scores['loss']:.4f}")
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
    """Classify files: images for models of pixels, CSV (a row per step, a column per channel) or NPY for signals."""
    from .predict import predict as run
    from .training import load_model

    results = run(*load_model(model_dir), paths)
    if as_json:
        typer.echo(json.dumps(results))
        return
    from rich.table import Table

    table = Table()
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


def _print_result(result: dict[str, Any], output_dir: Path) -> None:
    from rich.table import Table

    table = Table(title=f"{result['name']}, seed {result['experiment']['seed']}", show_header=True)
    for heading in ("part", "rows", "accuracy", "loss"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, scores in result["scores"].items():
        rows = result["dataset"]["rows"][part]
        table.add_row(part, f"{rows:,}", f"{scores['accuracy']:.4f}", f"{scores['loss']:.4f}")
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
