"""Cells that the command line names: ``path.py:name`` or ``module:name``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from fusedrnn.cell.user_cell import UserCell


def load_cells(text: str) -> list[UserCell]:
    """The cells in a list separated by commas, without duplicates.

    Raises:
        ValueError: If a file, a module or a cell of that name does not exist, or its code raises an error.
    """
    references = [reference.strip() for reference in text.split(",") if reference.strip()]
    cells = {reference: load_cell(reference) for reference in dict.fromkeys(references) or [text]}
    names = [cell.name for cell in cells.values()]
    if repeated := [reference for reference, cell in cells.items() if names.count(cell.name) > 1]:
        raise ValueError(f"--cell must name cells with different names; got {', '.join(repeated)}")
    return list(cells.values())


def load_cell(reference: str) -> UserCell:
    """The cell of a file or a module.

    Raises:
        ValueError: As :func:`load_cells` does.
    """
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise ValueError(f"--cell must be path.py:name or module:name; got {reference!r}")
    try:
        module = _module(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise ValueError(f"--cell {reference}: {type(error).__name__}: {error}") from error
    try:
        cell = attrgetter(name)(module)
    except AttributeError:
        cell = None
    if not isinstance(cell, UserCell):
        names = [other for other, value in vars(module).items() if isinstance(value, UserCell)]
        raise ValueError(f"{where} has no cell {name!r}; its cells: {', '.join(names) or 'none'}")
    return cell


def _module(path: Path) -> ModuleType:
    name = f"cells_in_{path.stem}"  # there may be another module with the name of the file
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
