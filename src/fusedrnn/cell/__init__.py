"""The maths of the cells: equations, expressions, derivatives; no NumPy, no LLVM.

The names of this module are the language in which users write cells; docs/guides/cells.md shows it. They are imported
at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusedrnn.cell.activations import Activation
    from fusedrnn.cell.initial import chrono
    from fusedrnn.cell.language import cell, clip
    from fusedrnn.cell.masks import dropout, mask, zoneout
    from fusedrnn.cell.primitives import (
        absolute,
        exp,
        log,
        maximum,
        minimum,
        relu,
        sigmoid,
        softplus,
        sqrt,
        tanh,
        where,
    )
    from fusedrnn.cell.reductions import layer_norm, mean, variance
    from fusedrnn.cell.user_cell import UserCell

__all__ = [
    "Activation", "UserCell", "absolute", "cell", "chrono", "clip", "dropout", "exp", "layer_norm", "log", "mask",
    "maximum", "mean", "minimum", "relu", "sigmoid", "softplus", "sqrt", "tanh", "variance", "where", "zoneout",
]  # fmt: skip
_MODULES = {
    "Activation": "activations", "UserCell": "user_cell", "cell": "language", "chrono": "initial", "clip": "language",
    "dropout": "masks", "mask": "masks", "zoneout": "masks",
    "layer_norm": "reductions", "mean": "reductions", "variance": "reductions",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'primitives')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
