"""torch.ao's structured pruning looks for layers by their exact class: it is told that ours are layers, too."""

from __future__ import annotations

import sys
from typing import Any

from fusedrnn.torch.class_map import OURS
from fusedrnn.torch.imports import after_import

_PRUNER = "torch.ao.pruning._experimental.pruner.base_structured_sparsifier"


def register() -> None:
    """Do so when somebody imports the pruners."""
    after_import(_PRUNER, _patch)


def _patch() -> None:
    """Add our classes to what pruners look for by default; nothing if this torch's pruners are built otherwise."""
    pruner: Any = sys.modules[_PRUNER]
    patterns_of = getattr(pruner, "_get_default_structured_pruning_patterns", None)
    modules_of = getattr(pruner, "_get_supported_structured_pruning_modules", None)
    if patterns_of is None or modules_of is None:
        return

    def patterns() -> dict[Any, Any]:
        known = patterns_of()
        return {**known, **{tuple(OURS.get(part, part) for part in pattern): prune for pattern, prune in known.items()}}

    def modules() -> set[type]:
        known = modules_of()
        return {*known, *(OURS[kind] for kind in known if kind in OURS)}

    pruner._get_default_structured_pruning_patterns = patterns
    pruner._get_supported_structured_pruning_modules = modules
