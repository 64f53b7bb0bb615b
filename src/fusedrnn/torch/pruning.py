"""torch.ao's structured pruning finds layers by their exact class: add our classes to its tables."""

from __future__ import annotations

import sys
from typing import Any

from fusedrnn.torch.class_map import OURS
from fusedrnn.torch.imports import after_import

_PRUNER = "torch.ao.pruning._experimental.pruner.base_structured_sparsifier"


def register() -> None:
    """Patch the tables as soon as the pruners are imported."""
    after_import(_PRUNER, _patch)


def _patch() -> None:
    """Add our classes to the default tables; does nothing if this torch's pruners have none."""
    pruner: Any = sys.modules[_PRUNER]
    torch_patterns = getattr(pruner, "_get_default_structured_pruning_patterns", None)
    torch_modules = getattr(pruner, "_get_supported_structured_pruning_modules", None)
    if torch_patterns is None or torch_modules is None:
        return

    def patterns() -> dict[Any, Any]:
        table = torch_patterns()
        return {**table, **{tuple(OURS.get(part, part) for part in pattern): prune for pattern, prune in table.items()}}

    def modules() -> set[type]:
        supported = torch_modules()
        return {*supported, *(OURS[cls] for cls in supported if cls in OURS)}

    pruner._get_default_structured_pruning_patterns = patterns
    pruner._get_supported_structured_pruning_modules = modules
