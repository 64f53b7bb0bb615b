"""Whether cuDNN may round the factors of float32 products to TF32: a switch of PyTorch's, for the whole process."""

from __future__ import annotations

from typing import Any

import torch

from fusedrnn.locks import Lock

_switches: Any = torch.backends.cudnn.rnn


class FullPrecision:
    """A context in which cuDNN multiplies in float32 and not in TF32.

    PyTorch's switch is for the whole process: the first thread to enter turns TF32 off, the last one to leave sets the
    switch back.
    """

    def __init__(self) -> None:
        self._lock, self._entered = Lock(), 0
        self._before: str | None = None  # None: nothing to restore; "": PyTorch's older switch was on

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self._before = self._turn_off()
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered or self._before is None:
                return
            if self._before:
                _switches.fp32_precision = self._before
            else:
                torch._C._set_cudnn_allow_tf32(True)

    @staticmethod
    def _turn_off() -> str | None:
        try:
            allowed = torch._C._get_cudnn_allow_tf32()
        except RuntimeError:  # the newer switches differ for RNNs and convolutions: then the older one has no value
            before = str(_switches.fp32_precision)
            if before == "ieee":
                return None
            _switches.fp32_precision = "ieee"
            return before
        if allowed:
            torch._C._set_cudnn_allow_tf32(False)
        return "" if allowed else None


full_precision = FullPrecision()
