"""Calls like the one before are recognized by fewer checks. Whatever changes between calls, results are right."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fusedrnn.torch
from fusedrnn.engines.cpu.weights.cache import WeightCache
from fusedrnn.torch import accelerate, restore
from fusedrnn.torch.guarded_call import GuardedCall
from fusedrnn.torch.network import template
from fusedrnn.torch.tensor_guards import DESCRIBE
from torch_layers import KINDS, LAYERS, flat, make_pair

I, H, N = 3, 5, 2
LONG = 30
"""So many steps that the weights are packed."""
CALLS = [*((kind, 1) for kind in KINDS), *((kind, LONG) for kind in LAYERS)]
"""Modules and numbers of steps."""


@pytest.fixture
def guarded_calls(monkeypatch):
    """The calls that machine code has checked and run."""
    calls, run = [], GuardedCall.run

    def recorded(call, *args):
        results = run(call, *args)
        if results is not None:
            calls.append(call)
        return results

    monkeypatch.setattr(GuardedCall, "run", recorded)
    return calls


def operands(kind, steps=1, form="batched"):
    """An input and its states."""
    cell, pair = kind.endswith("Cell"), kind.startswith("LSTM")
    leading = (N,) if cell else (1, N)
    x, states = torch.randn(steps * leading[0], *leading[1:], I), [torch.randn(*leading, H) for _ in range(2)]
    if form == "packed":
        x = pack_sequence([*x.transpose(0, 1)])
    return x, tuple(states) if pair else states[0]


def outcome(net, *args):
    """What a module returns, as a list, or the class and the text of the error that it raises."""
    try:
        return flat(net(*args))
    except Exception as error:
        return type(error), str(error)


def assert_same(ours, torch_net, x, hx):
    """Both modules return the same, and a new module of ours the same bits."""
    actual, expected = flat(ours(x, hx)), flat(torch_net(x, hx))
    torch.testing.assert_close(actual, expected)
    # Negated parameters run on torch.nn's layer, their copies do not.
    if not any(parameter.is_neg() for parameter in ours.parameters()):
        assert all(map(torch.equal, actual, flat(copy.deepcopy(ours)(x, hx))))


@pytest.mark.skipif(not DESCRIBE, reason="this torch describes no tensors to machine code")
@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize(
    ("kind", "steps", "form"),
    [*((*call, "batched") for call in CALLS), *((kind, steps, "packed") for kind in LAYERS for steps in (1, LONG))],
)
def test_repeated_calls_are_checked_by_machine_code(kind, steps, form, records, guarded_calls):
    ours, torch_net = make_pair(kind, I, H)
    with torch.set_grad_enabled(records):
        for _ in range(4):
            x, hx = operands(kind, steps, form)
            assert_same(ours, torch_net, x, hx)
    assert len(guarded_calls) == 2


@pytest.mark.parametrize(("kind", "steps"), CALLS)
def test_gradients_of_repeated_calls(kind, steps):
    ours, torch_net = make_pair(kind, I, H)
    for number in range(4):
        x, hx = operands(kind, steps)
        grads = []
        for net in (ours, torch_net):
            leaf = x.clone().requires_grad_(number != 2)
            net.zero_grad()
            results = flat(net(leaf, hx))
            torch.autograd.backward(results, [torch.ones_like(result) for result in results])
            grads.append([leaf.grad, *[parameter.grad for parameter in net.parameters()]])
        torch.testing.assert_close(*grads)


TIES = {
    "biases": ("GRUCell", {}, [("bias_hh", "bias_ih")]),
    "matrices": ("RNNCell", {"bias": False}, [("weight_hh", "weight_ih")]),
    "layers": ("LSTM", {"num_layers": 2}, [("weight_ih_l1", "weight_ih_l0"), ("bias_hh_l1", "bias_ih_l0")]),
    "directions": ("GRU", {"bidirectional": True}, [("weight_hh_l0_reverse", "weight_hh_l0")]),
}  # fmt: skip


def _tied_pair(tied):
    """Modules with parameters that are one tensor, and the shape of a step of their input."""
    kind, options, ties = TIES[tied]
    pair = make_pair(kind, H, H, **options)
    for net in pair:
        for name, other in ties:
            setattr(net, name, getattr(net, other))
    return *pair, (N, H) if kind.endswith("Cell") else (1, N, H)


@pytest.mark.parametrize("tied", TIES)
def test_parameters_that_are_one_tensor(tied, guarded_calls):
    ours, torch_net, shape = _tied_pair(tied)
    with torch.no_grad():
        for _ in range(4):
            assert_same(ours, torch_net, torch.randn(shape), None)
    assert len(guarded_calls) == 2 * bool(DESCRIBE)


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("tied", TIES)
def test_gradients_of_parameters_that_are_one_tensor(tied, steps):
    ours, torch_net, shape = _tied_pair(tied)
    for _ in range(4):
        x, grads = torch.randn(steps * shape[0], *shape[1:]), []
        for net in (ours, torch_net):
            results = flat(net(x))
            grads.append(torch.autograd.grad(sum(result.square().sum() for result in results), [*net.parameters()]))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_a_parameter_that_a_subclass_adds(kind, guarded_calls):
    class Scaled(getattr(fusedrnn.torch, kind)):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x, hx=None):
            return super().forward(self.scale * x, hx)

    _, torch_net = make_pair(kind, I, H)
    ours = Scaled(I, H)
    ours.load_state_dict(torch_net.state_dict(), strict=False)
    for _ in range(4):
        x, hx = operands(kind)
        torch.testing.assert_close(flat(ours(x, hx)), flat(torch_net(2 * x, hx)))
    assert len(guarded_calls) == 2 * bool(DESCRIBE)


@pytest.mark.parametrize(("kind", "steps"), CALLS)
def test_double_backward_of_a_repeated_call(kind, steps):
    ours, torch_net = (net.double() for net in make_pair(kind, I, H))
    for _ in range(3):
        x, _ = operands(kind, steps)
        second = []
        for net in (ours, torch_net):
            leaf = x.double().requires_grad_()
            (grad,) = torch.autograd.grad(flat(net(leaf))[0].square().sum(), leaf, create_graph=True)
            recurrent = net.weight_hh_l0 if kind in LAYERS else net.weight_hh
            second.append(torch.autograd.grad(grad.square().sum(), [leaf, recurrent]))
        torch.testing.assert_close(*second)


def _halve_in_place(net):
    for parameter in net.parameters():
        parameter.data.mul_(0.5)


def _move_data(net):
    for parameter in net.parameters():
        parameter.data = parameter.data.clone() * 0.5


def _transpose_data(net):
    for parameter in net.parameters():
        if parameter.shape == (H, H):
            parameter.data = parameter.data.t()


def _negate_lazily(net):
    for parameter in net.parameters():
        parameter.data = torch._neg_view(parameter.data)


def _replace(net):
    for name, parameter in [*net.named_parameters()]:
        setattr(net, name, torch.nn.Parameter(parameter.detach() * 0.5))


def _parametrize(net):
    name = next(name for name, _ in net.named_parameters() if "weight_hh" in name)
    parametrize.register_parametrization(net, name, torch.nn.Tanh())


CHANGES = [
    _halve_in_place, _move_data, _transpose_data, _negate_lazily, _replace, _parametrize,
    lambda net: net.double().float(), lambda net: net.train(not net.training),
    lambda net: net.requires_grad_(False),
    lambda net: net.load_state_dict({name: -weight for name, weight in net.state_dict().items()}),
]  # fmt: skip


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("kind", "steps"), [("RNN", 1), ("LSTMCell", 1), ("GRU", LONG)])
def test_a_module_changes_between_calls(kind, steps, change, records):
    ours, torch_net = make_pair(kind, I, H)
    with torch.set_grad_enabled(records):
        for _ in range(3):
            assert_same(ours, torch_net, *operands(kind, steps))
        change(ours)
        change(torch_net)
        for _ in range(3):
            assert_same(ours, torch_net, *operands(kind, steps))


def test_weights_are_packed_once_for_each_change(monkeypatch):
    packs, pack = [], WeightCache._pack
    monkeypatch.setattr(WeightCache, "_pack", lambda cache, *args: packs.append(args) or pack(cache, *args))
    ours, torch_net = make_pair("GRU", I, H)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (ours, torch_net)]
    counts = []

    def step(change):
        x, _ = operands("GRU", LONG)
        for net, optimizer in zip((ours, torch_net), optimizers, strict=True):
            change(net, optimizer)
            net.zero_grad()
            net(x)[0].square().sum().backward()
        grads = [[parameter.grad for parameter in net.parameters()] for net in (ours, torch_net)]
        torch.testing.assert_close(*grads)
        counts.append(len(packs))
        packs.clear()

    for _ in range(3):
        step(lambda net, optimizer: None)
    step(lambda net, optimizer: optimizer.step())
    step(lambda net, optimizer: None)
    step(lambda net, optimizer: _halve_in_place(net))  # PyTorch does not count this change
    step(lambda net, optimizer: optimizer.step())
    assert counts == [1, 0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_a_parametrization_is_computed_once_for_each_call(kind):
    computed = []

    class Counted(torch.nn.Module):
        def forward(self, weight):
            computed.append(weight)
            return 2 * weight

    ours, _ = make_pair(kind, I, H)
    parametrize.register_parametrization(ours, "weight_hh_l0" if kind in LAYERS else "weight_hh", Counted())
    computed.clear()
    for _ in range(4):
        ours(*operands(kind))
    assert len(computed) == 4


@pytest.mark.parametrize("steps", [2, 30])
@pytest.mark.parametrize("records", [False, True])
def test_batch_first_changes_between_calls(records, steps):
    ours, torch_net = make_pair("GRU", I, H)
    with torch.set_grad_enabled(records):
        for batch_first in (False, True, False):
            ours.batch_first = torch_net.batch_first = batch_first
            for _ in range(3):
                assert_same(ours, torch_net, torch.randn(steps, steps, I), None)


def _as_imaginary_part(x):
    return torch.complex(torch.zeros_like(x), x).conj().imag


INPUTS = {
    "another batch": lambda x: torch.cat([x, x], dim=-2), "strides": lambda x: torch.randn(*x.shape[:-1], 7)[..., :I],
    "features apart": lambda x: torch.randn(*x.shape, 2)[..., 0], "a parameter": torch.nn.Parameter,
    "negated": _as_imaginary_part, "requires grad": lambda x: x.clone().requires_grad_(),
    "float64": torch.Tensor.double, "too many features": lambda x: torch.cat([x, x], dim=-1), "a list": list,
}  # fmt: skip


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(("kind", "steps"), [("GRU", 1), ("RNNCell", 1), ("LSTM", LONG)])
def test_input_changes_between_calls(kind, steps, change, records):
    ours, torch_net = make_pair(kind, I, H)
    with torch.set_grad_enabled(records):
        for _ in range(3):
            assert_same(ours, torch_net, *operands(kind, steps))
        x = change(operands(kind, steps)[0])
        outcomes = [outcome(net, x) for net in (ours, torch_net)]
        if isinstance(outcomes[1], tuple):
            assert outcomes[0] == outcomes[1]
        else:
            torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell"])  # torch.nn's LSTMs cannot run on these
def test_tensors_of_zeros_without_memory(kind, records):
    ours, torch_net = make_pair(kind, I, H)
    with torch.set_grad_enabled(records):
        for _ in range(3):
            x, hx = operands(kind)
            assert_same(ours, torch_net, x, hx)
        zeros = torch._efficientzerotensor(x.shape)
        torch.testing.assert_close(flat(ours(zeros, hx)), flat(torch_net(torch.zeros_like(x), hx)))
        none = torch._efficientzerotensor(hx.shape)
        torch.testing.assert_close(flat(ours(x, none)), flat(torch_net(x)))


@pytest.mark.parametrize(("kind", "steps"), CALLS)
def test_states_change_between_calls(kind, steps):
    ours, torch_net = make_pair(kind, I, H)
    x, hx = operands(kind, steps)
    pair = isinstance(hx, tuple)
    wrong = hx[0] if pair else (hx, hx)
    other_form = list(hx) if pair else (hx,)
    for states in (hx, hx, hx, other_form, hx, hx, hx, None, hx, hx, hx, wrong, hx, hx):
        outcomes = [outcome(net, x, states) for net in (ours, torch_net)]
        assert isinstance(outcomes[0], list) == isinstance(outcomes[1], list)
        if isinstance(outcomes[0], list):
            torch.testing.assert_close(*outcomes)


def test_a_packed_sequence_changes_between_calls():
    ours, torch_net = make_pair("LSTM", I, H)
    for lengths in ([3, 2], [3, 2], [3, 2], [3, 1], [2, 3], [2, 3], [2, 3], [3, 2]):
        packed = pack_padded_sequence(torch.randn(3, N, I), lengths, enforce_sorted=False)
        with torch.no_grad():
            assert_same(ours, torch_net, packed, None)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("mode", LAYERS)
def test_packed_sequences_in_another_order(mode, records, guarded_calls):
    ours, torch_net = make_pair(mode, I, H)
    with torch.set_grad_enabled(records):
        for _ in range(3):
            states = [torch.randn(1, N, H) for _ in range(2)]
            packed = pack_padded_sequence(torch.randn(2, N, I), [1, 2], enforce_sorted=False)
            assert_same(ours, torch_net, packed, tuple(states) if mode == "LSTM" else states[0])
        states = [torch.randn(1, N + 1, H) for _ in range(2)]  # torch.nn ignores sequences that have no index
        hx = tuple(states) if mode == "LSTM" else states[0]
        torch.testing.assert_close(flat(ours(packed, hx)), flat(torch_net(packed, hx)))
    assert len(guarded_calls) == 1


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_other_ways_to_call_after_repeated_calls(kind):
    ours, torch_net = make_pair(kind, I, H)
    x, hx = operands(kind)
    for _ in range(3):
        ours(x, hx)
    doubled = {name: 2 * parameter.detach() for name, parameter in ours.named_parameters()}
    torch.testing.assert_close(
        flat(functional_call(ours, doubled, (x, hx))), flat(functional_call(torch_net, doubled, (x, hx)))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert flat(ours(x, hx))[0].dtype == flat(torch_net(x, hx))[0].dtype
    with torch.inference_mode():
        assert flat(ours(x, hx))[0].is_inference()
    assert not flat(ours(x, hx))[0].is_inference()


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_copies_of_a_module_that_was_called(kind):
    ours, torch_net = make_pair(kind, I, H)
    x, hx = operands(kind)
    for _ in range(3):
        ours(x, hx)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        assert_same(other, torch_net, x, hx)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_not_change_between_forward_and_backward(kind):
    for net in make_pair(kind, I, H):
        for _ in range(3):
            x, hx = operands(kind)
            results = flat(net(x.requires_grad_(), hx))
        with torch.no_grad():
            next(parameter for name, parameter in net.named_parameters() if "weight_ih" in name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            results[0].sum().backward()


@pytest.mark.parametrize("num_bytes", [0, 4])
def test_a_weight_loses_its_memory_between_forward_and_backward(num_bytes):
    """Also in a backward call that is prepared: no freed memory is read."""
    cell = fusedrnn.torch.GRUCell(I, H)
    x, h = operands("GRUCell")
    for _ in range(4):
        cell(x, h).sum().backward()
    y = cell(x, h)
    cell.weight_hh.untyped_storage().resize_(num_bytes)
    with pytest.raises(RuntimeError, match="memory of a weight"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (1, 7), (7, 1), (2, 3), (1, 2, 3), (2, 1, 3), (2, 3, 4)])
def test_tensors_like_a_template_are_as_new(shape):
    like, new = torch.empty_like(template(torch.float64, shape)), torch.empty(shape, dtype=torch.float64)
    assert (like.shape, like.stride(), like.dtype, like.device) == (shape, new.stride(), new.dtype, new.device)


def test_threads_call_a_module_at_once():
    from concurrent.futures import ThreadPoolExecutor

    ours, torch_net = make_pair("GRUCell", I, H)
    inputs = [operands("GRUCell") for _ in range(8)]

    def run(number):
        with torch.no_grad():
            return [ours(*inputs[(number + step) % 8]) for step in range(100)]

    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(run, range(8))]
    with torch.no_grad():
        expected = [torch_net(*each) for each in inputs]
    for number, of_thread in enumerate(results):
        for step, result in enumerate(of_thread):
            torch.testing.assert_close(result, expected[(number + step) % 8])


@pytest.mark.parametrize("change", ["assign", "meta", "restore"])
def test_replaced_parameters_are_freed(change):
    """A prepared call does not keep them, and a restored module has nothing of ours."""
    layer, x = torch.nn.GRU(4, 5), torch.randn(3, 2, 4)
    accelerate(layer)
    for _ in range(3):
        layer(x)
    assert vars(layer)["_last_call"].prepared is not None
    weight = weakref.ref(layer.weight_hh_l0)
    if change == "meta":
        layer.to_empty(device="meta")
    else:
        if change == "restore":
            restore(layer)
        layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    assert weight() is None
    assert "_last_call" not in vars(layer)


@pytest.mark.parametrize(("kind", "steps"), CALLS)
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("num_calls", [0, 3])
def test_operands_without_memory_are_an_error(kind, steps, is_recorded, num_calls):
    """FSDP releases memory in this way. Kernels would read it at address 0, or take an initial state for zeros."""
    x, states = operands(kind, steps)
    h0 = states[0] if isinstance(states, tuple) else states
    for name in ("x", "h0", "weight_hh", "bias_hh"):
        net = getattr(fusedrnn.torch, kind)(I, H)
        with torch.set_grad_enabled(is_recorded):
            for _ in range(num_calls):
                net(x, states)
            tensors = {"x": x, "h0": h0} | {key.removesuffix("_l0"): p.data for key, p in net.named_parameters()}
            content = tensors[name].clone()
            tensors[name].untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match=rf"{name}\w* must have {content.nbytes} bytes of memory"):
                net(x, states)
            tensors[name].untyped_storage().resize_(content.nbytes)
            tensors[name].copy_(content)
        for actual, expected in zip(flat(net(x, states)), flat(copy.deepcopy(net)(x, states)), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_calls", [0, 3])
def test_a_cotangent_without_memory_is_an_error(num_calls):
    """It is not taken for zeros."""
    net, x = fusedrnn.torch.LSTM(I, H), torch.randn(LONG, N, I)
    for _ in range(num_calls):
        y, _ = net(x)
        y.backward(torch.ones_like(y))
    (y, _), dy = net(x), torch.ones(LONG, N, H)
    dy.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"dy must have \d+ bytes of memory"):
        y.backward(dy)
