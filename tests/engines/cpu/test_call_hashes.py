"""Recorded hashes of random calls: outputs and gradients keep their bits from one revision to the next.

``python tests/goldens/call_hashes.py`` checks all 500 calls; here the plain cells run on the targets that need no
emulation.
"""

import numpy as np
import pytest

import call_hashes
from fusedrnn.jit.host import available_targets
from fusedrnn.jit.target import is_x86
from fusedrnn.spec import MODES

pytestmark = pytest.mark.skipif(not is_x86(), reason="the calls were recorded on x86")

_PLAIN = {"mode", "dtype", "input_size", "hidden_size", "num_layers", "bidirectional", "dropout", "reverse"}
CALLS = [call for call in call_hashes.load() if call["engine"] == "cpu" and call["spec"].keys() <= _PLAIN]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ["avx2", "generic"])
def test_calls_have_the_recorded_hashes(mode, target, monkeypatch):
    if target not in {native.name for native in available_targets()}:
        pytest.skip(f"this processor has no {target}")
    monkeypatch.setenv("FUSEDRNN_TARGET", target)
    calls = [call for call in CALLS if call["target"] == target and call["spec"]["mode"] == mode]
    assert len(calls) >= 10
    for call in calls:
        assert call_hashes.run(call) == call["hash"], call


def test_changed_bit_changes_the_hash(monkeypatch):
    call = next(call for call in CALLS if call["target"] == "generic")
    monkeypatch.setenv("FUSEDRNN_TARGET", call["target"])
    plain = np.ascontiguousarray

    def flipped(array):
        copy = plain(array).copy()
        copy.view(np.uint8).reshape(-1)[0] ^= 1
        return copy

    monkeypatch.setattr(np, "ascontiguousarray", flipped)
    assert call_hashes.run(call) != call["hash"]
