"""Resets in the PyTorch layers: torch.nn on the pieces, in every form of a call; gradients of any order; graphs."""

import itertools
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn.torch
from fusedrnn import RNNOp, cells
from fusedrnn.torch import dispatch
from torch_layers import flat

T, N, I, H = 7, 4, 3, 5
LENGTHS = torch.tensor([5, 7, 1, 4])
FORMS = "batched", "batch_first", "lengths", "packed", "unbatched"
KINDS = "LSTM", "GRU", "RNN"


def layers(kind, **options):
    """Our layer and torch.nn's, with the same parameters."""
    torch.manual_seed(3)
    theirs = getattr(torch.nn, kind)(I, H, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
    ours = getattr(fusedrnn.torch, kind)(I, H, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def problem(kind, form):
    """Input (T, N, I), states, marks (T, N) and lengths."""
    generator = torch.Generator().manual_seed(1)
    batch = 1 if form == "unbatched" else N
    x = torch.randn(T, batch, I, dtype=torch.float64, generator=generator, requires_grad=True)
    count = 2 if kind == "LSTM" else 1
    states = tuple(
        torch.randn(4, batch, H, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(count)
    )
    resets = torch.rand(T, batch, generator=generator) < 0.4
    resets[0, ::2] = True
    lengths = LENGTHS if form in ("lengths", "packed") else torch.full((batch,), T)
    return x, states, resets, lengths


def other_states(states):
    """States after resets, of the kind of initial ones."""
    generator = torch.Generator().manual_seed(7)
    options = {"dtype": states[0].dtype, "generator": generator, "requires_grad": True}
    return tuple(torch.randn(state.shape, **options) for state in states)


def in_pieces(layer, x, states, resets, lengths, reset_states=None):
    """The output and the final states of one call for each piece of each sequence."""
    rows, finals = [], []
    reset_states = reset_states or tuple(map(torch.zeros_like, states))
    reverses = torch.arange(len(states[0])) % 2 == 1
    for n, length in enumerate(lengths.tolist()):
        starts = [t for t in range(length) if t == 0 or resets[t, n]]
        outputs, final = [], [state[:, n : n + 1] for state in states]
        initial = final
        for begin, end in zip(starts, [*starts[1:], length], strict=True):
            enters = torch.where(reverses, torch.tensor(end == length), torch.tensor(begin == 0 and not resets[0, n]))
            leaves = torch.where(reverses, torch.tensor(begin == 0), torch.tensor(end == length))
            pairs = zip(initial, reset_states, strict=True)
            before = tuple(torch.where(enters[:, None, None], state, other[:, n : n + 1]) for state, other in pairs)
            y, after = layer(x[begin:end, n : n + 1], before if len(before) > 1 else before[0])
            after = after if isinstance(after, tuple) else (after,)
            final = [torch.where(leaves[:, None, None], new, old) for new, old in zip(after, final, strict=True)]
            outputs.append(y)
        outputs.append(x.new_zeros(T - length, 1, 2 * H))
        rows.append(torch.cat(outputs))
        finals.append(final)
    return torch.cat(rows, 1), *(torch.cat(states, 1) for states in zip(*finals, strict=True))


def call(layer, form, x, states, resets, lengths, **options):
    """One call in one of the forms: the output (T, N, features), other states likewise, and the final states."""
    def passed(states):
        states = tuple(state.squeeze(1) for state in states) if form == "unbatched" else states
        return states if len(states) > 1 else states[0]

    hx = passed(states)
    if "reset_states" in options:
        options["reset_states"] = passed(options["reset_states"])
    if form == "unbatched":
        y, final = layer(x.squeeze(1), hx, resets=resets.squeeze(1), **options)
    elif form == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, final = layer(packed, hx, resets=resets, **options)
    elif form == "lengths":
        y, final = layer(x, hx, lengths=lengths, resets=resets, **options)
    elif form == "batch_first":
        y, final = layer(x.transpose(0, 1), hx, resets=resets.T, **options)
    else:
        y, final = layer(x, hx, resets=resets, **options)
    outputs = y if options.get("all_states") else (y,)
    final = final if isinstance(final, tuple) else (final,)
    if form == "unbatched":
        return *(output.unsqueeze(1) for output in outputs), *(state.unsqueeze(1) for state in final)
    if form == "packed":
        assert all(isinstance(output, PackedSequence) for output in outputs)
        outputs = [pad_packed_sequence(output, total_length=T)[0] for output in outputs]
    elif form == "batch_first":
        outputs = [output.transpose(0, 1) for output in outputs]
    return *outputs, *final


def gradients(results, tensors):
    """Of a function that weights all elements differently."""
    total = sum((result * torch.arange(1, result.numel() + 1).view(result.shape).cos()).sum() for result in results)
    return torch.autograd.grad(total, tensors, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "fused"), [*((kind, True) for kind in KINDS), ("LSTM", False)])
def test_results_and_gradients(kind, form, fused, monkeypatch, runs):
    """By the operator, and by torch.nn where the operator does not run."""
    ours, theirs = layers(kind, batch_first=form == "batch_first")
    theirs.batch_first = False
    x, states, resets, lengths = problem(kind, form)
    if not fused:
        monkeypatch.setattr(dispatch, "runner", lambda: None)
    actual = call(ours, form, x, states, resets, lengths)
    assert bool(runs) is fused
    expected = in_pieces(theirs, x, states, resets, lengths)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    pairs = (actual, ours), (expected, theirs)
    both = (gradients(results, (x, *states, *layer.parameters())) for results, layer in pairs)
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "fused"), [("LSTM", True), ("GRU", False)])
def test_states_after_resets(kind, form, fused, monkeypatch, runs):
    """Likewise from other states than zeros, which have gradients."""
    ours, theirs = layers(kind, batch_first=form == "batch_first")
    theirs.batch_first = False
    x, states, resets, lengths = problem(kind, form)
    reset_states = other_states(states)
    if not fused:
        monkeypatch.setattr(dispatch, "runner", lambda: None)
    actual = call(ours, form, x, states, resets, lengths, reset_states=reset_states)
    assert bool(runs) is fused
    expected = in_pieces(theirs, x, states, resets, lengths, reset_states)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    pairs = (actual, ours), (expected, theirs)
    both = (gradients(results, (x, *states, *reset_states, *layer.parameters())) for results, layer in pairs)
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_bits_of_the_numpy_operator(kind):
    torch.manual_seed(8)
    layer = getattr(fusedrnn.torch, kind)(I, H, num_layers=2, bidirectional=True)
    x, states, resets, _ = problem(kind, "batched")
    inputs = x, *states, *other_states(states)
    x, *both = (tensor.detach().float().requires_grad_() for tensor in inputs)
    count = len(states)
    states, reset_states = both[:count], both[count:]
    op = RNNOp.get(layer._plan(torch.float32).spec)
    by_name = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    arrays = [tensor.detach().numpy() for tensor in (x, *both)]
    y, final, reserve = op.forward(
        arrays[0], op.spec.layout.pack(by_name, names="torch"), arrays[1 : 1 + count], training=True,
        resets=resets.numpy(), reset_states=arrays[1 + count :],
    )  # fmt: skip
    dx, _, dstates, dreset_states = op.backward(np.ones_like(y), None, reserve)
    for hx in (tuple(states), None):
        results = call(layer, "batched", x, hx or tuple(map(torch.zeros_like, states)), resets, None,
                       reset_states=tuple(reset_states))  # fmt: skip
        if hx is not None:
            for one, other in zip(results, (y, *final), strict=True):
                np.testing.assert_array_equal(one.detach().numpy(), other)
            grads = torch.autograd.grad(results[0].sum(), (x, *states, *reset_states))
            for one, other in zip(grads, (dx, *dstates, *dreset_states), strict=True):
                np.testing.assert_array_equal(one.numpy(), other)
        else:  # zeros by default
            options = {"resets": resets, "reset_states": tuple(reset_states) if count > 1 else reset_states[0]}
            for one, other in zip(flat(layer(x, **options)), results, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("form", ["batch_first", "lengths", "packed", "unbatched"])
def test_cells_of_users(form, monkeypatch):
    """By the operator and by PyTorch's own operations."""
    torch.manual_seed(2)
    layer = fusedrnn.torch.Layer(
        cells.slstm, I, H, num_layers=2, bidirectional=True, dtype=torch.float64, batch_first=form == "batch_first"
    )
    x, (h0,), resets, lengths = problem("GRU", form)
    states = (h0, *(torch.rand_like(h0).requires_grad_() for _ in layer.spec.state_names[1:]))
    reset_states = tuple(torch.rand_like(state).requires_grad_() for state in states)
    inputs = x, *states, *reset_states, *layer.parameters()
    options = {"all_states": True, "reset_states": reset_states}
    fused = call(layer, form, x, states, resets, lengths, **options)
    assert len(fused) == 8
    fused_gradients = gradients(fused, inputs)
    monkeypatch.setattr(dispatch, "runner", lambda: None)
    composed = call(layer, form, x, states, resets, lengths, **options)
    for one, other in zip((*fused, *fused_gradients), (*composed, *gradients(composed, inputs)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", ["batched", "unbatched"])
def test_single_steps(form, runs):
    """Calls of one step are repeated calls, whatever the marks."""
    torch.manual_seed(6)
    layer, theirs = (package.LSTM(I, H, num_layers=2) for package in (fusedrnn.torch, torch.nn))
    layer.load_state_dict(theirs.state_dict())
    batch = (N,) if form == "batched" else ()
    states = tuple(torch.rand(2, *batch, H, requires_grad=True) for _ in range(2))
    for number in range(6):
        x = torch.rand(1, *batch, I)
        resets = torch.rand(1, *batch) < 0.5 if number else torch.zeros(1, *batch, dtype=torch.bool)
        kept = (~resets[0])[:, None] if batch else ~resets[0]
        reset_states = tuple(number * torch.ones_like(state) for state in states) if number > 3 else None
        results = flat(layer(x, states, resets=resets, reset_states=reset_states))
        begin = number if number > 3 else 0
        expected = flat(theirs(x, tuple(torch.where(kept, state, begin) for state in states)))
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other)
        grads = (torch.autograd.grad(sum(r.sum() for r in out), states) for out in (results, expected))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
    assert layer._last_call.prepared is not None
    with pytest.raises(RuntimeError):
        layer(x, states[0], resets=resets)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch.nn"])
def test_marks_do_not_change_the_errors_of_wrong_states(steps, fused, monkeypatch):
    """Neither does a state of the right shape take the place of a wrong one."""
    if not fused:
        monkeypatch.setattr(dispatch, "runner", lambda: None)
    layer, x, right = fusedrnn.torch.GRU(I, H), torch.zeros(steps, N, I), torch.zeros(1, N, H)
    for shape in ((1, 1, H), (1, N + 2, H), (1, N, 1), (2, N, H)):
        for is_marked, reset_states in itertools.product((False, True), (None, right)):
            marks = torch.zeros(steps, N, dtype=torch.bool)
            marks[0, 1] = is_marked
            message = re.escape(f"Expected hidden size {(1, N, H)}, got {[*shape]}")
            with pytest.raises(RuntimeError, match=f"^{message}$"):
                layer(x, torch.zeros(shape), resets=marks, reset_states=reset_states)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        layer(x[:1], right.half(), resets=torch.ones(1, N, dtype=torch.bool), reset_states=right)


def test_empty_input():
    """As without marks."""
    layer, marks = fusedrnn.torch.GRU(I, H), torch.zeros(T, 0, dtype=torch.bool)
    y, final = layer(torch.zeros(T, 0, I), resets=marks)
    assert y.shape == (T, 0, H) and final.shape == (1, 0, H)
    with pytest.raises(RuntimeError, match=r"^Expected sequence length to be larger than 0"):
        layer(torch.zeros(0, N, I), resets=torch.zeros(0, N, dtype=torch.bool))


def test_states_in_a_list(monkeypatch):
    ours, _ = layers("LSTM")
    x, states, resets, _ = problem("LSTM", "batched")
    expected = flat(ours(x, states, resets=resets))
    monkeypatch.setattr(dispatch, "runner", lambda: None)
    for one, other in zip(flat(ours(x, list(states), resets=resets)), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_traced_single_steps():
    """The marks are inputs of the graph: no mark while it is traced says nothing of later calls."""
    layer = fusedrnn.torch.GRU(I, H).requires_grad_(False)

    def run(x, h0, resets):
        return layer(x, h0, resets=resets)[0]

    x, h0, resets = torch.rand(1, N, I), torch.ones(1, N, H), torch.zeros(1, N, dtype=torch.bool)
    graph = make_fx(run)(x, h0, resets)
    for marks in (resets, ~resets):
        torch.testing.assert_close(graph(x, h0, marks), run(x, h0, marks))


def test_fake_single_steps():
    with FakeTensorMode():
        x, resets = torch.rand(1, N, I), torch.zeros(1, N, dtype=torch.bool)
        y, _ = fusedrnn.torch.GRU(I, H)(x, torch.ones(1, N, H), resets=resets)
    assert y.shape == (1, N, H)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_marks_in_the_padding_have_no_effect(fused, steps, monkeypatch):
    layer = fusedrnn.torch.Layer("gru", I, H)
    if not fused:
        monkeypatch.setattr(dispatch, "runner", lambda: None)
    x, h0, reset_states = torch.rand(steps, 2, I), torch.ones(1, 2, H), torch.full((1, 2, H), 7.0)
    options = {"lengths": [0, steps], "resets": torch.ones(steps, 2, dtype=torch.bool)}
    for states in (None, reset_states):
        _, final = layer(x, h0, reset_states=states, **options)
        assert torch.equal(final[:, 0], h0[:, 0]) and not torch.equal(final[:, 1], h0[:, 1])


@pytest.mark.parametrize("steps", [1, 2])
def test_the_forward_of_a_subclass_runs_once(steps):
    class Doubled(fusedrnn.torch.GRU):
        def forward(self, x, hx=None, resets=None):
            return super().forward(2 * x, hx, resets=resets)

    doubled, plain = Doubled(I, H), fusedrnn.torch.GRU(I, H)
    plain.load_state_dict(doubled.state_dict())
    x, resets = torch.rand(steps, N, I), torch.zeros(steps, N, dtype=torch.bool)
    assert torch.equal(doubled(x, resets=resets)[0], plain(2 * x)[0])


def test_every_state_of_every_step():
    """c of a step is the final c of the steps up to it; gradients flow into every one."""
    torch.manual_seed(4)
    theirs = torch.nn.LSTM(I, H, num_layers=2, dtype=torch.float64)
    ours = fusedrnn.torch.LSTM(I, H, num_layers=2, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    (y, c), final = ours(x, all_states=True)
    expected, expected_final = theirs(x)
    every = torch.stack([theirs(x[: t + 1])[1][1][-1] for t in range(T)])
    pairs = ((y, c, *final), ours), ((expected, every, *expected_final), theirs)
    for one, other in zip(pairs[0][0], pairs[1][0], strict=True):
        torch.testing.assert_close(one, other)
    both = (gradients(results, (x, *layer.parameters())) for results, layer in pairs)
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)
    (dx,) = torch.autograd.grad(ours(x, all_states=True)[0][1].sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(every.sum(), x)[0])
    (y,), _ = fusedrnn.torch.GRU(I, H)(x.float(), all_states=True)
    assert y.shape == (T, N, H)


def test_every_state_needs_the_operator(monkeypatch):
    monkeypatch.setattr(dispatch, "runner", lambda: None)
    with pytest.raises(NotImplementedError, match=r"^all_states needs the operator"):
        fusedrnn.torch.LSTM(I, H)(torch.zeros(T, N, I), all_states=True)


def test_gradients_of_gradients():
    torch.manual_seed(5)
    layer = fusedrnn.torch.LSTM(2, 2, bidirectional=True, dtype=torch.float64)
    shapes = (3, 2, 2), *[(2, 2, 2)] * 4
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    resets = torch.tensor([[True, False], [False, True], [True, False]])

    def run(x, h0, c0, *reset_states):
        options = {"lengths": [3, 2], "resets": resets, "all_states": True, "reset_states": reset_states}
        outputs, final = layer(x, (h0, c0), **options)
        return *outputs, *final

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_compiled(form):
    """The operator in a graph has the bits of the eager call, and so do its gradients."""
    ours, _ = layers("LSTM")
    x, states, resets, lengths = problem("LSTM", form)
    reset_states = other_states(states)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    if form == "lengths":
        arguments = x, states, lengths, resets, True, reset_states
    else:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        x = packed.data.detach().requires_grad_()
        arguments = packed._replace(data=x), states, None, resets, False, reset_states
    results = (flat(layer(*arguments)) for layer in (ours, compiled))
    eager, traced = ([r.data if isinstance(r, PackedSequence) else r for r in both] for both in results)
    for one, other in zip(eager, traced, strict=True):
        assert torch.equal(one, other)
    totals = (sum(result.sum() for result in results) for results in (eager, traced))
    for one, other in zip(*(torch.autograd.grad(total, (x, *states, *reset_states)) for total in totals), strict=True):
        assert torch.equal(one, other)


def test_marks_may_change_before_backward():
    ours, _ = layers("GRU")
    x, states, resets, _ = problem("GRU", "batched")
    results = []
    for changes in (False, True):
        marks = resets.clone()
        y, _ = ours(x, states[0], resets=marks)
        if changes:
            marks[:] = True
        results.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*results)


ERRORS = [
    (torch.zeros(T, N), TypeError, "resets must be a tensor of torch.bool; got torch.float32"),
    (np.zeros((T, N), bool), TypeError, "resets must be a tensor of torch.bool; got ndarray"),
    (torch.zeros(N, T, dtype=torch.bool), ValueError, r"resets must have shape \(T, N\) = \(7, 4\); got \(4, 7\)"),
]


@pytest.mark.parametrize(("resets", "error", "message"), ERRORS)
def test_errors(resets, error, message):
    ours, _ = layers("GRU")
    with pytest.raises(error, match=f"^{message}$"):
        ours(torch.zeros(T, N, I, dtype=torch.float64), resets=resets)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_low_precision(mode, runs):
    """Results and gradients have the dtypes of torch.nn's, and the values of the exact call but for rounding."""
    layer, _ = layers("LSTM")
    x, states, resets, lengths = problem("LSTM", "lengths")
    reset_states = other_states(states)
    exact = call(layer, "lengths", x, states, resets, lengths, reset_states=reset_states)
    layer = layer.float()
    inputs = [tensor.detach().float() for tensor in (x, *states, *reset_states)]
    if mode == "bfloat16":
        layer, inputs = layer.bfloat16(), [tensor.bfloat16() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", enabled=mode == "autocast"):
        options = {"reset_states": tuple(inputs[3:])}
        results = call(layer, "lengths", inputs[0], tuple(inputs[1:3]), resets, lengths, **options)
    assert len(runs) == 2
    for one, other in zip(results, exact, strict=True):
        assert one.dtype is (torch.bfloat16 if mode == "bfloat16" else torch.float32)
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)
    for grad, tensor in zip(torch.autograd.grad(sum(map(torch.sum, results)), inputs), inputs, strict=True):
        assert grad.dtype is tensor.dtype
        assert grad.any()


ROWS = torch.zeros(4, N, H, dtype=torch.float64)
STATE_ERRORS = [
    ("LSTM", False, (ROWS, ROWS), ValueError, "reset_states must be None without resets"),
    ("LSTM", True, ROWS, TypeError, "reset_states must be a tuple of 2 tensors, as the initial states are; got Tensor"),
    ("GRU", True, None, TypeError, "reset_states must be a tensor, as the initial states are; got int"),
    ("GRU", True, ROWS[1:], ValueError, "reset_states must have shape (4, 4, 5); got (3, 4, 5)"),
    ("LSTM", True, (ROWS, ROWS.float()), ValueError,
     "reset_states[1] must have dtype torch.float64, as the input has; got torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "has_resets", "states", "error", "message"), STATE_ERRORS)
def test_errors_of_states(kind, has_resets, states, error, message):
    ours, _ = layers(kind)
    resets = torch.zeros(T, N, dtype=torch.bool) if has_resets else None
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ours(torch.zeros(T, N, I, dtype=torch.float64), resets=resets, reset_states=3 if states is None else states)
