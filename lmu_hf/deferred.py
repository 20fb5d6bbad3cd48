"""Registers with the Auto classes of transformers when they are loaded, and leaves them alone until then.

transformers loads its own modules when they are asked for, and those of the Auto classes take seconds. Modules that a process
imports by whatever name are seen by a finder in ``sys.meta_path`` (PEP 451). The Auto classes are loaded in the middle of modules
that need them and that registration needs, so it waits until the outermost import of the two packages is done: before the code
that imported something goes on, the model type is registered.
"""

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGES = {"transformers", __package__}

# Whatever makes a model from its type's name has loaded this, and so has all that makes a model.
_AUTO = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Registers now if the Auto classes are loaded, else when they are; errors of the registration reach who imports then."""
    if _AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module(".registration", __package__)


class _Finder(MetaPathFinder):
    """Finds modules of the two packages where the other finders find them, and counts those that a thread is executing."""

    def __init__(self) -> None:
        self.running = threading.local()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in _PACKAGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Counted(spec.loader, self)
        return spec

    def enter(self) -> None:
        self.running.depth = getattr(self.running, "depth", 0) + 1

    def leave(self) -> None:
        self.running.depth -= 1
        if self.running.depth == 0 and _AUTO in sys.modules:
            with suppress(ValueError):  # another thread has done so and may still be registering, which this one waits for
                sys.meta_path.remove(self)
            _register()


class _Counted(Loader):
    """Another loader that tells the finder when it executes a module; the module itself keeps the other one."""

    def __init__(self, loader: Loader, finder: _Finder):
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.enter()
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.leave()
