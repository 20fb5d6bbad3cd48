"""The time loop of :mod:`lmu_hf.model.scan` in C++ for CPUs: built on first use, kept, and done without where it cannot be.

About a minute of the machine's own C++ compiler on first use; later processes load the result. Without compiler or ninja
everything still runs, on the slower loop in Python, and one log message says so. ``LMU_HF_NATIVE=0`` turns it off.
"""

import hashlib
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import torch

from ..errors import first_line

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("scan.cpp")
_SOURCES = (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))


def load() -> bool:
    """Makes the operators ``torch.ops.lmu_hf.*`` available, building them if need be; whether they are."""
    return why_not() is None


@cache
def why_not() -> str | None:
    """Why the compiled loop is not used, in words; None if it is. Builds it if need be."""
    if os.environ.get("LMU_HF_NATIVE", "1") == "0":
        return "LMU_HF_NATIVE=0"
    try:
        library = _library()
        if library.exists():
            torch.ops.load_library(str(library))
        else:
            _build_and_load(library)
    except Exception as error:  # whatever goes wrong with a compiler, the loop in Python is there
        reason = first_line(error)
        logger.warning(
            "the compiled CPU loop cannot be built, so recurrent LMUs run on the slower loop in Python: %s. It needs a C++ "
            "compiler and the package ninja (pip install lmu-hf[native]); LMU_HF_NATIVE=0 silences this message",
            reason,
        )
        logger.debug("building failed", exc_info=True)
        return reason
    return None


def release_memory() -> None:
    """Gives the system the memory of large tensors that the loops keep for their next run, as ``torch.cuda.empty_cache`` does.

    They keep no more than runs once had in use together, but for 64 MiB. What goes beyond these the system takes by itself when
    it runs short; until then Linux counts it as resident.
    """
    if why_not() is None:
        torch.ops.lmu_hf.release_memory()


def _flags() -> list[str]:
    # The loop is written for vectors; what the compiler may not assume here keeps NaN and infinity as they are.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-march=native"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    if sys.platform == "linux":
        flags.append("-fopenmp")  # what torch's parallel_for is made of
    return flags


def _library() -> Path:
    """Where the built library belongs: one per state of the sources, version of torch, kind of Python and of processor."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), processor)
    parts = [*(source.read_text() for source in _SOURCES), torch.__version__, platform.machine(), processor, *_flags()]
    parts.append(str(sysconfig.get_config_var("SOABI")))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lmu_hf" / f"scan-{key}.so"


def _build_and_load(library: Path) -> None:
    from torch.utils import cpp_extension

    if sys.platform == "win32":
        raise RuntimeError("it is written for GCC and Clang")
    library.parent.mkdir(parents=True, exist_ok=True)
    logger.warning("building the compiled CPU loop, once for this machine: about a minute")
    # ninja is looked for on PATH, where the scripts of this environment need not be.
    path = os.environ.get("PATH", "")
    # In a folder of its own and moved into place as a whole: processes that start together never see half a library, and a
    # killed one leaves no lock behind.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
        try:
            cpp_extension.load(
                name="lmu_hf_scan",
                sources=[str(_SOURCE)],
                extra_cflags=_flags(),
                extra_ldflags=["-fopenmp"] if sys.platform == "linux" else [],
                build_directory=folder,
                is_python_module=False,
            )
        finally:
            os.environ["PATH"] = path
        shutil.copyfile(Path(folder) / "lmu_hf_scan.so", library.with_suffix(f".{os.getpid()}"))
        os.replace(library.with_suffix(f".{os.getpid()}"), library)
