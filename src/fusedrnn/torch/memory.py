"""Memory that cannot be had, in PyTorch's words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


def torch_errors(function: Callable[P, Result]) -> Callable[P, Result]:
    """The same function; where it raises MemoryError, it raises the RuntimeError of PyTorch's allocator instead.

    Tools that try a smaller batch look for the allocator's words.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> Result:
        try:
            return function(*args, **options)
        except MemoryError as error:
            message = f"DefaultCPUAllocator: can't allocate memory for a recurrent layer: {error}"
            raise RuntimeError(message) from error

    return wrapped
