"""What a figure was measured on: processor, target, caches, versions."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from threadpoolctl import threadpool_info

import fusedrnn
from fusedrnn.env import cache_directory
from fusedrnn.jit.host import cache_sizes, current_target, processor_name

_PACKAGES = ("fusedrnn", "numpy", "llvmlite", "torch", "onednn", "onednn-cpu-gomp", "onednn-cpu-iomp", "onednn-cpu-tbb")


def machine() -> dict[str, Any]:
    """Everything about this machine and process that a figure depends on, ready for JSON."""
    target = current_target()
    directory = cache_directory()
    return {
        "processor": processor_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "target": target.name,
        "target_description": target.description,
        "target_cpu": target.cpu,
        "vector_bits": target.vector_bits,
        "threads": fusedrnn.get_num_threads(),
        "caches": cache_sizes(),
        "cache_directory": str(directory) if directory else None,
        "blas": sorted({_blas_name(library) for library in threadpool_info() if library["user_api"] == "blas"}),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Version of Python and of each package that matters, if installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _blas_name(library: dict[str, Any]) -> str:
    return f"{library['internal_api']} {library['version']}"
