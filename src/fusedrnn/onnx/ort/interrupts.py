"""Errors that are no Exception, such as KeyboardInterrupt, in a replaced node: raised again after ONNX Runtime.

ONNX Runtime makes an error of its own of whatever a node raises. These errors must reach the caller unchanged. Python
runs signal handlers in the main thread, so the node's thread is that of the call of ONNX Runtime.
"""

from __future__ import annotations

import threading

SIGNALLED = "interrupted: a signal handler raised an exception"
"""The message of an error whose exception is lost, since a signal handler raised it before Python could catch it."""


class _Kept(threading.local):
    """The error of a thread that is to be raised again."""

    error: BaseException | None = None


_kept = _Kept()


def keep(error: BaseException | None) -> None:
    """Keep the error of a node if it is no Exception; None to forget an earlier one."""
    _kept.error = None if isinstance(error, Exception) else error


def raise_interrupt(error: Exception) -> None:
    """If an interrupt caused this error of ONNX Runtime, raise the interrupt, or the error itself if that is lost."""
    kept, _kept.error = _kept.error, None
    if kept is not None:
        raise kept
    if SIGNALLED in str(error):
        raise error
