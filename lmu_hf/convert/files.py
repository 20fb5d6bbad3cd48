"""Outputs that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError


def check_free(path: Path) -> None:
    """Raises InputError if something is there already. An empty folder is nothing."""
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: already there; choose another name or remove it")


@contextmanager
def appearing(target: Path, *, folder: bool = True) -> Iterator[Path]:
    """A folder or file to write, beside ``target``; it becomes ``target`` at the end, or vanishes on an error.

    Raises:
        InputError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        written = beside if folder else beside / target.name
        yield written
        if folder:
            # mkdtemp makes folders for their owner alone; a model is as readable as other files.
            mask = os.umask(0)
            os.umask(mask)
            beside.chmod(0o777 & ~mask)
        written.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
