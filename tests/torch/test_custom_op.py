"""The operators in torch's registry keep the contract of any operator there."""

import itertools

import pytest
import torch

import fusedrnn.torch.custom_op  # noqa: F401 -- registers the operators
from fusedrnn import RNNSpec
from fusedrnn import torch as fused
from fusedrnn.torch import eager as call
from torch_layers import MODES

I, H = 5, 4
LAYERS = {"LSTM": fused.LSTM, "GRU": fused.GRU, "RNN": fused.RNN}

layer = pytest.mark.parametrize("kind", LAYERS)


def arguments(kind, x, lengths, sizes, seed, options=(2, True), bias=True, states=True, grad=True, projection=0):
    """Arguments of the operators, by their schemas."""
    more = {"proj_size": projection} if projection else {}
    net = LAYERS[kind](I, H, options[0], bidirectional=options[1], bias=bias, dtype=x.dtype, **more)
    net.requires_grad_(grad)
    weights = []
    for names in net._all_weights:
        matrices = [name for name in names if "weight" in name]  # torch has the projection behind the biases
        weights += [getattr(net, name) for name in matrices]
        weights += [getattr(net, name) for name in names if "bias" in name] if bias else [None] * 2
    N = int(sizes[0]) if sizes is not None else x.shape[1]
    rows = options[0] * (1 + options[1])
    h0 = torch.randn((rows, N, projection or H), dtype=x.dtype, requires_grad=grad) if states else None
    c0 = torch.randn((rows, N, H), dtype=x.dtype, requires_grad=grad) if states and kind == "LSTM" else None
    dropout = 0.0 if seed is None else 0.25
    return (x, h0, c0, weights, lengths, sizes, seed, MODES[kind], H, *options, dropout, projection)


def problems(grad):
    """Operands of every sort."""

    def x(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, requires_grad=grad)

    sizes = torch.tensor([3, 3, 2, 1])
    yield "plain", (x(6, 3, I), None, None, None), {}
    yield "no states, no bias", (x(6, 3, I), None, None, None), {"states": False, "bias": False}
    yield "float64", (x(4, 2, I, dtype=torch.float64), None, None, None), {}
    yield "lengths", (x(6, 3, I), torch.tensor([6, 2, 4]), None, None), {}
    yield "packed", (x(9, I), None, sizes, None), {}
    yield "dropout", (x(6, 3, I), None, None, torch.tensor(7)), {}


PROBLEMS = [name for name, *_ in problems(False)]
# Every kind on the plain problem; on the others, which differ in operands that all kinds have, the kinds take turns.
CONTRACTS = [*((kind, PROBLEMS[0]) for kind in LAYERS), *zip(itertools.cycle(LAYERS), PROBLEMS[1:], strict=False)]


@pytest.mark.parametrize(("kind", "problem"), CONTRACTS)
def test_operators_keep_torchs_contract(kind, problem):
    """Schema, autograd, fake kernels and AOT dispatch with dynamic shapes, by torch's own check."""
    ops = torch.ops.fusedrnn
    ((_, operands, options),) = [row for row in problems(True) if row[0] == problem]
    torch.library.opcheck(ops.rnn.default, arguments(kind, *operands, **options))
    ((_, operands, options),) = [row for row in problems(False) if row[0] == problem]
    args = arguments(kind, *operands, **options, grad=False)
    # Not the comparison of results after tracing: the bytes between the parts of a reserve are never written.
    without = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward_training.default, args, test_utils=without)
    y, *final, reserve = ops.forward_training(*args)
    gradients = [torch.randn_like(t) for t in (y, *final)] + [None] * (2 - len(final))
    needed = [t is not None for t in (*args[:3], *args[3])]
    torch.library.opcheck(ops.backward.default, (*gradients, reserve, *args, needed))


def test_operators_keep_torchs_contract_with_a_projection():
    x = torch.randn(6, 3, I, requires_grad=True)
    torch.library.opcheck(torch.ops.fusedrnn.rnn.default, arguments("LSTM", x, None, None, None, projection=2))


@pytest.mark.parametrize(("kind", "projection"), [*((kind, 0) for kind in LAYERS), ("LSTM", 2)])
def test_fake_kernels_know_shapes(kind, projection):
    args = arguments(kind, torch.randn(6, 3, I), None, None, None, projection=projection)
    real = torch.ops.fusedrnn.forward_training(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.fusedrnn.forward_training(mode.from_tensor(args[0]), *args[1:])
    for tensor, other in zip(fake, real, strict=True):
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (other.shape, other.dtype, other.stride())


@layer
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_of_gradients(kind, problem):
    """Equal those of the eager call, which finite differences check; also for the operators that graphs contain."""
    ((_, (x, *others), options),) = [row for row in problems(True) if row[0] == problem]
    x = x.detach().to(torch.float64).requires_grad_()
    args = arguments(kind, x, *others, **options)
    _, h0, c0, weights, lengths, sizes, seed, mode, *_, dropout, _ = args
    tensors = x, h0, c0, *weights
    leaves = [tensor for tensor in tensors if tensor is not None]
    states = tuple(state for state in (h0, c0) if state is not None) or None
    spec = RNNSpec(mode, I, H, 2, True, dropout, dtype="float64")
    number = 0 if seed is None else int(seed)
    y, final = call.run(spec, x, states, weights, lengths=lengths, batch_sizes=sizes, seed=number)
    cotangents = [torch.randn_like(tensor).requires_grad_() for tensor in (y, *final)]

    def twice(results, gradients=None):
        first = gradients or torch.autograd.grad(results, leaves, cotangents, create_graph=True)
        second = torch.autograd.grad(sum(tensor.square().sum() for tensor in first), [*leaves, *cotangents])
        return [*first, *second]

    expected = twice([y, *final])
    *results, reserve = torch.ops.fusedrnn.forward_training(*args)
    missing, needed = [None] * (3 - len(results)), [tensor is not None for tensor in tensors]
    gradients = torch.ops.fusedrnn.backward(*cotangents, *missing, reserve, *args, needed)
    for actual in (twice(torch.ops.fusedrnn.rnn(*args)), twice(results), twice(None, gradients)):
        for tensor, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-9)


# -- operands that do not fit -----------------------------------------------------------------------------------------

SIZES = {"mode": "lstm", "hidden_size": H, "num_layers": 1, "bidirectional": False}
SIZES |= {"dropout": 0.0, "projection_size": 0}
T, N = 4, 3


def usual(dtype=torch.float32):
    """Operands of an LSTM by name, all of them there."""
    weights = [torch.randn(*shape, dtype=dtype) / 4 for shape in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))]
    states = {name: torch.randn(1, N, H, dtype=dtype) for name in ("h0", "c0")}
    others = {"lengths": None, "batch_sizes": None, "seed": None}
    return {"x": torch.randn(T, N, I, dtype=dtype), **states, "weights": weights, **others, **SIZES}


def with_weight(place, change):
    """A change of one of the weights."""
    return lambda a: {"weights": [change(w) if index == place else w for index, w in enumerate(a["weights"])]}


def on_meta(name):
    return lambda a: {name: a[name].to("meta")}


WRONG = {
    "x of two dimensions": (lambda a: {"x": a["x"][0]}, "x must have 3 dimensions"),
    "x of no dimensions": (lambda a: {"x": torch.tensor(1.0)}, "x must have 3 dimensions"),
    "x half": (lambda a: {"x": a["x"].half()}, "x must be of dtype"),
    "x of integers": (lambda a: {"x": a["x"].long()}, "x must be of dtype"),
    "x double": (lambda a: {"x": a["x"].double()}, r"weights\[0\] must have"),
    "x of other features": (lambda a: {"x": a["x"][..., :2]}, r"weights\[0\] must have"),
    "no step": (lambda a: {"x": a["x"][:0]}, "x must not be empty"),
    "no sequence": (lambda a: {"x": a["x"][:, :0], "h0": None, "c0": None}, "x must not be empty"),
    "no feature": (lambda a: {"x": a["x"][..., :0]}, "input_size must be at least 1"),
    "no weights": (lambda a: {"weights": []}, "weights must be 4; got 0"),
    "few weights": (lambda a: {"weights": a["weights"][:2]}, "weights must be 4; got 2"),
    "no matrix": (with_weight(1, lambda w: None), r"weights\[1\] must have shape .*; got None"),
    "matrix double": (with_weight(1, torch.Tensor.double), r"weights\[1\] must have"),
    "bias half": (with_weight(3, torch.Tensor.half), r"weights\[3\] must have"),
    "matrix transposed": (with_weight(0, torch.t), r"weights\[0\] must have"),
    "bias short": (with_weight(2, lambda w: w[1:]), r"weights\[2\] must have"),
    "bias a matrix": (with_weight(2, lambda w: w[:, None]), r"weights\[2\] must have"),
    "weight on another device": (with_weight(0, lambda w: w.to("meta")), r"weights\[0\] must have|device"),
    "state on another device": (on_meta("h0"), "h0 must have|device"),
    "h0 double": (lambda a: {"h0": a["h0"].double()}, "h0 must have"),
    "c0 of another batch": (lambda a: {"c0": a["c0"][:, 1:]}, "c0 must have"),
    "h0 of two dimensions": (lambda a: {"h0": a["h0"][0]}, "h0 must have"),
    "c0 of a GRU": (lambda a: {"mode": "gru", "weights": [w[: 3 * H] for w in a["weights"]]}, "c0 must be None"),
    "another mode": (lambda a: {"mode": "lstmp", "c0": None}, "mode must be one of"),
    "hidden size": (lambda a: {"hidden_size": 100_000}, "must have shape"),
    "hidden size below 1": (lambda a: {"hidden_size": -4}, "hidden_size must be at least 1"),
    "layers": (lambda a: {"num_layers": 3}, "weights must be 12; got 4"),
    "huge layers": (lambda a: {"num_layers": 2**60}, "num_layers must be at most"),
    "no layers": (lambda a: {"num_layers": 0, "weights": []}, "num_layers must be at least 1"),
    "directions": (lambda a: {"bidirectional": True}, "weights must be 8; got 4"),
    "projection": (lambda a: {"projection_size": 2}, "weights must be 5; got 4"),
    "dropout": (lambda a: {"dropout": 1.5}, "dropout must be a probability"),
    "lengths beyond": (lambda a: {"lengths": torch.tensor([1, 5, 1])}, "lengths must be from 0 to 4"),
    "lengths too few": (lambda a: {"lengths": torch.tensor([1, 2])}, "lengths must have shape"),
    "lengths of fractions": (lambda a: {"lengths": torch.ones(3)}, "lengths must be integers"),
    "lengths and batch sizes": (
        lambda a: {"x": a["x"][0], "lengths": torch.ones(3).long(), "batch_sizes": torch.tensor([3])},
        "lengths must be None",
    ),
    "batch sizes that rise": (
        lambda a: {"x": a["x"][0], "batch_sizes": torch.tensor([1, 2]), "h0": None, "c0": None},
        "batch_sizes must fall",
    ),
    "packed states of another batch": (lambda a: {"x": a["x"][0], "batch_sizes": torch.tensor([2, 1])}, "h0 must have"),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_mismatched_operands_are_refused(case, training):
    change, message = WRONG[case]
    args = usual()
    args.update(change(args))
    if training and args["x"].is_floating_point():
        args["x"] = args["x"].detach().requires_grad_()
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        torch.ops.fusedrnn.rnn(*args.values())


BY_VALUES = {"no step", "no sequence", "lengths beyond", "batch sizes that rise", "packed states of another batch"}
OTHERWISE = {"weight on another device", "state on another device", "lengths too few", "lengths of fractions"}


@pytest.mark.parametrize("case", sorted(set(WRONG) - BY_VALUES - OTHERWISE))
def test_fake_kernels_refuse_mismatched_operands(case):
    change, message = WRONG[case]
    args = usual()
    args.update(change(args))
    with torch._subclasses.FakeTensorMode() as mode:

        def fake(value):
            return mode.from_tensor(value) if torch.is_tensor(value) else value

        args = {name: [fake(tensor) for tensor in v] if name == "weights" else fake(v) for name, v in args.items()}
        with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
            torch.ops.fusedrnn.rnn(*args.values())


@pytest.mark.parametrize("seed", [None, torch.tensor(-1), torch.tensor(1.5), torch.tensor([1])])
def test_invalid_seeds_are_refused(seed):
    args = list(arguments("GRU", torch.randn(T, N, I), None, None, torch.tensor(1), grad=False))
    args[6] = seed
    with pytest.raises(ValueError, match="seed must be"):
        torch.ops.fusedrnn.rnn(*args)


WRONG_GRADIENTS = {
    "dy double": ({"dy": torch.zeros(T, N, H).double()}, "dy must have"),
    "dy of other features": ({"dy": torch.zeros(T, N, H + 1)}, "dy must have"),
    "dh_n of another batch": ({"dh_n": torch.zeros(1, N + 1, H)}, "dh_n must have"),
    "dc_n half": ({"dc_n": torch.zeros(1, N, H).half()}, "dc_n must have"),
    "reserve short": ({"reserve": torch.zeros(8, dtype=torch.uint8)}, "reserve must have"),
    "reserve of floats": ({"reserve": torch.zeros(8)}, "reserve must be bytes"),
    "needed short": ({"needed": [True] * 3}, "needed must have 7 entries"),
    "x double": ({"x": torch.zeros(T, N, I).double()}, "must have"),
}


@pytest.mark.parametrize("case", WRONG_GRADIENTS)
def test_backward_refuses_mismatched_arguments(case):
    args = usual()
    *results, reserve = torch.ops.fusedrnn.forward_training(*args.values())
    dy, dh_n, dc_n = map(torch.ones_like, results)
    whole = {"dy": dy, "dh_n": dh_n, "dc_n": dc_n, "reserve": reserve, **args, "needed": [True] * 7}
    assert len(torch.ops.fusedrnn.backward(*whole.values())) == 7
    change, message = WRONG_GRADIENTS[case]
    whole.update(change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fusedrnn.backward(*whole.values())


def test_gradients_for_a_mode_without_c():
    args = arguments("GRU", torch.randn(T, N, I), None, None, None, (1, False), grad=False)
    y, _, reserve = torch.ops.fusedrnn.forward_training(*args)
    with pytest.raises(RuntimeError, match="dc_n must be None"):
        torch.ops.fusedrnn.backward(y, None, torch.zeros(1, N, H), reserve, *args, [True] * 7)


def negated(tensor):
    """A view whose values differ from those in memory."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


LAYOUTS = {
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "negated": negated,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_operands(layout):
    args, change = usual(torch.float64), LAYOUTS[layout]
    other = {name: change(v) if name in ("x", "h0", "c0") else v for name, v in args.items()}
    other["weights"] = [change(w) for w in args["weights"]]
    *expected, reserve = torch.ops.fusedrnn.forward_training(*args.values())
    assert all(map(torch.equal, torch.ops.fusedrnn.rnn(*other.values()), expected))
    *actual, other_reserve = torch.ops.fusedrnn.forward_training(*other.values())
    assert all(map(torch.equal, actual, expected))
    cotangents = [torch.randn_like(tensor) for tensor in expected]
    gradients = torch.ops.fusedrnn.backward(*cotangents, reserve, *args.values(), [True] * 7)
    again = torch.ops.fusedrnn.backward(*map(change, cotangents), other_reserve, *other.values(), [True] * 7)
    assert all(map(torch.equal, again, gradients))


@pytest.mark.parametrize("missing", [("h0",), ("c0",), ("h0", "c0")])
def test_missing_states_are_zeros(missing):
    """Each on its own, in first and second derivatives too."""
    results = []
    for value in (None, torch.zeros(1, N, H, dtype=torch.float64)):
        torch.manual_seed(0)
        args = usual(torch.float64)
        args.update(dict.fromkeys(missing, value))
        args["x"].requires_grad_()
        outputs = torch.ops.fusedrnn.rnn(*args.values())
        (once,) = torch.autograd.grad(sum(tensor.square().sum() for tensor in outputs), args["x"], create_graph=True)
        results.append([*outputs, once, *torch.autograd.grad(once.square().sum(), args["x"])])
    assert all(map(torch.equal, *results))


def test_one_bias_without_the_other():
    args = usual()
    args["weights"][2] = None
    zeros = {**args, "weights": [w if w is not None else torch.zeros(4 * H) for w in args["weights"]]}
    results = [torch.ops.fusedrnn.rnn(*operands.values()) for operands in (args, zeros)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["i2h weight", "h2h weight", "i2h bias", "h2h bias"])
@pytest.mark.parametrize("mode", ["rnn_relu", "lstm", "gru"])
def test_a_zero_tensor_among_the_weights(mode, place, steps):
    """It has no memory and so no address, and short calls use unpacked weights in place."""
    gates = {"lstm": 4, "gru": 3}.get(mode, 1)
    torch.manual_seed(0)
    weights = [torch.randn(gates * 4, 3), torch.randn(gates * 4, 4), torch.randn(gates * 4), torch.randn(gates * 4)]
    x = torch.randn(steps, 1, 3)
    options = mode, 4, 1, False, 0.0, 0
    results = []
    for zeros in (torch._efficientzerotensor, torch.zeros):
        operands = [zeros(weight.shape) if index == place else weight for index, weight in enumerate(weights)]
        call = x, None, None, operands, None, None, None, *options
        y = torch.ops.fusedrnn.rnn(*call)[0]
        trained = torch.ops.fusedrnn.forward_training(*call)
        needed = [True, False, False, *[True] * 4]
        gradients = torch.ops.fusedrnn.backward(torch.ones_like(y), None, None, trained[-1], *call, needed)
        leaf = x.clone().requires_grad_()
        torch.ops.fusedrnn.rnn(leaf, *call[1:])[0].sum().backward()
        results.append([y, *trained[:-1], *gradients, leaf.grad])
    for result, expected in zip(*results, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(("name", "value"), [("num_layers", -1), ("num_layers", 0), ("hidden_size", -3)])
def test_errors_name_the_invalid_option(name, value):
    options = {"mode": "lstm", "hidden_size": 4, "num_layers": 1, "bidirectional": False, "dropout": 0.0, "p": 0}
    operands = torch.randn(2, 1, 3), None, None, [], None, None, None
    with pytest.raises(ValueError, match=f"^{name} must be at least 1; got {value}"):
        torch.ops.fusedrnn.rnn(*operands, *{**options, name: value}.values())
