"""The PyTorch modules: the operator's results in every form that torch.nn has for them, and torch.nn's manners."""

import copy
import io
import pickle
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn.torch
from fusedrnn.engines.reference import forward as reference
from fusedrnn.spec import MODES
from fusedrnn.torch import eager
from oracles import near_kink, torch_results
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, make_problem
from torch_layers import flat, make_pair

DTYPES = {"float32": torch.float32, "float64": torch.float64}
KINDS = ("i2h_bias", "h2h_bias")

# Form of the call, shape, bias: every depth in both directions, odd sizes, with initial states and without.
CASES = [
    ("batched", Shape(1, 1, 1, 1), True),
    ("batched", Shape(3, 5, 17, 3, layers=3, bidirectional=True), True),
    ("batched", Shape(7, 2, 3, 17, layers=2, states=False), False),
    ("batch_first", Shape(5, 3, 2, 63, layers=2), True),
    ("batch_first", Shape(4, 17, 3, 9, bidirectional=True, states=False), False),
    ("unbatched", Shape(9, 1, 5, 7, layers=2, bidirectional=True), True),
    ("unbatched", Shape(2, 1, 17, 9, layers=3, states=False), False),
    ("packed", Shape(9, 6, 5, 7, layers=2, bidirectional=True, lengths="some"), True),
    ("packed", Shape(5, 17, 3, 3, layers=3, lengths="some", states=False), True),
    ("sorted", Shape(6, 5, 17, 5, layers=3, bidirectional=True, lengths="some"), True),
    ("sorted", Shape(17, 3, 2, 9, lengths="some", states=False), True),
    ("lengths", Shape(7, 6, 3, 9, layers=3, bidirectional=True, lengths="edges"), True),
    ("lengths_first", Shape(5, 4, 9, 5, layers=2, lengths="edges", states=False), True),
]
CELLS = [
    ("batched", Shape(1, 5, 3, 17)),
    ("unbatched", Shape(1, 1, 7, 3)),
    ("batched", Shape(1, 2, 17, 5, states=False)),
]


@cache
def problem_of(mode, shape, bias, ordered=False):
    """A problem near no kink, perhaps with its biases zero and its lengths falling, and what torch.nn says."""
    for seed in range(1000):
        problem = make_problem(mode, shape, seed=seed)
        if ordered:
            problem = replace(problem, lengths=np.sort(problem.lengths)[::-1].copy())
        if not bias:
            for entry in problem.spec.layout:
                if entry.kind in KINDS:
                    problem.params[entry.offset : entry.offset + entry.size] = 0
        if not near_kink(problem):
            return problem, torch_results(problem)
    raise AssertionError(f"every {mode} of {shape} is near a kink")


def make(spec, params=None, package=fusedrnn.torch, cell=False, **options):
    """The module for a spec, with these parameters."""
    if not cell:
        options |= {"num_layers": spec.num_layers, "bidirectional": spec.bidirectional}
    if spec.mode.startswith("rnn"):
        options["nonlinearity"] = spec.mode[4:]
    kind = spec.mode[:3].upper() if spec.mode.startswith("rnn") else spec.mode.upper()
    sizes = spec.input_size, spec.hidden_size
    module = getattr(package, kind + "Cell" * cell)(*sizes, dtype=DTYPES[spec.dtype], **options)
    if params is not None:
        named = spec.layout.unpack(params, names="torch")
        if cell:
            named = {name.removesuffix("_l0"): value for name, value in named.items()}
        module.load_state_dict({name: torch.tensor(named[name]) for name in module.state_dict()})
    return module


def flat_gradients(module, spec, expected, cell=False):
    """The parameters' gradients as the operator has them; the expected ones where there is no bias."""
    known = spec.layout.unpack(expected.astype(spec.dtype), names="torch")
    actual = {f"{name}{'_l0' * cell}": p.grad.numpy() for name, p in module.named_parameters()}
    return spec.layout.pack(known | actual, names="torch")


class Call:
    """One call of a module in one of its forms, and its results in the operator's form."""

    def __init__(self, module, form, problem):
        self.module, self.form, self.problem = module, form, problem
        self.x = torch.tensor(problem.x, requires_grad=True)
        self.states = [torch.tensor(tensor, requires_grad=True) for tensor in problem.states or ()]
        y, final = module(*self.arguments(), **self.options())
        final = final if isinstance(final, tuple) else (final,)
        if isinstance(y, PackedSequence):
            y, lengths = pad_packed_sequence(y, total_length=len(problem.x))
            assert lengths.tolist() == problem.lengths.tolist()
        elif form == "unbatched":
            y, final = y.unsqueeze(1), tuple(tensor.unsqueeze(1) for tensor in final)
        elif form.endswith("_first"):
            y = y.transpose(0, 1)
        self.y, self.final = y, final

    def arguments(self):
        x, states = self.x, self.states
        if self.form == "unbatched":
            x, states = x.squeeze(1), [tensor.squeeze(1) for tensor in states]
        elif self.form.endswith("_first"):
            x = x.transpose(0, 1)
        elif self.form in ("packed", "sorted"):
            lengths = torch.from_numpy(self.problem.lengths)
            x = pack_padded_sequence(x, lengths, enforce_sorted=self.form == "sorted")
        return x, (None if not states else states[0] if len(states) == 1 else tuple(states))

    def options(self):
        return {"lengths": self.problem.lengths.tolist()} if self.form.startswith("lengths") else {}

    @property
    def forward(self):
        return self.y.detach().numpy(), tuple(tensor.detach().numpy() for tensor in self.final)

    def backward(self, expected):
        """All gradients; for arguments that were left out, those of ``expected``."""
        cotangents = [torch.tensor(self.problem.dy), *map(torch.tensor, self.problem.dstates)]
        torch.autograd.backward([self.y, *self.final], cotangents)
        spec = self.problem.spec
        dstates = tuple(tensor.grad.numpy() for tensor in self.states)
        dstates = dstates or tuple(tensor.astype(spec.dtype) for tensor in expected[2])
        return self.x.grad.numpy(), flat_gradients(self.module, spec, expected[1]), dstates


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("form", "shape", "bias"), CASES, ids=str)
def test_results_and_gradients(mode, form, shape, bias, runs):
    problem, oracles = problem_of(mode, shape, bias, form == "sorted")
    oracle = oracles["nothing"]
    for dtype in DTYPES:
        typed = problem.typed(dtype)
        module = make(typed.spec, typed.params, bias=bias, batch_first=form.endswith("_first"))
        actual = Call(module, form, typed)
        assert_close(actual.forward, oracle.forward, dtype, typed.spec)
        assert not actual.forward[0][typed.padding].any()
        assert_gradients_close(actual.backward(oracle.gradients), oracle.gradients, dtype, typed.spec, shape.T, shape.N)
    assert [spec.dtype for spec in runs] == list(DTYPES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("form", "shape"), CELLS, ids=str)
def test_cells(mode, bias, form, shape, runs):
    problem, oracles = problem_of(mode, shape, bias)
    oracle = oracles["dy"]
    for dtype in DTYPES:
        typed = problem.typed(dtype)
        spec = typed.spec
        cell = make(spec, typed.params, cell=True, bias=bias)
        rows = (0, 0) if form == "unbatched" else (0,)
        x = torch.tensor(typed.x[rows], requires_grad=True)
        states = [torch.tensor(tensor[rows], requires_grad=True) for tensor in typed.states or ()]
        final = cell(x, None if not states else states[0] if len(states) == 1 else tuple(states))
        final = final if isinstance(final, tuple) else (final,)
        torch.autograd.backward(final, [torch.tensor(tensor[rows]) for tensor in typed.dstates])
        shaped = [tensor.detach().numpy().reshape(typed.dstates[0].shape) for tensor in final]
        assert_close((shaped[0], tuple(shaped)), oracle.forward, dtype, spec)
        dx = x.grad.numpy().reshape(typed.x.shape)
        dstates = tuple(h.grad.numpy().reshape(typed.dstates[0].shape) for h in states)
        dstates = dstates or tuple(tensor.astype(dtype) for tensor in oracle.gradients[2])
        actual = dx, flat_gradients(cell, spec, oracle.gradients[1], cell=True), dstates
        assert_gradients_close(actual, oracle.gradients, dtype, spec, 1, shape.N)
    assert len(runs) == len(DTYPES)


@pytest.mark.parametrize("mode", MODES)
def test_packed_padded_and_single_sequences_have_the_same_bits(mode):
    shape = Shape(9, 6, 5, 19, layers=2, bidirectional=True, lengths="some")
    problem = make_problem(mode, shape)
    actual = {}
    for form in ("packed", "lengths"):
        call = Call(make(problem.spec, problem.params), form, problem)
        dx, _, dstates = call.backward((None, problem.params, None))
        actual[form] = (*call.forward, dx, dstates)
    assert_same_bits(actual["packed"], actual["lengths"])
    y, final, dx, dstates = actual["packed"]
    for n, length in enumerate(problem.lengths):
        single = replace(
            problem, x=problem.x[:length, n : n + 1], lengths=None, dy=problem.dy[:length, n : n + 1],
            states=tuple(tensor[:, n : n + 1] for tensor in problem.states),
            dstates=tuple(tensor[:, n : n + 1] for tensor in problem.dstates),
        )  # fmt: skip
        call = Call(make(problem.spec, problem.params), "unbatched", single)
        assert_same_bits(call.forward, (y[:length, n : n + 1], tuple(state[:, n : n + 1] for state in final)))
        dx1, _, dstates1 = call.backward((None, problem.params, None))
        assert_same_bits((dx1, dstates1), (dx[:length, n : n + 1], tuple(state[:, n : n + 1] for state in dstates)))


@pytest.mark.parametrize("lengths", [torch.tensor([2, 0, 5]), torch.tensor([2, 0, 5], dtype=torch.int32), (2, 0, 5)])
def test_lengths_in_every_form_give_the_same_results(lengths):
    net, x = fusedrnn.torch.GRU(3, 4, bidirectional=True), torch.randn(5, 3, 3)
    y, h_n = net(x, lengths=lengths)
    other, other_h = net(x, lengths=[2, 0, 5])
    assert torch.equal(y, other) and torch.equal(h_n, other_h)
    assert not y[:, 1].any() and not h_n[:, 1].any() and y[:2, 0].all()


@pytest.mark.parametrize(
    ("shape", "lengths", "error", "message"),
    [
        ((5, 3, 2), [1, 2], ValueError, r"lengths must have shape \(3,\), one for each sequence; got \(2,\)"),
        ((5, 3, 2), [[1, 2, 3]], ValueError, r"lengths must have shape \(3,\)"),
        ((5, 3, 2), [1, 2, 6], ValueError, "lengths must be from 0 to 5, the steps of input; got 1 to 6"),
        ((5, 3, 2), [1, -1, 2], ValueError, "lengths must be from 0 to 5, the steps of input; got -1 to 2"),
        ((5, 3, 2), [1.0, 2.0, 3.0], TypeError, "lengths must be integers; got torch.float32"),
        ((5, 3, 2), torch.tensor([True, True, False]), TypeError, "lengths must be integers; got torch.bool"),
        ((5, 3, 2), np.ma.masked_array([1, 2, 3], [0, 1, 0]), TypeError, "lengths must be a tensor or a list"),
        ((5, 3, 2), "123", TypeError, "lengths must be a tensor or a list of integers; got '123'"),
        (
            (5, 3, 2),
            torch.empty(3, dtype=torch.int64, device="meta"),
            ValueError,
            "lengths must be on the CPU; got meta",
        ),
        ((5, 2), [5], ValueError, "lengths need batched 3-D input; got 2-D"),
    ],
)
def test_bad_lengths_are_refused(shape, lengths, error, message):
    with pytest.raises(error, match=message):
        fusedrnn.torch.LSTM(2, 3)(torch.randn(shape), lengths=lengths)


def test_lengths_beside_a_packed_sequence_are_refused():
    packed = pack_padded_sequence(torch.randn(4, 2, 3), [4, 2])
    with pytest.raises(ValueError, match="lengths must be None for a PackedSequence, which has its own"):
        fusedrnn.torch.GRU(3, 4)(packed, lengths=[4, 2])


@pytest.mark.parametrize("change", ["expanded", "every other feature", "transposed", "reversed rows"])
def test_any_strides(change):
    net, x = fusedrnn.torch.LSTM(6, 5), torch.randn(4, 3, 12)
    x = {
        "expanded": x[:, :1, :6].expand(4, 3, 6),
        "every other feature": x[..., ::2],
        "transposed": torch.randn(6, 3, 4).permute(2, 1, 0),
        "reversed rows": x[..., :6].transpose(0, 1).contiguous().transpose(0, 1),
    }[change]
    x.requires_grad_()
    assert not x.is_contiguous()
    y, _ = net(x)
    expected, _ = net(x.detach().contiguous())
    assert torch.equal(y, expected)
    states = torch.randn(3, 1, 5).transpose(0, 1), torch.randn(1, 3, 10)[..., ::2]
    strided, plain = net(x, states)[0], net(x, tuple(tensor.contiguous() for tensor in states))[0]
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("batch_first", [True, False])
def test_outputs_have_the_strides_of_torchs(batch_first):
    x = torch.randn(4, 3, 5)
    for kind in ("RNN", "LSTM", "GRU"):
        actual, expected = (
            getattr(package, kind)(5, 6, 2, batch_first=batch_first)(x)[0] for package in (fusedrnn.torch, torch.nn)
        )
        assert actual.shape == expected.shape and actual.stride() == expected.stride()


def test_outputs_may_be_changed_in_place():
    net = fusedrnn.torch.GRU(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    y, h_n = net(x)
    y.mul_(2.0)
    h_n += 1
    (y.sum() + h_n.sum()).backward()
    changed = [tensor.grad.clone() for tensor in net.parameters()]
    net.zero_grad()
    y, h_n = net(x)
    (2 * y.sum() + h_n.sum()).backward()
    assert all(map(torch.equal, changed, (tensor.grad for tensor in net.parameters())))


# -- as torch.nn ------------------------------------------------------------------------------------------------------

CONSTRUCTORS = [
    ("LSTM", (5, 7), {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
    ("LSTM", (5, 7, 3, False), {"proj_size": 3}),
    ("GRU", (5, 7, 1, True, True), {"dtype": torch.float64}),
    ("RNN", (5, 7, 2, "relu", False), {}),
    ("RNN", (5, 7), {"nonlinearity": "tanh", "device": "cpu"}),
    ("LSTMCell", (5, 7, False), {}),
    ("GRUCell", (5, 7), {"dtype": torch.float64}),
    ("RNNCell", (5, 7, True, "relu"), {}),
]


@pytest.mark.parametrize(("kind", "args", "options"), CONSTRUCTORS)
def test_constructors_match_those_of_torch(kind, args, options):
    ours, torch_net = make_pair(kind, *args, **options)
    assert isinstance(ours, type(torch_net)) and repr(ours) == repr(torch_net)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in torch_net.named_parameters()]
    assert all(map(torch.equal, ours.parameters(), torch_net.parameters()))
    assert set(vars(ours)) == set(vars(torch_net))
    ours.reset_parameters()
    assert not torch.equal(ours.weight_ih if kind.endswith("Cell") else ours.weight_ih_l0, next(torch_net.parameters()))
    torch_net.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(torch_net.state_dict(), strict=True)
    if not kind.endswith("Cell"):
        ours.flatten_parameters()
        assert len(ours.all_weights) == len(torch_net.all_weights)


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [
        ("LSTM", (5, 0), {}), ("LSTM", (5, 4), {"dropout": 2}), ("GRU", (5, 4), {"num_layers": 0}),
        ("GRU", (5, 4), {"proj_size": 2}), ("RNN", (5, 4), {"nonlinearity": "cos"}), ("LSTM", (5, 4), {"bias": 1}),
        ("LSTM", (5, 4), {"proj_size": 4}), ("LSTM", (5.0, 4), {}), ("RNN", (), {}),
    ],
)  # fmt: skip
def test_bad_arguments_of_constructors_raise_what_torch_raises(kind, args, options):
    same_error(lambda package: getattr(package, kind)(*args, **options))


def same_error(function):
    """Run with both packages; both must raise alike."""
    raised = []
    for package in (torch.nn, fusedrnn.torch):
        with pytest.raises(Exception) as caught:
            function(package)
        raised.append(caught)
    assert raised[0].type is raised[1].type and str(raised[0].value) == str(raised[1].value)


def packed_of(data, batch_sizes):
    return PackedSequence(data, torch.tensor(batch_sizes))


X, H, C = (5, 3, 4), (2, 3, 6), (2, 3, 6)
Z = torch.zeros
BAD_CALLS = {
    "1-D": lambda net, _: net(Z(4)),
    "4-D": lambda net, _: net(Z(1, 2, 3, 4)),
    "no tensor": lambda net, _: net([1.0]),
    "none": lambda net, _: net(None),
    "features": lambda net, _: net(Z(5, 3, 7)),
    "features, unbatched": lambda net, _: net(Z(5, 7)),
    "no steps": lambda net, _: net(Z(0, 3, 4)),
    "integers": lambda net, _: net(Z(X, dtype=torch.int64)),
    "double": lambda net, _: net(Z(X).double()),
    "half": lambda net, _: net(Z(X).half()),
    "complex": lambda net, _: net(Z(X, dtype=torch.complex64)),
    "sparse": lambda net, _: net(torch.ones(X).to_sparse()),
    "meta": lambda net, _: net(Z(X, device="meta")),
    "hx of another batch": lambda net, hx: net(Z(X), hx(Z(2, 4, 6))),
    "hx of another depth": lambda net, hx: net(Z(X), hx(Z(1, 3, 6))),
    "hx of another size": lambda net, hx: net(Z(X), hx(Z(2, 3, 5))),
    "hx of another dtype": lambda net, hx: net(Z(X), hx(Z(H).double())),
    "hx unbatched": lambda net, hx: net(Z(X), hx(Z(2, 6))),
    "hx batched": lambda net, hx: net(Z(5, 4), hx(Z(H))),
    "hx no tensor": lambda net, hx: net(Z(X), 3),
    "hx a string": lambda net, hx: net(Z(X), hx("h")),
    "packed features": lambda net, _: net(packed_of(Z(4, 3), [2, 2])),
    "packed 3-D": lambda net, _: net(packed_of(Z(4, 3, 4), [2, 2])),
    "packed too many": lambda net, _: net(packed_of(Z(3, 4), [2, 2])),
    "packed double": lambda net, _: net(packed_of(Z(4, 4).double(), [2, 2])),
    "packed hx": lambda net, hx: net(packed_of(Z(4, 4), [2, 2]), hx(Z(2, 3, 6))),
}
# PyTorch's LSTM looks at nothing in these, and reads memory that it should not.
UNCHECKED = {("LSTM", "packed features"), ("LSTM", "packed hx")}


@pytest.mark.parametrize(
    ("kind", "what"), [case for case in product(("RNN", "LSTM", "GRU"), BAD_CALLS) if case not in UNCHECKED]
)
def test_bad_calls_raise_what_torch_raises(kind, what, runs):
    net_of = {package: getattr(package, kind)(4, 6, 2) for package in (torch.nn, fusedrnn.torch)}
    same_error(lambda package: BAD_CALLS[what](net_of[package], lambda h: (h, h) if kind == "LSTM" else h))
    assert not runs


BAD_STEPS = {
    "3-D": lambda cell, hx: cell(Z(1, 3, 4)),
    "features": lambda cell, hx: cell(Z(3, 5)),
    "double": lambda cell, hx: cell(Z(3, 4).double()),
    "hx of another batch": lambda cell, hx: cell(Z(3, 4), hx(Z(2, 6))),
    "hx of another size": lambda cell, hx: cell(Z(3, 4), hx(Z(3, 5))),
    "hx of another dtype": lambda cell, hx: cell(Z(3, 4), hx(Z(3, 6).double())),
    "hx 3-D": lambda cell, hx: cell(Z(3, 4), hx(Z(1, 3, 6))),
    "no tensor": lambda cell, hx: cell(3),
}


@pytest.mark.parametrize("what", BAD_STEPS)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_bad_calls_of_cells_raise_what_torch_raises(kind, what, runs):
    cell_of = {package: getattr(package, kind)(4, 6) for package in (torch.nn, fusedrnn.torch)}
    same_error(lambda package: BAD_STEPS[what](cell_of[package], lambda h: (h, h) if kind == "LSTMCell" else h))
    assert not runs


def test_a_wrong_weight_is_never_read(runs):
    for package in (fusedrnn.torch, torch.nn):
        net = package.GRU(4, 6)
        net.weight_hh_l0 = torch.nn.Parameter(torch.zeros(6, 18))
        with pytest.raises(RuntimeError, match=r"shape|size"):
            net(Z(X))
    assert not runs


# -- copies and files -------------------------------------------------------------------------------------------------


def through_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net)), through_file])
@pytest.mark.parametrize(("kind", "args", "options"), CONSTRUCTORS)
def test_copies_compute_the_same(kind, args, options, again):
    net = getattr(fusedrnn.torch, kind)(*args, **options).eval()
    x = torch.randn(4, 5, dtype=next(net.parameters()).dtype)
    net(x)
    other = again(net)
    assert type(other) is type(net)
    for tensor, expected in zip(flat(other(x)), flat(net(x)), strict=True):
        assert torch.equal(tensor, expected)


def test_pickles_name_the_public_module():
    assert b"cfusedrnn.torch\nLSTM\n" in pickle.dumps(fusedrnn.torch.LSTM(2, 3), protocol=0)


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_that_of_the_operator(mode):
    shape = Shape(5, 3, 4, 17, layers=3, bidirectional=True)
    problem = make_problem(mode, shape)
    net = make(problem.spec, problem.params, dropout=0.5)
    torch.manual_seed(7)
    seed = eager.draw_seed()
    torch.manual_seed(7)
    actual = Call(net, "batched", problem)
    x, params, states = problem.astype(np.float64)
    spec = replace(problem.spec, dropout=0.5)
    y, final, _ = reference.train(spec, x, params, states, None, seed)
    assert_close(actual.forward, (y, final), "float32", spec)


def test_dropout_follows_torchs_generator_and_the_mode(runs):
    net, x = fusedrnn.torch.GRU(3, 8, 2, dropout=0.5), torch.randn(5, 4, 3)
    torch.manual_seed(1)
    first, second = net(x)[0], net(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(net(x)[0], first)
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])
    assert [spec.dropout for spec in runs] == [0.5] * 3 + [0.0] * 2
    plain = fusedrnn.torch.GRU(3, 8, 2)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(x)[0], net(x)[0])


def test_checkpointing_drops_the_same_again():
    net, x = fusedrnn.torch.LSTM(3, 8, 2, dropout=0.5), torch.randn(5, 4, 3, requires_grad=True)
    actual = []
    for reentrant in (None, False, True):
        torch.manual_seed(3)
        y = net(x)[0] if reentrant is None else checkpoint(lambda x: net(x)[0], x, use_reentrant=reentrant)
        actual.append(torch.autograd.grad(y.sum(), x)[0] if not reentrant else through_backward(y, x))
    assert torch.equal(actual[0], actual[1]) and torch.equal(actual[0], actual[2])


def through_backward(y, x):
    """The gradient of x by backward, which is all that reentrant checkpoints know."""
    x.grad = None
    y.sum().backward()
    return x.grad


def test_dropout_of_everything_runs_on_torch(runs):
    net = fusedrnn.torch.GRU(3, 4, 2, dropout=1.0)
    torch_net = torch.nn.GRU(3, 4, 2, dropout=1.0)
    torch_net.load_state_dict(net.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(net(x)[0], torch_net(x)[0]) and not runs
    net.eval()(x)
    assert len(runs) == 1


def test_dropout_of_a_single_layer_drops_nothing(runs):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        net = fusedrnn.torch.LSTM(3, 4, dropout=0.5)
    net(torch.randn(5, 2, 3))
    assert runs[0].dropout == 0
