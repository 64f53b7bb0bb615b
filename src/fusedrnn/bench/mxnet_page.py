"""The figures that MXNet published with its fused RNN operator for CPU, on two sockets of a Xeon 8180.

T, N, I, H = 300, 20, 800, 800 in float32; a ratio is fused over non-fused samples a second, in percent.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusedrnn.testing.cases import CASES, Case

NAMES: Mapping[str, str] = {"lstm": "LSTM", "gru": "GRU", "rnn_relu": "vRNN(Relu)", "rnn_tanh": "vRNN(Tanh)"}
"""What its tables call the modes, in their order."""

_PHASES = ("inference", "training")

_PERCENT: Mapping[str, tuple[tuple[float, float], ...]] = {
    "ds2": ((210.98, 209.65), (305.87, 214.03), (296.92, 176.79), (193.33, 161.08)),
    "ds2-5bi": ((287.67, 249.73), (333.33, 260.64), (329.53, 159.17), (267.71, 149.66)),
}


def published_percent(case: Case, mode: str, phase: str, dtype: str) -> float | None:
    """The published ratio, or None if nothing was published for this."""
    if case.name not in _PERCENT or case != CASES[case.name] or phase not in _PHASES or dtype != "float32":
        return None
    return _PERCENT[case.name][list(NAMES).index(mode)][_PHASES.index(phase)]
