"""The engine on cuDNN: against the same oracles as every other, on a CUDA device, and its code without one.

Given the processor as its device, the engine runs the same code on PyTorch's own implementation.
"""

import builtins
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn.torch
from conformance import REQUEST_SHAPES, SHAPES, AnyShape, Conformance, TrainingConformance
from fusedrnn import RNNOp, RNNSpec, frozen
from fusedrnn.engines import registry
from fusedrnn.engines.cudnn import engine as cudnn
from fusedrnn.engines.cudnn.engine import CuDNNEngine
from fusedrnn.engines.cudnn.operands import Places, flatten, join, places, split
from fusedrnn.engines.cudnn.precision import FullPrecision
from fusedrnn.engines.interface import Capabilities
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, GradBuffers
from fusedrnn.spec import DTYPES, MODES
from fusedrnn.torch.eligibility import operator_dtype
from oracles import absences, without
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import variant_results, variant_spec

# What PyTorch says of its own projections, once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
no_device = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.cuda is None, reason="there is no CUDA device"
)
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, no_device])
ON_CPU = "cudnn's code on cpu"


def on_gpu(test):
    """Needs a CUDA device."""
    return pytest.mark.gpu(no_device(test))


@pytest.fixture(scope="module", autouse=True)
def engine_on_cpu():
    supports = registry.find("cudnn").capabilities
    registry.register(ON_CPU, lambda spec: CuDNNEngine(spec, "cpu"), supports, order=2000, automatic=False)
    yield
    registry.unregister(ON_CPU)


@pytest.fixture(params=["cpu", GPU])
def backend(request):
    """The engine on each device."""
    return ON_CPU if request.param == "cpu" else "cudnn"


def train(spec, x, params, states, lengths, keep, seed, backend):
    op = RNNOp(spec, backend)
    y, final, reserve = op.forward(x, params, states, training=True, lengths=lengths, reserve=keep, seed=seed)
    return y, final, partial(op.backward, reserve=reserve)


def assert_same(backend, one, other):
    """The same bits, where PyTorch promises them: it does not for RNNs on CUDA."""
    if backend == ON_CPU:
        assert_same_bits(one, other)
    elif isinstance(one, (tuple, list)):
        for left, right in zip(one, other, strict=True):
            assert_same(backend, left, right)
    else:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# On the processor, where nothing but the engine's code is tested: layers, directions, lengths of each kind, states.
FEW = (SHAPES[1], SHAPES[2], SHAPES[3], SHAPES[5], SHAPES[6], SHAPES[14], SHAPES[16])


class TestInference(Conformance):
    @pytest.fixture(autouse=True)
    def on(self, poisoned):
        self.backend = ON_CPU

    def run(self, spec, x, params, states, lengths):
        return RNNOp(spec, self.backend).forward(x, params, states, lengths=lengths)[:2]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", FEW, ids=str)
    def test_forward(self, mode, shape):
        super().test_forward(mode, shape)


class TestTraining(TrainingConformance):
    @pytest.fixture(autouse=True)
    def on(self, poisoned):
        self.backend = ON_CPU

    def train(self, *arguments):
        return train(*arguments, backend=self.backend)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", FEW, ids=str)
    def test_gradients(self, mode, shape):
        super().test_gradients(mode, shape)

    def test_dropout(self):
        """Its masks would not be ours: it declines."""
        spec = RNNSpec("gru", 3, 4, num_layers=2, dropout=0.5)
        x, params = np.ones((5, 2, 3), np.float32), np.ones(spec.layout.size, np.float32)
        op = RNNOp(spec, self.backend)
        op.forward(x, params)  # nothing is dropped
        with pytest.raises(NotImplementedError, match=r"^dropout is not supported yet by engine "):
            op.forward(x, params, training=True)


@on_gpu
class TestInferenceOnADevice(TestInference):
    @pytest.fixture(autouse=True)
    def on(self, poisoned):
        self.backend = "cudnn"

    test_forward = Conformance.test_forward


@on_gpu
class TestTrainingOnADevice(TestTraining):
    @pytest.fixture(autouse=True)
    def on(self, poisoned):
        self.backend = "cudnn"

    test_gradients = TrainingConformance.test_gradients


class TestAnyShape(AnyShape):
    @pytest.fixture(autouse=True)
    def on(self, backend):
        self.backend = backend

    def run(self, spec, x, params, states, lengths):
        return RNNOp(spec, self.backend).forward(x, params, states, lengths=lengths)[:2]


# -- variants ---------------------------------------------------------------------------------------------------------

VARIED = ("projection", "lstm-single-bias", "lstm-no-bias", "gru-single-bias", "gru-no-bias", "vanilla-no-bias")
VARIED_SHAPES = (
    Shape(6, 4, 3, 5, layers=3, bidirectional=True, lengths="edges"),
    Shape(4, 2, 5, 4, layers=2, states=False),
    Shape(3, 3, 17, 63, lengths="none"),
)


def check(backend, spec, shape):
    """All that training computes, against torch's functions step by step."""
    problem = problem_of(spec, shape)
    for keep in ("gates", "states"):
        y, final, backward = train(
            spec, problem.x, problem.params, problem.states, problem.lengths, keep, 0, backend
        )
        for absent in absences(spec):
            expected = variant_results(problem, absent)
            assert_close((y, final), expected.forward, spec.dtype, spec)
            actual = backward(*without(spec, problem.dy, problem.dstates, absent))
            assert_gradients_close(actual, expected.gradients, spec.dtype, spec, shape.T, shape.N)
    y, final, _ = RNNOp(spec, backend).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    assert_close((y, final), expected.forward, spec.dtype, spec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", VARIED_SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIED)
def test_variants(name, shape, dtype, backend):
    check(backend, variant_spec(name, shape.I, shape.H, shape.layers, shape.bidirectional, dtype), shape)


@pytest.mark.parametrize("name", ["projection", "gru-single-bias", "vanilla-no-bias"])
@pytest.mark.parametrize("lengths", ["full", "edges"])
def test_reverse(name, lengths, backend):
    shape = Shape(6, 4, 3, 5, layers=2, lengths=lengths)
    check(backend, variant_spec(name, shape.I, shape.H, shape.layers, dtype="float64", reverse=True), shape)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("state-clip", "state_clip_min is"), ("peepholes", "peepholes is"), ("coupled", "coupled_gates is"),
        ("reset-before", "reset_after is"), ("gru-gate-clip", "gate_clip is"), ("softplus", "activations is"),
        ("lstm-all", "state_clip_min, peepholes, gate_clip, activations are"),
    ],
)  # fmt: skip
def test_what_cudnn_has_not(name, lacks):
    with pytest.raises(NotImplementedError, match=f"^{lacks} not supported yet by engine 'cudnn'$"):
        RNNOp(variant_spec(name, 3, 5), "cudnn")


# -- declining --------------------------------------------------------------------------------------------------------

SPEC = RNNSpec("lstm", 3, 4, num_layers=2)


@pytest.fixture
def all_there(monkeypatch):
    """As if there were a CUDA device, with cuDNN."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn.m, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return monkeypatch


def test_the_current_device(all_there):
    assert RNNOp(SPEC, "cudnn")._engine.device == torch.device("cuda", 3)


def refused(message):
    with pytest.raises(NotImplementedError, match=rf"^{message} \(engine 'cudnn'\)$"):
        RNNOp(SPEC, "cudnn")


def test_a_torch_without_cuda(all_there):
    all_there.setattr(torch.version, "cuda", None)
    refused(f"torch {torch.__version__} is built without CUDA".replace("+", r"\+"))


def test_a_torch_without_cudnn(all_there):
    all_there.setattr(torch.backends.cudnn.m, "is_available", lambda: False)
    refused(f"torch {torch.__version__} is built without cuDNN".replace("+", r"\+"))


def test_no_device(all_there):
    all_there.setattr(torch.cuda, "is_available", lambda: False)
    refused("there is no CUDA device that torch can use")


def test_cudnn_switched_off(all_there):
    all_there.setattr(torch.backends.cudnn, "enabled", False)
    refused(r"cuDNN is switched off \(torch.backends.cudnn.enabled is False\)")


def without_module(monkeypatch, name):
    """The engine's module is imported anew, and that module cannot be."""
    for module in ("engine", "operands", "precision"):
        monkeypatch.delitem(sys.modules, f"fusedrnn.engines.cudnn.{module}")
        monkeypatch.delattr(f"fusedrnn.engines.cudnn.{module}")
    plain = builtins.__import__

    def guarded(asked, *args, **options):
        if asked.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(asked, *args, **options)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_no_torch(monkeypatch):
    without_module(monkeypatch, "torch")
    refused(r"torch is not installed \(pip install 'fusedrnn\[torch\]'\)")


def test_a_torch_that_lacks_something_else(monkeypatch):
    """Nobody is told to install what is there."""
    without_module(monkeypatch, "numpy")
    refused("No module named 'numpy'")


def test_not_unasked():
    assert RNNOp(SPEC).backend == "cpu"
    entry = registry.find("cudnn")
    assert (entry.device, entry.automatic) == ("cuda", False)
    assert entry.capabilities == Capabilities(dropout=False, options=("projection_size", "bias", "reverse"))


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 3, "bidirectional": True}, {"bias": "none"}, {"projection_size": 2}], ids=str
)
def test_weights_are_those_of_torch_nn_in_its_order(mode, options, dtype):
    if "projection_size" in options and mode != "lstm":
        mode = "lstm"
    spec = RNNSpec(mode, 3, 4, dtype=dtype, **options)
    flat = np.random.default_rng(0).standard_normal(spec.layout.size).astype(dtype)
    size = {"proj_size": 2} if "projection_size" in options else {}
    kind = torch.nn.RNN if mode.startswith("rnn") else getattr(torch.nn, mode.upper())
    module = kind(3, 4, spec.num_layers, bias=spec.bias != "none", bidirectional=spec.bidirectional, **size)
    module.double().load_state_dict({
        name: torch.from_numpy(array) for name, array in spec.layout.unpack(flat, names="torch").items()
    })  # fmt: skip
    weights = split(spec, torch.from_numpy(flat))
    assert len(weights) == len(module._flat_weights)
    for ours, theirs in zip(weights, module._flat_weights, strict=True):
        assert ours.dtype == torch.from_numpy(flat).dtype
        np.testing.assert_array_equal(ours.numpy(), theirs.detach().numpy().astype(dtype))
    np.testing.assert_array_equal(join(spec, weights).numpy(), flat)


def test_a_single_bias_stands_beside_a_zero():
    spec = RNNSpec("gru", 3, 4, num_layers=2, bias="single")
    flat = torch.arange(1.0, spec.layout.size + 1)
    weights = split(spec, flat)
    assert [len(one.shape) for one in weights] == [2, 2, 1, 1] * 2
    assert not weights[3].any() and not weights[7].any()
    assert torch.equal(join(spec, weights), flat)


def test_weights_share_no_memory_with_the_vector():
    """cuDNN's buffer takes the place of each one's own."""
    spec = RNNSpec("lstm", 3, 4)
    flat = torch.ones(spec.layout.size)
    weights = split(spec, flat)
    with torch.no_grad():
        for one in weights:
            one.set_(torch.zeros_like(one))
    assert flat.all()


@pytest.mark.parametrize("projected", [False, True])
def test_flattening_asks_for_what_torch_nn_asks_for(monkeypatch, projected):
    """The call of torch.nn's module of the same network, down to the last argument."""
    asked = []

    def record(weights, *rest):
        asked.append(([one.shape for one in weights], *rest))

    from torch.backends.cudnn import rnn

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", record)
    monkeypatch.setattr(rnn, "get_cudnn_mode", lambda mode: {"LSTM": 2}[mode])
    size = 2 if projected else None
    spec = RNNSpec("lstm", 3, 4, num_layers=2, bidirectional=True, projection_size=size)
    flatten(spec, split(spec, torch.ones(spec.layout.size)))
    each = 5 if projected else 4
    shapes = [one.shape for one in torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=size or 0)._flat_weights]
    assert asked == [(shapes, each, 3, 2, 4, size or 0, 2, False, True)]


def test_frozen_parameters_stay_on_the_device(backend):
    spec = RNNSpec("gru", 3, 4)
    op = RNNOp(spec, backend)
    x, params = np.ones((2, 1, 3), np.float32), np.full(spec.layout.size, 0.1, np.float32)
    first = op.forward(x, params)[0]
    assert op._engine._resident is None
    kept = frozen(params)
    assert_same(backend, op.forward(x, kept)[0], first)
    held = op._engine._resident[1]
    y, _, reserve = op.forward(x, kept, training=True)
    assert op._engine._resident[1] is held
    expected = op.backward(y, None, reserve)
    assert_same(backend, op.backward(y, None, op.forward(x, params, training=True)[2]), expected)
    params += 0.1
    changed = op.forward(x, params)[0]
    assert (changed != first).any()
    assert_same(backend, op.forward(x, frozen(params))[0], changed)
    assert op._engine._resident[1] is not held


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_places_are_those_of_packing(reverse):
    spec = RNNSpec("gru", 3, 4, reverse=reverse)
    lengths = np.array([2, 0, 5, 1, 2])
    x = np.random.default_rng(0).standard_normal((6, 5, 3))
    found = places(spec, lengths, 6)
    assert list(found.order) == [2, 0, 4, 3]
    turned = x.copy()
    for row, length in enumerate(lengths if reverse else ()):
        turned[:length, row] = x[:length, row][::-1]
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.from_numpy(turned[:, found.order]), lengths[found.order])
    np.testing.assert_array_equal(x[found.rows], packed.data.numpy())
    assert found.batch_sizes.tolist() == packed.batch_sizes.tolist() == [4, 3, 1, 1, 1]
    assert found.batch_sizes.dtype == np.int64


def test_no_place():
    assert places(RNNSpec("gru", 3, 4), np.zeros(3, np.int64), 2).empty
    assert not Places((slice(None),)).empty


# -- the engine's contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, np.array([2, 5])])
def test_the_protocol(backend, lengths):
    """Signatures, and what is promised of results for arguments of the plainest kind."""
    made = registry.find(backend).factory(SPEC)
    x, params = np.ones((5, 2, 3), np.float32), np.ones(SPEC.layout.size, np.float32)
    y = np.full((5, 2, 4), np.nan, np.float32)
    made.compile()
    made.compile(training=True)
    operands = ForwardOperands(x, params, None, lengths, y)
    final = made.forward(operands)
    assert np.isnan(y).any() == (lengths is not None)
    for save in ("gates", "states"):
        again, residuals = made.train(operands, save, 0)
        for one, other in zip(final, again, strict=True):
            assert one.flags.owndata
            np.testing.assert_allclose(one, other, rtol=1e-5)
        bound = made.reserve_bytes(5, 2, save)
        assert 0 < residuals.nbytes <= bound
        assert lengths is not None or residuals.nbytes == bound
        into = np.full_like(x, np.nan)
        dy = np.where(np.isnan(y), np.nan, y)
        made.backward(residuals, BackwardOperands(dy, (None, None), GradBuffers(into, None, None)))
        assert np.isnan(into[2:, 0]).all() == (lengths is not None)
        assert not np.isnan(into[:2]).any()
        made.backward(residuals, BackwardOperands(y, (None, None), GradBuffers(None, None, None)))
    assert made.reserve_bytes(5, 2, "states") < made.reserve_bytes(5, 2, "gates")


@pytest.mark.parametrize("shape", REQUEST_SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_keeping_states_alone_gives_the_same_bits(mode, shape, backend):
    problem = problem_of(shape.spec(mode), shape)
    results = []
    for keep in ("gates", "states"):
        arguments = problem.spec, problem.x, problem.params, problem.states, problem.lengths, keep, 0
        y, final, backward = train(*arguments, backend=backend)
        results.append((y, final, backward(problem.dy, problem.dstates)))
    assert_same(backend, *results)


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_what_happens_later_does_not_matter(keep, backend):
    shape = Shape(5, 3, 4, 6, layers=2, lengths="edges")
    problem = problem_of(shape.spec("lstm"), shape)
    x, params, states = problem.astype("float32")
    lengths = problem.lengths.copy()
    y, final, backward = train(problem.spec, x, params, states, lengths, keep, 0, backend)
    expected = backward(problem.dy, problem.dstates)
    for array in (x, params, *states, lengths, y, *final):
        array[...] = 0
    assert_same(backend, backward(problem.dy, problem.dstates), expected)


def test_arrays_in_any_strides(backend):
    shape = Shape(5, 3, 4, 6, lengths="edges")
    problem = problem_of(shape.spec("gru"), shape)
    op = RNNOp(problem.spec, backend)
    expected = op.forward(problem.x, problem.params, lengths=problem.lengths)[0]
    x = np.ascontiguousarray(problem.x[::-1, ::-1])[::-1, ::-1]
    x.flags.writeable = False
    out = np.full((10, 3, 12), np.nan, np.float32)[::-2, :, :6]
    assert op.forward(x, problem.params, lengths=problem.lengths, out=out)[0] is out
    assert_same(backend, out, expected)


def test_whatever_mode_the_caller_is_in(backend):
    shape = Shape(5, 3, 4, 6)
    problem = problem_of(shape.spec("lstm"), shape)
    arguments = problem.spec, problem.x, problem.params, problem.states, None, "gates", 0, backend
    y, final, backward = train(*arguments)
    expected = y, final, backward(problem.dy, problem.dstates)
    kind = "cpu" if backend == ON_CPU else "cuda"
    for mode in (torch.no_grad, torch.inference_mode, partial(torch.autocast, kind, torch.bfloat16)):
        with mode():
            y, final, backward = train(*arguments)
            assert_same(backend, (y, final, backward(problem.dy, problem.dstates)), expected)


def test_many_threads_at_once(backend):
    shape = Shape(5, 3, 4, 6, layers=2, lengths="some")
    problem = problem_of(shape.spec("gru"), shape)
    op = RNNOp(problem.spec, backend)
    arguments = problem.spec, problem.x, problem.params, problem.states, problem.lengths, "gates", 0
    y, _, shared = train(*arguments, backend=backend)
    expected = shared(problem.dy, problem.dstates)
    found = [None] * 8

    def run(place):
        for _ in range(5):
            mine = op.forward(problem.x, problem.params, problem.states, lengths=problem.lengths, training=True)
            own = op.backward(problem.dy, problem.dstates, mine[2])
            found[place] = mine[0], shared(problem.dy, problem.dstates), own

    threads = [threading.Thread(target=run, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in found:
        assert_same(backend, one, (y, expected, expected))


# -- number formats ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    """PyTorch's switches as they were, whatever a test does to them."""
    before = torch.backends.cudnn.allow_tf32
    yield torch.backends.cudnn.rnn
    # By the older switch, which sets them all: what torch.export reads is that one.
    torch._C._set_cudnn_allow_tf32(before)
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_off_and_then_as_before(tf32, allowed):
    torch.backends.cudnn.allow_tf32 = allowed
    guard = FullPrecision()
    with guard:
        assert not torch.backends.cudnn.allow_tf32
        with guard:
            assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32  # the first to come is still there
    assert torch.backends.cudnn.allow_tf32 is allowed
    with pytest.raises(ZeroDivisionError), guard:
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has one switch alone")
@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_tf32_by_the_newer_switches(tf32, before):
    """Where RNNs and convolutions differ, the older switch cannot be read."""
    tf32.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before, {"tf32": "ieee", "ieee": "tf32"}[before]
    with FullPrecision():
        assert tf32.fp32_precision == "ieee"
    assert tf32.fp32_precision == before
    assert torch.backends.cudnn.conv.fp32_precision != before


def test_which_calls_switch(monkeypatch):
    """float32 on CUDA, and no other."""
    inside = []

    class Guard:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.append(False)

    monkeypatch.setattr(cudnn, "full_precision", Guard())
    for dtype, device in (("float32", "cpu"), ("float64", "cpu"), ("float64", "cuda")):
        with CuDNNEngine(RNNSpec("gru", 3, 4, dtype=dtype), device)._ours(differentiable=False):
            assert not inside
    with CuDNNEngine(RNNSpec("gru", 3, 4), "cuda")._ours(differentiable=False):
        assert inside == [True]
    assert inside == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_leave_tensors_on_cuda_to_torch_nn(dtype):
    """By what the tensor says of itself: a stand-in will do."""
    with FakeTensorMode():
        there, here = (torch.empty((5, 2, 3), dtype=dtype, device=device) for device in ("cuda", "cpu"))
    assert there.is_cuda
    assert operator_dtype(there) is None
    assert operator_dtype(here) is dtype


# -- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [GPU])
def test_tf32_stays_as_it_was(device):
    before = torch.backends.cudnn.allow_tf32
    problem = problem_of(SHAPES[12].spec("lstm"), SHAPES[12])
    *_, backward = train(problem.spec, problem.x, problem.params, problem.states, None, "gates", 0, "cudnn")
    backward(problem.dy, problem.dstates)
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("projected", [False, True])
def test_the_kernels_are_cudnns(device, projected):
    """One node of cuDNN's in the graph, and weights that lie as it wants them: it says so if they do not."""
    spec = RNNSpec("lstm", 3, 8, num_layers=2, projection_size=4 if projected else None)
    made = registry.find("cudnn").factory(spec)
    _, residuals = made.train(made._blank(5, 2), "gates", 0)
    names, nodes = set(), [result.grad_fn for result in residuals.results]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [one for one, _ in node.next_functions if one is not None]
    assert "CudnnRnnBackward0" in names


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("packed", [False, True])
def test_modules_on_a_device(device, kind, packed, runs):
    """Tensors on CUDA go where torch.nn's go: the same bits, and our kernels are not asked."""
    torch.manual_seed(0)
    ours = getattr(fusedrnn.torch, kind)(8, 16, 2, bidirectional=True).to(device)
    theirs = getattr(torch.nn, kind)(8, 16, 2, bidirectional=True).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 8, device=device)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2])
    found = []
    for net in (ours, theirs):
        y = net(x)[0]
        y = y.data if packed else y
        y.square().sum().backward()
        found.append([y.detach(), *(one.grad for one in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert one.is_cuda
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not runs
    ours.cpu()(x.cpu())
    assert len(runs) == 1


@pytest.mark.parametrize("device", [GPU])
def test_a_model_goes_to_a_device_and_back(device, runs):
    model = torch.nn.Sequential(torch.nn.GRU(8, 16, batch_first=True))
    fusedrnn.torch.accelerate(model)
    x = torch.randn(3, 5, 8)
    before = model(x)[0]
    there = model.to(device)(x.to(device))[0]
    assert there.is_cuda and len(runs) == 1
    assert torch.allclose(there.cpu(), before, rtol=1e-3, atol=1e-3)  # TF32 may be on: it is the caller's to say
    assert torch.equal(model.to("cpu")(x)[0], before)
    y, _ = model.to(device)[0](x.to(device), lengths=[5, 3, 1])
    assert y.is_cuda and not y[1, 3:].any()
