"""Whether the folder of compiled kernels can be used."""

from __future__ import annotations

from fusedrnn.env import cache_directory
from fusedrnn.jit.object_cache import ObjectCache


def rejection() -> str:
    """Why no kernels can be kept on disk; empty if they can."""
    folder = cache_directory()
    if folder is None:
        return "FUSEDRNN_CACHE_DIR is empty, or there is no folder for caches"
    reason = ObjectCache(folder).rejection()
    return f"{folder} is not usable: {reason}" if reason else ""
