"""The engine on cuDNN: against the same oracles as every other engine, on a CUDA device and on the CPU.

On the CPU, the engine's code runs on PyTorch's own implementation.
"""

import builtins
import sys
import threading
from dataclasses import replace
from functools import cache, partial

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
from fusedrnn.engines.cudnn.operands import PackedIndices, flatten, join, packed_indices, split
from fusedrnn.engines.cudnn.precision import FullPrecision
from fusedrnn.engines.interface import Capabilities
from fusedrnn.engines.operands import BackwardOperands, ForwardOperands, GradBuffers
from fusedrnn.spec import DTYPES, MODES
from fusedrnn.torch.eligibility import operator_dtype
from oracles import absences, without
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of
from variants import variant_results_by_absence, variant_spec

# PyTorch warns of projections once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
no_device = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.cuda is None, reason="there is no CUDA device"
)
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, no_device])
ON_CPU = "cudnn's code on cpu"


def on_gpu(test):
    """Mark a test that needs a CUDA device."""
    return pytest.mark.gpu(no_device(test))


@pytest.fixture(scope="module", autouse=True)
def engine_on_cpu():
    supports = registry.find("cudnn").capabilities
    registry.register(ON_CPU, lambda spec: CuDNNEngine(spec, "cpu"), supports, order=2000, automatic=False)
    yield
    registry.unregister(ON_CPU)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """PyTorch's threads cost more than they save: the problems are small, and tests share the processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", GPU])
def backend(request):
    """The name of the engine on each device."""
    return ON_CPU if request.param == "cpu" else "cudnn"


def train(spec, x, params, states, lengths, save, seed, backend):
    op = RNNOp(spec, backend)
    y, final, reserve = op.forward(x, params, states, training=True, lengths=lengths, reserve=save, seed=seed)
    return y, final, partial(op.backward, reserve=reserve)


def assert_same(backend, actual, expected):
    """The same bits, where PyTorch promises them: it does not for RNNs on CUDA."""
    if backend == ON_CPU:
        assert_same_bits(actual, expected)
    elif isinstance(actual, (tuple, list)):
        for left, right in zip(actual, expected, strict=True):
            assert_same(backend, left, right)
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# For the CPU, where only the engine's code is tested: layers, directions, lengths of each kind, states.
CPU_SHAPES = (
    SHAPES[1], SHAPES[2], SHAPES[3], SHAPES[5], replace(SHAPES[6], T=17, I=17), SHAPES[14], SHAPES[16],
)  # fmt: skip


class TestInference(Conformance):
    @pytest.fixture(autouse=True)
    def set_backend(self, poisoned):
        self.backend = ON_CPU

    def run(self, spec, x, params, states, lengths):
        return RNNOp(spec, self.backend).forward(x, params, states, lengths=lengths)[:2]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
    def test_forward(self, mode, shape):
        super().test_forward(mode, shape)


class TestTraining(TrainingConformance):
    @pytest.fixture(autouse=True)
    def set_backend(self, poisoned):
        self.backend = ON_CPU

    def train(self, *arguments):
        return train(*arguments, backend=self.backend)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
    def test_gradients(self, mode, shape):
        super().test_gradients(mode, shape)

    def test_dropout(self):
        """The engine refuses dropout: its masks would differ from ours."""
        spec = RNNSpec("gru", 3, 4, num_layers=2, dropout=0.5)
        x, params = np.ones((5, 2, 3), np.float32), np.ones(spec.layout.size, np.float32)
        op = RNNOp(spec, self.backend)
        op.forward(x, params)  # nothing is dropped
        with pytest.raises(NotImplementedError, match=r"^dropout is not supported by engine "):
            op.forward(x, params, training=True)


@on_gpu
class TestInferenceOnADevice(TestInference):
    @pytest.fixture(autouse=True)
    def set_backend(self, poisoned):
        self.backend = "cudnn"

    test_forward = Conformance.test_forward


@on_gpu
class TestTrainingOnADevice(TestTraining):
    @pytest.fixture(autouse=True)
    def set_backend(self, poisoned):
        self.backend = "cudnn"

    test_gradients = TrainingConformance.test_gradients


class TestAnyShape(AnyShape):
    @pytest.fixture(autouse=True)
    def set_backend(self, backend):
        self.backend = backend

    def run(self, spec, x, params, states, lengths):
        return RNNOp(spec, self.backend).forward(x, params, states, lengths=lengths)[:2]


# -- variants ---------------------------------------------------------------------------------------------------------

CUDNN_VARIANTS = ("projection", "lstm-single-bias", "lstm-no-bias", "gru-single-bias", "gru-no-bias", "vanilla-no-bias")
VARIANT_SHAPES = (
    Shape(6, 4, 3, 5, layers=3, bidirectional=True, lengths="edges"),
    Shape(4, 2, 5, 4, layers=2, states=False),
    Shape(3, 3, 17, 63, lengths="none"),
)


@cache
def expected_variant(spec, shape):
    """The results of the oracle in float64, by the gradients that are absent."""
    return variant_results_by_absence(problem_of(spec, shape), absences(spec))


def check(backend, spec, shape):
    """Compare all results of training and inference with torch's functions step by step."""
    problem = problem_of(spec, shape)
    # The problem has the same numbers in every dtype.
    expected = expected_variant(replace(spec, dtype="float64"), shape)
    for save in ("gates", "states"):
        y, final, backward = train(spec, problem.x, problem.params, problem.states, problem.lengths, save, 0, backend)
        assert_close((y, final), expected["nothing"].forward, spec.dtype, spec)
        for absent, results in expected.items():
            gradients = backward(*without(spec, problem.dy, problem.dstates, absent))
            assert_gradients_close(gradients, results.gradients, spec.dtype, spec, shape.T, shape.N)
    y, final, _ = RNNOp(spec, backend).forward(problem.x, problem.params, problem.states, lengths=problem.lengths)
    assert_close((y, final), expected["nothing"].forward, spec.dtype, spec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", VARIANT_SHAPES, ids=str)
@pytest.mark.parametrize("name", CUDNN_VARIANTS)
def test_variants(name, shape, dtype, backend):
    check(backend, variant_spec(name, shape.I, shape.H, shape.layers, shape.bidirectional, dtype), shape)


@pytest.mark.parametrize("name", ["projection", "gru-single-bias", "vanilla-no-bias"])
@pytest.mark.parametrize("lengths", ["full", "edges"])
def test_reverse(name, lengths, backend):
    shape = Shape(6, 4, 3, 5, layers=2, lengths=lengths)
    check(backend, variant_spec(name, shape.I, shape.H, shape.layers, dtype="float64", reverse=True), shape)


@pytest.mark.parametrize(
    ("name", "unsupported"),
    [
        ("state-clip", "state_clip_min is"), ("peepholes", "peepholes is"), ("coupled", "coupled_gates is"),
        ("reset-before", "reset_after is"), ("gru-gate-clip", "gate_clip is"), ("softplus", "activations is"),
        ("lstm-all", "state_clip_min, peepholes, gate_clip, activations are"),
    ],
)  # fmt: skip
def test_unsupported_variants(name, unsupported):
    with pytest.raises(NotImplementedError, match=f"^{unsupported} not supported by engine 'cudnn'$"):
        RNNOp(variant_spec(name, 3, 5), "cudnn")


# -- declining --------------------------------------------------------------------------------------------------------

SPEC = RNNSpec("lstm", 3, 4, num_layers=2)


@pytest.fixture
def complete_torch(monkeypatch):
    """A torch that says it has a CUDA device and cuDNN."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn.m, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return monkeypatch


def test_engine_uses_the_current_device(complete_torch):
    assert RNNOp(SPEC, "cudnn")._engine.device == torch.device("cuda", 3)


def assert_refused(message):
    with pytest.raises(NotImplementedError, match=rf"^{message} \(engine 'cudnn'\)$"):
        RNNOp(SPEC, "cudnn")


def test_torch_without_cuda_is_refused(complete_torch):
    complete_torch.setattr(torch.version, "cuda", None)
    assert_refused(f"torch {torch.__version__} is built without CUDA".replace("+", r"\+"))


def test_torch_without_cudnn_is_refused(complete_torch):
    complete_torch.setattr(torch.backends.cudnn.m, "is_available", lambda: False)
    assert_refused(f"torch {torch.__version__} is built without cuDNN".replace("+", r"\+"))


def test_missing_device_is_refused(complete_torch):
    complete_torch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused("there is no CUDA device that torch can use")


def test_disabled_cudnn_is_refused(complete_torch):
    complete_torch.setattr(torch.backends.cudnn, "enabled", False)
    assert_refused(r"cuDNN is switched off \(torch.backends.cudnn.enabled is False\)")


def hide_module(monkeypatch, name):
    """Make importing a module fail, and have the engine's modules imported again."""
    for module in ("engine", "operands", "precision"):
        monkeypatch.delitem(sys.modules, f"fusedrnn.engines.cudnn.{module}")
        monkeypatch.delattr(f"fusedrnn.engines.cudnn.{module}")
    original_import = builtins.__import__

    def import_module(module, *args, **options):
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original_import(module, *args, **options)

    monkeypatch.setattr(builtins, "__import__", import_module)


def test_missing_torch_is_refused(monkeypatch):
    hide_module(monkeypatch, "torch")
    assert_refused("backend='cudnn' needs PyTorch: install fusedrnn with its extra 'torch'")


def test_missing_module_other_than_torch_is_named(monkeypatch):
    """The message does not say to install torch, which is there."""
    hide_module(monkeypatch, "numpy")
    assert_refused("No module named 'numpy'")


def test_engine_is_not_automatic():
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
def test_split_gives_the_weights_of_torch_nn(mode, options, dtype):
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
    for weight, expected in zip(weights, module._flat_weights, strict=True):
        assert weight.dtype == torch.from_numpy(flat).dtype
        np.testing.assert_array_equal(weight.numpy(), expected.detach().numpy().astype(dtype))
    np.testing.assert_array_equal(join(spec, weights).numpy(), flat)


def test_second_bias_of_a_single_bias_is_zero():
    spec = RNNSpec("gru", 3, 4, num_layers=2, bias="single")
    flat = torch.arange(1.0, spec.layout.size + 1)
    weights = split(spec, flat)
    assert [weight.ndim for weight in weights] == [2, 2, 1, 1] * 2
    assert not weights[3].any() and not weights[7].any()
    assert torch.equal(join(spec, weights), flat)


def test_weights_share_no_memory_with_the_vector():
    """cuDNN's buffer replaces the memory of each weight."""
    spec = RNNSpec("lstm", 3, 4)
    flat = torch.ones(spec.layout.size)
    weights = split(spec, flat)
    with torch.no_grad():
        for weight in weights:
            weight.set_(torch.zeros_like(weight))
    assert flat.all()


@pytest.mark.parametrize("projected", [False, True])
def test_flatten_calls_what_torch_nn_calls(monkeypatch, projected):
    """With the arguments of torch.nn's module of the same network."""
    calls = []

    def record(weights, *arguments):
        calls.append(([weight.shape for weight in weights], *arguments))

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", record)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: {"LSTM": 2}[mode])
    size = 2 if projected else None
    spec = RNNSpec("lstm", 3, 4, num_layers=2, bidirectional=True, projection_size=size)
    flatten(spec, split(spec, torch.ones(spec.layout.size)))
    per_direction = 5 if projected else 4
    shapes = [weight.shape for weight in torch.nn.LSTM(3, 4, 2, bidirectional=True, proj_size=size or 0)._flat_weights]
    assert calls == [(shapes, per_direction, 3, 2, 4, size or 0, 2, False, True)]


def test_frozen_parameters_stay_on_the_device(backend):
    spec = RNNSpec("gru", 3, 4)
    op = RNNOp(spec, backend)
    x, params = np.ones((2, 1, 3), np.float32), np.full(spec.layout.size, 0.1, np.float32)
    first = op.forward(x, params)[0]
    assert op._engine._resident is None
    constant = frozen(params)
    assert_same(backend, op.forward(x, constant)[0], first)
    weights = op._engine._resident[1]
    y, _, reserve = op.forward(x, constant, training=True)
    assert op._engine._resident[1] is weights
    expected = op.backward(y, None, reserve)
    assert_same(backend, op.backward(y, None, op.forward(x, params, training=True)[2]), expected)
    params += 0.1
    changed = op.forward(x, params)[0]
    assert (changed != first).any()
    assert_same(backend, op.forward(x, frozen(params))[0], changed)
    assert op._engine._resident[1] is not weights


# -- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_indices_are_those_of_torch(reverse):
    spec = RNNSpec("gru", 3, 4, reverse=reverse)
    lengths = np.array([2, 0, 5, 1, 2])
    x = np.random.default_rng(0).standard_normal((6, 5, 3))
    indices = packed_indices(spec, lengths, 6)
    assert list(indices.sequences) == [2, 0, 4, 3]
    reversed_x = x.copy()
    for row, length in enumerate(lengths if reverse else ()):
        reversed_x[:length, row] = x[:length, row][::-1]
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.from_numpy(reversed_x[:, indices.sequences]), lengths[indices.sequences]
    )
    np.testing.assert_array_equal(x[indices.rows], packed.data.numpy())
    assert indices.batch_sizes.tolist() == packed.batch_sizes.tolist() == [4, 3, 1, 1, 1]
    assert indices.batch_sizes.dtype == np.int64


def test_indices_of_empty_sequences():
    assert packed_indices(RNNSpec("gru", 3, 4), np.zeros(3, np.int64), 2).empty
    assert not PackedIndices((slice(None),)).empty


# -- the engine's contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, np.array([2, 5])])
def test_engine_protocol(backend, lengths):
    """Signatures, and the results for the simplest arguments."""
    engine = registry.find(backend).factory(SPEC)
    x, params = np.ones((5, 2, 3), np.float32), np.ones(SPEC.layout.size, np.float32)
    y = np.full((5, 2, 4), np.nan, np.float32)
    engine.compile()
    engine.compile(training=True)
    operands = ForwardOperands(x, params, None, lengths, y)
    final = engine.forward(operands)
    assert np.isnan(y).any() == (lengths is not None)
    for save in ("gates", "states"):
        trained, residuals = engine.train(operands, save, 0)
        for trained_state, state in zip(trained, final, strict=True):
            assert state.flags.owndata
            np.testing.assert_allclose(state, trained_state, rtol=1e-5)
        bound = engine.reserve_bytes(5, 2, save)
        assert 0 < residuals.nbytes <= bound
        assert lengths is not None or residuals.nbytes == bound
        dx = np.full_like(x, np.nan)
        dy = np.where(np.isnan(y), np.nan, y)
        engine.backward(residuals, BackwardOperands(dy, (None, None), GradBuffers(dx, None, None)))
        assert np.isnan(dx[2:, 0]).all() == (lengths is not None)
        assert not np.isnan(dx[:2]).any()
        engine.backward(residuals, BackwardOperands(y, (None, None), GradBuffers(None, None, None)))
    assert engine.reserve_bytes(5, 2, "states") < engine.reserve_bytes(5, 2, "gates")


@pytest.mark.parametrize("shape", REQUEST_SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_saving_states_alone_gives_the_same_bits(mode, shape, backend):
    problem = problem_of(shape.spec(mode), shape)
    results = []
    for save in ("gates", "states"):
        arguments = problem.spec, problem.x, problem.params, problem.states, problem.lengths, save, 0
        y, final, backward = train(*arguments, backend=backend)
        results.append((y, final, backward(problem.dy, problem.dstates)))
    assert_same(backend, *results)


@pytest.mark.parametrize("save", ["gates", "states"])
def test_later_changes_do_not_affect_gradients(save, backend):
    shape = Shape(5, 3, 4, 6, layers=2, lengths="edges")
    problem = problem_of(shape.spec("lstm"), shape)
    x, params, states = problem.astype("float32")
    lengths = problem.lengths.copy()
    y, final, backward = train(problem.spec, x, params, states, lengths, save, 0, backend)
    expected = backward(problem.dy, problem.dstates)
    for array in (x, params, *states, lengths, y, *final):
        array[...] = 0
    assert_same(backend, backward(problem.dy, problem.dstates), expected)


def test_arrays_of_any_strides(backend):
    shape = Shape(5, 3, 4, 6, lengths="edges")
    problem = problem_of(shape.spec("gru"), shape)
    op = RNNOp(problem.spec, backend)
    expected = op.forward(problem.x, problem.params, lengths=problem.lengths)[0]
    x = np.ascontiguousarray(problem.x[::-1, ::-1])[::-1, ::-1]
    x.flags.writeable = False
    out = np.full((10, 3, 12), np.nan, np.float32)[::-2, :, :6]
    assert op.forward(x, problem.params, lengths=problem.lengths, out=out)[0] is out
    assert_same(backend, out, expected)


def test_modes_of_the_caller_do_not_matter(backend):
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


def test_concurrent_calls(backend):
    shape = Shape(5, 3, 4, 6, layers=2, lengths="some")
    problem = problem_of(shape.spec("gru"), shape)
    op = RNNOp(problem.spec, backend)
    arguments = problem.spec, problem.x, problem.params, problem.states, problem.lengths, "gates", 0
    y, _, shared = train(*arguments, backend=backend)
    expected = shared(problem.dy, problem.dstates)
    results = [None] * 8

    def run(index):
        torch.set_num_threads(1)  # each thread has a number of its own, on which bits depend
        for _ in range(5):
            own_y, _, reserve = op.forward(
                problem.x, problem.params, problem.states, lengths=problem.lengths, training=True
            )
            gradients = op.backward(problem.dy, problem.dstates, reserve)
            results[index] = own_y, shared(problem.dy, problem.dstates), gradients

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for actual in results:
        assert_same(backend, actual, (y, expected, expected))


# -- number formats ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    """PyTorch's switches, restored after the test."""
    before = torch.backends.cudnn.allow_tf32
    yield torch.backends.cudnn.rnn
    # The older switch sets all of them; it is the one that torch.export reads.
    torch._C._set_cudnn_allow_tf32(before)
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_turned_off_and_restored(tf32, allowed):
    torch.backends.cudnn.allow_tf32 = allowed
    guard = FullPrecision()
    with guard:
        assert not torch.backends.cudnn.allow_tf32
        with guard:
            assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32  # the first to enter is still inside
    assert torch.backends.cudnn.allow_tf32 is allowed
    with pytest.raises(ZeroDivisionError), guard:
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has one switch alone")
@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_tf32_with_the_newer_switches(tf32, before):
    """Where those for RNNs and convolutions differ, the older switch cannot be read."""
    tf32.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before, {"tf32": "ieee", "ieee": "tf32"}[before]
    with FullPrecision():
        assert tf32.fp32_precision == "ieee"
    assert tf32.fp32_precision == before
    assert torch.backends.cudnn.conv.fp32_precision != before


def test_only_float32_calls_on_cuda_turn_tf32_off(monkeypatch):
    inside = []

    class Guard:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.append(False)

    monkeypatch.setattr(cudnn, "full_precision", Guard())
    for dtype, device in (("float32", "cpu"), ("float64", "cpu"), ("float64", "cuda")):
        with CuDNNEngine(RNNSpec("gru", 3, 4, dtype=dtype), device)._torch_modes(differentiable=False):
            assert not inside
    with CuDNNEngine(RNNSpec("gru", 3, 4), "cuda")._torch_modes(differentiable=False):
        assert inside == [True]
    assert inside == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_leave_tensors_on_cuda_to_torch_nn(dtype):
    with FakeTensorMode():
        on_cuda, on_cpu = (torch.empty((5, 2, 3), dtype=dtype, device=device) for device in ("cuda", "cpu"))
    assert on_cuda.is_cuda
    assert operator_dtype(on_cuda) is None
    assert operator_dtype(on_cpu) is dtype


# -- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [GPU])
def test_calls_restore_tf32(device):
    before = torch.backends.cudnn.allow_tf32
    problem = problem_of(SHAPES[12].spec("lstm"), SHAPES[12])
    *_, backward = train(problem.spec, problem.x, problem.params, problem.states, None, "gates", 0, "cudnn")
    backward(problem.dy, problem.dstates)
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("projected", [False, True])
def test_kernels_are_those_of_cudnn(device, projected):
    """The graph has cuDNN's node, and PyTorch does not warn that weights are not in cuDNN's layout."""
    spec = RNNSpec("lstm", 3, 8, num_layers=2, projection_size=4 if projected else None)
    engine = registry.find("cudnn").factory(spec)
    _, residuals = engine.train(engine._zeros(5, 2), "gates", 0)
    names, nodes = set(), [result.grad_fn for result in residuals.results]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [function for function, _ in node.next_functions if function is not None]
    assert "CudnnRnnBackward0" in names


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("packed", [False, True])
def test_modules_on_a_device(device, kind, packed, runs):
    """On CUDA tensors, our modules do what torch.nn's do, and our kernels do not run."""
    torch.manual_seed(0)
    ours = getattr(fusedrnn.torch, kind)(8, 16, 2, bidirectional=True).to(device)
    theirs = getattr(torch.nn, kind)(8, 16, 2, bidirectional=True).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 8, device=device)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 3, 2])
    results = []
    for net in (ours, theirs):
        y = net(x)[0]
        y = y.data if packed else y
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in net.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert actual.is_cuda
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not runs
    ours.cpu()(x.cpu())
    assert len(runs) == 1


@pytest.mark.parametrize("device", [GPU])
def test_accelerated_model_on_a_device_and_back(device, runs):
    model = torch.nn.Sequential(torch.nn.GRU(8, 16, batch_first=True))
    fusedrnn.torch.accelerate(model)
    x = torch.randn(3, 5, 8)
    before = model(x)[0]
    on_device = model.to(device)(x.to(device))[0]
    assert on_device.is_cuda and len(runs) == 1
    assert torch.allclose(on_device.cpu(), before, rtol=1e-3, atol=1e-3)  # TF32 may be on: the caller decides
    assert torch.equal(model.to("cpu")(x)[0], before)
    y, _ = model.to(device)[0](x.to(device), lengths=[5, 3, 1])
    assert y.is_cuda and not y[1, 3:].any()
