"""The folder of a run: claimed by one run at a time, found again by one that was interrupted, agreed on by all its processes."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .card import RESULT_FILE
from .errors import InputError
from .launched import is_first, of_the_first
from .record import as_text, hardware, versions

CHECKPOINTS = "checkpoints"
_RECORD = "run.json"
_LOCK = ".lock"


@dataclass
class Run:
    """One run and its folder.

    Attributes:
        folder: for model and record; everything to resume from lies in its ``checkpoints``.
        checkpoint: the checkpoint to go on from; None at the beginning.
        seconds: spent training before it was interrupted.
        result: of a run that had come to its end; None otherwise.
        machines: hardware and versions, and the step from which on they trained, of all machines that its first process was on.
    """

    folder: Path
    checkpoint: Path | None = None
    seconds: float = 0.0
    result: dict[str, Any] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    machines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return 0 if self.checkpoint is None else _step(self.checkpoint)

    def finish(self) -> None:
        """Deletes what is needed to resume: the run is complete."""
        for path in self.checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


@contextmanager
def claim(folder: str | Path, record: dict[str, Any]) -> Iterator[Run]:
    """Takes a folder for a run: a new one, an empty one, or that of the same run if it was interrupted.

    Where a launcher has started several processes, the first takes it, and all get its run.

    Args:
        folder: where the run writes.
        record: everything that decides the outcome, as plain data. An interrupted run goes on only if it is the same.

    Yields:
        The run. What it leaves behind when it fails can be resumed; if that is nothing, the folder is free again.

    Raises:
        InputError: the folder cannot be made, holds anything else, or another process is at work in it.
    """
    with ExitStack() as stack:
        run: Run | InputError | None = None
        if is_first():
            try:
                run = stack.enter_context(_claim(Path(folder), json.loads(json.dumps(record))))
            except InputError as error:
                run = error
        yield of_the_first(run)


@contextmanager
def _claim(folder: Path, record: dict[str, Any]) -> Iterator[Run]:
    from filelock import FileLock, Timeout

    made = _make(folder)
    lock = FileLock(folder / CHECKPOINTS / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"output: another process is training into {folder} at this moment") from error
    try:
        yield _begin_or_resume(folder, record)
    except BaseException:
        if not list(folder.glob(f"{CHECKPOINTS}/{PREFIX_CHECKPOINT_DIR}-*")) and not (folder / "config.json").exists():
            if not _others(folder):
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        lock.release()


def _make(folder: Path) -> Path | None:
    """Makes the folder, with its parents; returns the outermost one made, None if it was there."""
    try:
        made = next((path for path in (*reversed(folder.parents), folder) if not path.exists()), None)
        if made is None and any(folder.iterdir()) and not _is_of_a_run(folder):
            found = "already holds a model" if (folder / "config.json").exists() else "is not empty"
            raise InputError(f"output: {folder} {found} and is left as it is; choose another folder with --output")
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {str(folder)[:80]} cannot be used as a folder: {error.strerror}") from error
    return made


def _is_of_a_run(folder: Path) -> bool:
    # A run that was killed before its record was written has left a lock and nothing else.
    inside = {path.name for path in (folder / CHECKPOINTS).glob("*")}
    return _RECORD in inside or (
        (folder / CHECKPOINTS).is_dir() and not _others(folder) and inside <= {_LOCK, f".{_RECORD}"}
    )


def _others(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != CHECKPOINTS]


def _begin_or_resume(folder: Path, record: dict[str, Any]) -> Run:
    path = folder / CHECKPOINTS / _RECORD
    if not path.exists():
        write_json(path, {**record, "seconds": {}})
        return Run(folder, record=record)
    begun = json.loads(path.read_text(encoding="utf-8"))
    seconds, machines = begun.pop("seconds"), begun.pop("machines", [])
    if difference := _difference(begun, record):
        name, before, now = difference
        raise InputError(
            f"output: {folder} holds an interrupted run with {name} {json.dumps(before)}, found {json.dumps(now)}; repeat its "
            "command to resume it, or choose another folder with --output"
        )
    run = Run(folder, record=record)
    result = folder / RESULT_FILE
    if result.exists() and "reloaded" in (content := json.loads(result.read_text(encoding="utf-8"))):
        run.result = content  # killed while it deleted its checkpoints
        return run
    found = sorted(run.checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)
    run.checkpoint = next((path for path in found if is_whole(path, record["processes"])), None)
    keep: set[Path | None] = {run.checkpoint}
    if run.checkpoint is not None:
        state = json.loads((run.checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        keep.add(run.checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{state.get('best_global_step')}")
        run.seconds = seconds.get(str(run.step), max(seconds.values(), default=0.0))
        run.machines = [machine for machine in machines if machine["from_step"] < run.step]
    # Half of one that was being written, or deleted: transformers would count them by their times.
    for path in set(found) - keep:
        shutil.rmtree(path)
    return run


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            inner = _difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if inner is not None:
                return inner
        return None
    return None if before == now else (name.removeprefix("experiment."), before, now)


def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint was written to its end.

    transformers writes the weights first, then the optimizer, then each process its random states, and the state of the Trainer
    last. So it is whole if that can be read and the random states of all processes are there; the other files are looked at
    because a machine that loses power, unlike a process that is killed, can lose any of them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    if not all((checkpoint / name).exists() for name in names):
        return False
    return all(zipfile.is_zipfile(path) for suffix in ("pt", "pth") for path in checkpoint.glob(f"*.{suffix}"))


def free_output_dir(name: str, root: str | Path = "runs") -> Path:
    """The first of ``runs/name``, ``runs/name-2``, ... that does not exist."""
    candidate = Path(root) / name
    number = 2
    while candidate.exists():
        candidate = Path(root) / f"{name}-{number}"
        number += 1
    return candidate


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file beside and moves it into place: who is killed here leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(as_text(content), encoding="utf-8")
    temporary.replace(path)


class Bookkeeping(TrainerCallback):
    """What the Trainer needs for a resumed run to be like one that was never stopped."""

    def __init__(self, run: Run):
        self.run = run
        self.started = time.perf_counter()
        self.saved: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.run.seconds + time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        here = {"hardware": hardware(), "versions": versions()}
        if not self.run.machines or any(self.run.machines[-1][name] != value for name, value in here.items()):
            self.run.machines.append({"from_step": state.global_step, **here})
        if state.best_global_step:
            # The path in the checkpoint is that of another working directory, or of before the folder was moved.
            state.best_model_checkpoint = str(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The sum of the losses since the last log is not saved: log it first.
        if control.should_save or control.should_evaluate:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.saved[str(state.global_step)] = round(self.seconds, 2)
            written = {**self.run.record, "seconds": self.saved, "machines": self.run.machines}
            write_json(self.run.checkpoints / _RECORD, written)
