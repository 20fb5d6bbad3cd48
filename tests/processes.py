"""Fresh Python processes, as tests start dozens of, without the seconds that importing PyTorch takes each of them.

They are forked from a process that has imported what is heavy and not what is tested: nothing of Hugging Face, which looks at its
environment while it is imported, and nothing of ours.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

# What importing transformers and training with it import, whatever the order; what is not installed is passed over.
HEAVY = ["torch", "torch._dynamo", "torch.distributed.tensor", "torch.utils.tensorboard", "scipy.stats", "pandas"]
HEAVY += ["sklearn.datasets", "sklearn.metrics", "sklearn.model_selection"]
HEAVY += ["pyarrow.parquet", "matplotlib.pyplot", "PIL.Image", "pydantic"]


def start(target, *arguments):
    """A process that calls ``target``, a function of a module of the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def reload_here(set_attribute=setattr):
    """Makes runs reload their model in this process: a fresh one takes longer than they do."""
    from lmu_hf import evaluation

    set_attribute(evaluation, "score_in_fresh_process", lambda folder, data: evaluation.evaluate(folder, data=data))


def run(command, *, env=None, cwd=None, check=False, capture_output=True, text=True):
    """``subprocess.run`` for commands ``[sys.executable, "-c" or "-m", ...]`` whose output is captured as text."""
    python, flag, code, *arguments = command
    assert (python, capture_output, text) == (sys.executable, True, True)
    assert flag in ("-c", "-m")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        process = start(_python, flag, code, arguments, environment, str(cwd or Path.cwd()), *map(str, files))
        process.join()
        finished = subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))
    if check:
        finished.check_returncode()
    return finished


def _python(flag, code, arguments, environment, folder, *files):
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [folder, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        if flag == "-m":
            sys.argv = [code, *arguments]
            runpy.run_module(code, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [flag, *arguments]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(code, main.__dict__)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
