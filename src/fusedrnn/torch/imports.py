"""Work that waits until another module is imported, so that a part of PyTorch that is not used costs nothing."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` once, as soon as the module of that name has been imported: at once if it has been already."""
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Watch(name, callback))


class _Watch(importlib.abc.MetaPathFinder):
    """Waits for one module to be imported, calls back, and is gone."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name, self._callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load, callback = spec.loader.exec_module, self._callback

            def exec_module(module: ModuleType) -> None:
                load(module)
                callback()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
