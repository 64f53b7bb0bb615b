"""Cells by reference: plans, graphs and exported programs name a user cell by a string."""

from __future__ import annotations

import importlib
import sys
from operator import attrgetter
from typing import Any
from urllib.parse import unquote

from fusedrnn.cell.cells import Cell
from fusedrnn.cell.user_cell import UserCell

_CELLS: dict[str, UserCell] = {}
"""The cells of this process whose reference has been requested."""
_CATALOGUE = "fusedrnn.cells"


def reference_to(cell: str | Cell) -> str:
    """The reference to a cell, by which :func:`cell_of` finds it; a mode is its own reference.

    Raises:
        TypeError: If ``cell`` is neither a mode nor a cell.
    """
    if isinstance(cell, str):
        return cell
    if not isinstance(cell, UserCell):
        raise TypeError(f"cell must be a mode or a cell from fusedrnn.cell.cell; got {cell!r}")
    return _CELLS.setdefault(cell.reference, cell).reference


def cell_of(reference: str) -> str | Cell:
    """The mode or the cell to which a reference refers.

    A cell that this process has not used yet is looked up in the module that defines it. That module is imported only
    if it is part of this package, because a reference may come from an untrusted file.

    Raises:
        ValueError: If there is no such cell, or its equations differ; the message says what to import, or that they
            differ.
    """
    if ":" not in reference:
        return reference
    cell = _CELLS.get(reference)
    if cell is None:
        module, name, _, *changes = reference.split(":")
        if module.startswith(_CATALOGUE):
            importlib.import_module(module)
        cell = _attribute(sys.modules.get(module), name)
        if cell is None:
            raise ValueError(f"cell {name!r} is unknown here: import {module}, which defines it, before")
        for change in changes:
            cell = _changed(cell, change)
        if cell.reference != reference:
            raise ValueError(f"cell {name!r} of {module} has other equations than the program was made with")
        _CELLS[reference] = cell
    return cell


def _changed(cell: UserCell, change: str) -> UserCell:
    """The cell with a change that a reference names: another rate of a mask, other heads, or its expectation."""
    mask, has_rate, rate = change.partition("=")
    if has_rate:
        return cell.with_rates(**{unquote(mask): float(rate)})
    return cell.expectation if change == "expectation" else cell.with_heads(int(change))


def _attribute(module: Any, name: str) -> UserCell | None:
    try:
        cell = attrgetter(name)(module)
    except AttributeError:
        return None
    return cell if isinstance(cell, UserCell) else None
