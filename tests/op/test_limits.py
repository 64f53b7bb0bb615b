"""Impossible sizes raise an error that names the argument; memory that cannot be allocated raises a MemoryError."""

import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fusedrnn import Activation, RNNOp, RNNSpec, frozen, set_num_threads
from fusedrnn.mxnet import gluon
from fusedrnn.mxnet.rnn import GRUCell
from fusedrnn.scalars import MAX_BYTES
from fusedrnn.spec_sizes import MAX_LAYERS

HUGE = 10**5000  # more digits than Python prints
OP = RNNOp(RNNSpec("gru", 3, 4))
PARAMS = np.zeros(OP.spec.layout.size, np.float32)
CELL = GRUCell(4)
LAYER = gluon.rnn.GRU(4, input_size=3)

ARGUMENTS = [
    ("input_size", lambda n: RNNSpec("gru", n, 4)),
    ("hidden_size", lambda n: RNNSpec("lstm", 5, n)),
    ("num_layers", lambda n: RNNSpec("lstm", 5, 4, n)),
    ("projection_size", lambda n: RNNSpec("lstm", 5, 4, projection_size=n)),
    ("batch", lambda n: OP.stream(PARAMS, batch=n)),
    ("batch", lambda n: OP.reserve_size(3, n)),
    ("steps", lambda n: OP.reserve_size(n, 3)),
    ("batch_size", lambda n: CELL.begin_state(n)),
    ("batch_size", lambda n: LAYER.begin_state(n)),
]


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 2**62, 2**63, 2**70, HUGE], ids=["48", "62", "63", "70", "16610"])
@pytest.mark.parametrize(("name", "call"), ARGUMENTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ARGUMENTS)])
def test_huge_sizes(name, call, size):
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(size)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hidden_size", lambda: RNNSpec("lstm", 5, 2**40)),
        ("hidden_size", lambda: RNNSpec("gru", 5, 2**24, bidirectional=True)),
        ("input_size", lambda: RNNSpec("rnn_tanh", 2**46, 2)),
        ("num_layers", lambda: RNNSpec("gru", 3, 2, 10**7)),
        ("num_layers", lambda: RNNSpec("gru", 3, 2, MAX_LAYERS + 1)),
        ("num_layers", lambda: RNNSpec("lstm", 5, 2**17, MAX_LAYERS)),
        ("batch", lambda: OP.stream(PARAMS, batch=2**47)),
        ("batch_size", lambda: CELL.begin_state(2**47)),
        ("batch_size", lambda: LAYER.begin_state(2**47)),
        ("alpha", lambda: Activation("elu", HUGE)),
        ("beta", lambda: Activation("affine", 1, -HUGE)),
        ("dropout", lambda: RNNSpec("gru", 3, 4, 2, dropout=HUGE)),
        ("gate_clip", lambda: RNNSpec("lstm", 3, 4, gate_clip=HUGE)),
        ("state_clip_max", lambda: RNNSpec("lstm", 3, 4, state_clip_min=0, state_clip_max=HUGE)),
        ("i2h_weight_initializer", lambda: gluon.rnn.GRU(4, i2h_weight_initializer=HUGE)),
        ("threads", lambda: set_num_threads(HUGE)),
        ("threads", lambda: set_num_threads(-HUGE)),
        ("seed", lambda: OP.forward(np.zeros((2, 1, 3), np.float32), PARAMS, training=True, seed=HUGE)),
    ],
)
def test_other_huge_arguments(name, call):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call()


@pytest.mark.parametrize(("name", "call"), ARGUMENTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ARGUMENTS)])
def test_negative_sizes(name, call):
    for size in (-1, -HUGE):
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            call(size)


def test_the_largest_allowed_sizes():
    assert RNNSpec("gru", 3, 2, MAX_LAYERS).num_layers == MAX_LAYERS
    spec = RNNSpec("rnn_tanh", 2**44, 1)
    assert spec.layout.size * 4 < MAX_BYTES
    RNNOp(spec)


@pytest.mark.parametrize("mask", [False, True])
def test_masked_parameters_are_refused_as_forward_refuses_them(mask):
    masked = np.ma.masked_array(PARAMS, mask=mask)
    x = np.zeros((1, 1, 3), np.float32)
    for call in (lambda: frozen(masked), lambda: OP.stream(masked), lambda: OP.forward(x, masked)):
        with pytest.raises(TypeError, match=r"params must be a NumPy array.*got MaskedArray"):
            call()


# Limits the address space, then calls with growing sizes.
SCARCE = """
import resource, sys, warnings
import numpy as np
from numpy.lib.stride_tricks import as_strided
from fusedrnn import RNNOp, RNNSpec
warnings.simplefilter("ignore")  # threads that cannot start
training = sys.argv[1] == "training"
spec = RNNSpec("lstm", 64, 256)
op, params = RNNOp(spec), np.full(spec.layout.size, 0.01, np.float32)
small = np.ones((3, 2, 64), np.float32)
before, _, reserve = op.forward(small, params, training=training)
if training:
    first = op.backward(before, None, reserve)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))
failed = 0
for steps, batch in (2000, 400), (100, 9000), (700, 400), (120, 400), (60, 400), (200, 1000):
    x = as_strided(np.ones(64, np.float32), (steps, batch, 64), (0, 0, 4))
    try:
        y, states, reserve = op.forward(x, params, training=training)
        if training:
            op.backward(y, None, reserve)
    except MemoryError:
        failed += 1
    y = states = reserve = None
assert failed >= 4, failed
after, _, reserve = op.forward(small, params, training=training)
assert (before == after).all()
if training:
    assert all((one == other).all() for one, other in zip(first[:2], op.backward(before, None, reserve)))
print("right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("phase", ["inference", "training"])
def test_memory_errors(phase):
    done = subprocess.run([sys.executable, "-c", SCARCE, phase], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "right"


@pytest.mark.parametrize("part", ["forward", "training", "backward"])
def test_memory_errors_in_torch(monkeypatch, part):
    """PyTorch's allocator raises the same error; the next call works."""
    torch = pytest.importorskip("torch")
    from fusedrnn.runtime import buffers
    from fusedrnn.torch import GRU

    net, x = GRU(6, 70), torch.ones(40, 3, 6)
    net(x)[0].sum().backward()
    expected = net(x)[0]
    with monkeypatch.context() as patch:
        for kind in (buffers.ScratchPool, buffers.BufferPool):
            patch.setattr(kind, "lease" if kind is buffers.BufferPool else "acquire", _no_memory)
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
            if part == "forward":
                torch.no_grad()(net)(x)
            elif part == "training":
                net(x)
            else:
                expected.sum().backward(retain_graph=True)
    assert torch.equal(net(x)[0], expected)
    expected.sum().backward()


def _no_memory(*_):
    raise MemoryError("none is left")


def test_memory_errors_of_scratch():
    from fusedrnn.runtime.buffers import aligned_empty

    for size in 1 << 46, 1 << 62, 1 << 80:
        with pytest.raises(MemoryError):
            aligned_empty((size,), np.uint8)


def test_memory_errors_of_onednn():
    from fusedrnn.engines.onednn.library import OUT_OF_MEMORY, Library

    library = SimpleNamespace(_functions={"memory_create": lambda: OUT_OF_MEMORY})
    with pytest.raises(MemoryError, match="dnnl_memory_create"):
        Library.call(library, "memory_create")


def test_memory_errors_of_cudnn():
    torch = pytest.importorskip("torch")
    from fusedrnn.engines.cudnn.engine import CuDNNEngine

    engine = CuDNNEngine(OP.spec, torch.device("cpu"))
    with pytest.raises(MemoryError, match="allocate"), engine._torch_modes(differentiable=False):
        torch.empty(1 << 46, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), engine._torch_modes(differentiable=False):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
