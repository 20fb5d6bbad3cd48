"""``lmu-hf`` in processes that are killed, with no chance to tidy up, at one named moment of a run.

Only the moment is staged; the signal is the one of ``kill -9``. Like runs within tests they reload their model where they are.
"""

import os
import shutil
import signal
from pathlib import Path

import processes
from transformers import Trainer
from transformers import trainer as trainer_module

from lmu_hf import running, training
from lmu_hf.cli import app


def die(*arguments, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def half(path):
    path = Path(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    die()


def after_half_of(name):
    """Dies when a file of the second checkpoint of this process is half written."""
    saves = []
    save = Trainer._save_checkpoint

    def saving(self, *arguments, **kwargs):
        saves.append(1)
        if len(saves) == 2:
            if name == "trainer_state.json":
                self.state.__class__.save_to_json = lambda state, path: (_write(state, path), half(path))
            else:
                write = trainer_module.torch.save
                trainer_module.torch.save = lambda content, path, *a, **k: (
                    write(content, path, *a, **k),
                    half(path) if os.path.basename(path) == name else None,
                )
        return save(self, *arguments, **kwargs)

    _write = trainer_module.TrainerState.save_to_json
    Trainer._save_checkpoint = saving


def in_rotation():
    """Dies when it has deleted half of an old checkpoint."""
    remove = shutil.rmtree

    def removing(path, *arguments, **kwargs):
        if "checkpoint-" not in str(path):
            return remove(path, *arguments, **kwargs)
        (Path(path) / "optimizer.pt").unlink()
        die()

    trainer_module.rotate_checkpoints.__globals__["shutil"] = type("shutil", (), {"rmtree": staticmethod(removing)})


MOMENTS = {
    "before the first record": lambda: setattr(running, "write_json", die),
    "optimizer half written": lambda: after_half_of("optimizer.pt"),
    "state half written": lambda: after_half_of("trainer_state.json"),
    "old checkpoint half deleted": in_rotation,
    "before scoring": lambda: setattr(training, "score", die),
    "before the picture": lambda: setattr(training, "draw", die),
    "while finishing": lambda: setattr(running.shutil, "rmtree", lambda path, **k: half(Path(path) / "trainer_state.json")),
}


def target(arguments, moment=None):
    """What such a process does; with no moment it comes to its end."""
    processes.reload_here()
    if moment is not None:
        MOMENTS[moment]()
    app([str(argument) for argument in arguments], standalone_mode=False)


def start(arguments, moment=None):
    """A new process at work."""
    return processes.start(target, arguments, moment)


def run(arguments, moment=None):
    """The exit code of such a process; the negative number of the signal that killed it."""
    process = start(arguments, moment)
    process.join()
    return process.exitcode
