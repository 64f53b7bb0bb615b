"""Whether cuDNN may round the factors of its products: a switch of PyTorch's, for the whole process."""

from __future__ import annotations

from typing import Any

import torch
from torch.backends.cudnn import rnn

from fusedrnn.locks import Lock

_switches: Any = rnn


class FullPrecision:
    """While any thread is inside, cuDNN multiplies float32 as such and not as TF32; then as before.

    The switch is PyTorch's, for the whole process: it is thrown by the first to come and put back by the last to go,
    and left alone if TF32 is off anyway.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._before: str | None = None  # None: nothing to put back; "": PyTorch's older switch was on

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._switch_off()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside or self._before is None:
                return
            if self._before:
                _switches.fp32_precision = self._before
            else:
                torch._C._set_cudnn_allow_tf32(True)

    @staticmethod
    def _switch_off() -> str | None:
        try:
            allowed = torch._C._get_cudnn_allow_tf32()
        except RuntimeError:  # by its newer switches, RNNs and convolutions differ: the older one has no value then
            before = str(_switches.fp32_precision)
            if before == "ieee":
                return None
            _switches.fp32_precision = "ieee"
            return before
        if allowed:
            torch._C._set_cudnn_allow_tf32(False)
        return "" if allowed else None


full_precision = FullPrecision()
