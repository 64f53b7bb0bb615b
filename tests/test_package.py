"""The public names, of which some are imported at first use."""

import subprocess
import sys

import pytest

import fusedrnn


def run(program):
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_every_public_name_exists():
    assert set(fusedrnn.__all__) <= set(dir(fusedrnn))
    for name in fusedrnn.__all__:
        assert getattr(fusedrnn, name) is not None
    namespace = {}
    exec("from fusedrnn import *", namespace)
    assert set(fusedrnn.__all__) <= set(namespace)


def test_unknown_names():
    with pytest.raises(AttributeError, match=r"^module 'fusedrnn' has no attribute 'gru'$"):
        fusedrnn.gru  # noqa: B018 -- raises


def test_adapters_are_imported_at_first_use():
    loaded = "print(*(name for name in sys.modules if name.startswith('fusedrnn.')))"
    before = run(f"import sys, fusedrnn; {loaded}")
    assert not any(name.startswith(("fusedrnn.mxnet", "fusedrnn.torch", "fusedrnn.onnx")) for name in before)
    assert not any(name.startswith("fusedrnn.engines.cpu") for name in before)
    after = run(f"import sys, fusedrnn; fusedrnn.LSTMCell; {loaded}")
    assert "fusedrnn.mxnet.rnn" in after
    assert run("import fusedrnn; print(fusedrnn.mxnet.nd.rnn is fusedrnn.rnn)") == ["True"]
