"""Our layers in torch's graph: gradients of gradients, hooks, checkpoints, frozen weights, what lives how long."""

import gc
import math
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedrnn import RNNSpec
from fusedrnn.spec import MODES
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance
from fusedrnn.torch import GRU, LSTM, RNN
from torch_layers import flat

T, N, I, H = 5, 3, 4, 6
DEEP = {"num_layers": 2, "bidirectional": True}
VERSION_ERROR = "modified by an inplace operation"


class Kinks(TorchDispatchMode):
    """How near to zero the inputs of ReLUs come."""

    nearest = math.inf

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.relu, torch.ops.aten.relu_):
            self.nearest = min(self.nearest, args[0].abs().min().item())
        return func(*args, **(kwargs or {}))


def loss_of(result, seed=0):
    """A number that depends on every element of a result, on each otherwise; not linearly."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for value in flat(result):
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        total = total + (value * weights + value.square()).sum()
    return total


class Case:
    """One of our layers, torch.nn's with the same weights in float64, and what to call them with.

    No pre-activation of a ReLU is so near to zero that ``margin`` could move it across.
    """

    def __init__(
        self, mode, sizes=(T, N, I, H), dtype=torch.float32, lengths=None, states=True, margin=None, **options
    ):
        self.mode, self.lengths, self.dtype, self.options = mode, lengths, dtype, options
        self.ours, self.plain = {"lstm": (LSTM, nn.LSTM), "gru": (GRU, nn.GRU)}.get(mode, (RNN, nn.RNN))
        if mode.startswith("rnn"):
            options["nonlinearity"] = mode[4:]
        self.T, self.N, self.I, self.H = sizes
        L, D = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
        self.spec = RNNSpec(mode, self.I, self.H, L, D == 2)
        if margin is None:
            margin = tolerance(np.float32, longest_sum(self.spec))[1]
        for seed in count():
            torch.manual_seed(seed)
            self.layer = self.ours(self.I, self.H, **options)
            self.oracle = self.plain(self.I, self.H, **options).double()
            self.oracle.load_state_dict(self.layer.state_dict())
            x = torch.randn(self.T, self.N, self.I)
            self.x = x.transpose(0, 1).contiguous() if options.get("batch_first") else x
            kinds = (2 if mode == "lstm" else 1) if states else 0
            self.states = [torch.rand(L * D, self.N, self.H) * 2 - 1 for _ in range(kinds)]
            with torch.no_grad(), Kinks() as kinks:
                self.call(self.oracle, *self.operands(torch.float64))
            if kinks.nearest > margin:
                break
        self.layer.to(dtype)

    def operands(self, dtype=None, requires_grad=False):
        """Input and initial states, new ones each time."""
        return [t.to(dtype or self.dtype).clone().requires_grad_(requires_grad) for t in (self.x, *self.states)]

    def call(self, layer, x, *states):
        data = x if self.lengths is None else pack_padded_sequence(x, torch.tensor(self.lengths))
        return layer(data, states if len(states) == 2 else states[0]) if states else layer(data)

    def run(self, *operands):
        return self.call(self.layer, *operands)

    def exact(self, loss=loss_of, times=1):
        """Gradients of operands and parameters by torch.nn: name to array."""
        operands = self.operands(torch.float64, requires_grad=True)
        parameters = dict(self.oracle.named_parameters())
        total = times * loss(self.call(self.oracle, *operands))
        actual = torch.autograd.grad(total, [*operands, *parameters.values()], materialize_grads=True)
        return dict(zip(self.names(operands), actual, strict=True))

    def names(self, operands):
        return [*("x", "h0", "c0")[: len(operands)], *(name for name, _ in self.layer.named_parameters())]

    def leaves(self, operands):
        return dict(zip(self.names(operands), [*operands, *self.layer.parameters()], strict=True))

    def check(self, actual, expected, sums=1):
        """Gradients by name against the exact ones; ``sums`` is how many backward passes stand behind one."""
        name = str(self.dtype).removeprefix("torch.")
        scale = max(tensor.abs().max().item() for tensor in expected.values())
        limits = gradient_tolerance(name, self.spec, self.T * sums, self.N, scale)
        for key, tensor in actual.items():
            message = difference(tensor.detach().numpy(), expected[key].detach().numpy(), *limits)
            assert message is None, f"gradient of {key}{message}"

    def check_grad(self, operands, expected, sums=1):
        """``.grad`` of all operands and parameters."""
        self.check({name: leaf.grad for name, leaf in self.leaves(operands).items()}, expected, sums)


@pytest.fixture(params=MODES)
def case(request):
    return Case(request.param, **DEEP)


# -- by finite differences --------------------------------------------------------------------------------------------

TINY = (3, 2, 2, 3)
VARIANTS = {
    "one layer": {"states": False},
    "states": {},
    "two layers, both ways": DEEP,
    "no bias": {"bias": False, "num_layers": 2},
    "packed": {"lengths": [3, 1], **DEEP},
    "batch first": {"batch_first": True},
}


@pytest.fixture(params=VARIANTS)
def tiny(request):
    def make(mode):
        # Far more than the steps of finite differences, 1e-6, can move anything.
        return Case(mode, TINY, torch.float64, margin=1e-3, **VARIANTS[request.param])

    return make


# Each variant with two modes, in turn; gradients alone are checked in all.
PAIRS = [(name, mode) for number, name in enumerate(VARIANTS) for mode in MODES[number % 2 :: 2]]


def differentiable(case):
    """A function for gradcheck, and its inputs: it changes them in place, parameters too."""
    operands = case.operands(requires_grad=True)

    def function(*inputs):
        return tuple(flat(case.run(*inputs[: len(operands)])))

    return function, (*operands, *case.layer.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, tiny):
    assert gradcheck(*differentiable(tiny(mode)))


@pytest.mark.parametrize(("tiny", "mode"), PAIRS, indirect=["tiny"])
def test_gradgradcheck(mode, tiny):
    """Along random directions: all elements would take minutes."""
    torch.manual_seed(0)
    assert gradgradcheck(*differentiable(tiny(mode)), fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_gradgradcheck_of_every_element(mode):
    assert gradgradcheck(*differentiable(Case(mode, (2, 1, 1, 2), torch.float64, margin=1e-3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_penalty(case, dtype):
    """A loss that contains the norm of a gradient."""
    case = Case(case.mode, dtype=dtype, **DEEP)

    def penalty(layer, operands):
        result = case.call(layer, *operands)
        (slope,) = torch.autograd.grad(loss_of(result), operands[0], create_graph=True)
        return loss_of(result, seed=1) + (slope.norm() - 1).square()

    exact = case.operands(torch.float64, requires_grad=True)
    leaves = [*exact, *case.oracle.parameters()]
    actual = torch.autograd.grad(penalty(case.oracle, exact), leaves)
    operands = case.operands(requires_grad=True)
    penalty(case.layer, operands).backward()
    # Forward, backward, and backward through both.
    case.check_grad(operands, dict(zip(case.names(exact), actual, strict=True)), sums=4)


# -- which gradients --------------------------------------------------------------------------------------------------


def test_all_gradients(case):
    operands = case.operands(requires_grad=True)
    loss_of(case.run(*operands)).backward()
    case.check_grad(operands, case.exact())


@pytest.mark.parametrize("which", [0, 1, 2], ids=["y", "h_n", "c_n"])
def test_a_loss_on_one_result(which):
    case = Case("lstm", **DEEP)

    def loss(result):
        return loss_of(flat(result)[which])

    operands = case.operands(requires_grad=True)
    loss(case.run(*operands)).backward()
    case.check_grad(operands, case.exact(loss))


NEEDED = {
    "x": lambda name: name == "x",
    "states": lambda name: name in ("h0", "c0"),
    "h0": lambda name: name == "h0",
    "one bias": lambda name: name == "bias_hh_l0",
    "one weight of the last layer": lambda name: name == "weight_ih_l1_reverse",
    "weights": lambda name: name.startswith("weight"),
    "biases": lambda name: name.startswith("bias"),
    "the second layer": lambda name: "_l1" in name,
    "one direction": lambda name: "_reverse" in name,
}


@pytest.mark.parametrize("needed", NEEDED)
def test_frozen_operands_get_no_gradient(case, needed):
    """The other gradients do not change."""
    operands = case.operands()
    leaves = case.leaves(operands)
    for name, leaf in leaves.items():
        leaf.requires_grad_(NEEDED[needed](name))
    loss_of(case.run(*operands)).backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    assert grads
    assert all(leaf.grad is None for leaf in leaves.values() if not leaf.requires_grad)
    case.check(grads, case.exact())


def test_autograd_grad_of_some_operands(case):
    """All leaves require gradients, and torch.autograd.grad returns those of some."""
    operands = case.operands(requires_grad=True)
    loss = loss_of(case.run(*operands))
    leaves, exact = case.leaves(operands), case.exact()
    for name in ("h0", "weight_hh_l1", "x"):
        case.check({name: torch.autograd.grad(loss, leaves[name], retain_graph=True)[0]}, exact)
    assert all(leaf.grad is None for leaf in leaves.values())


def test_weights_frozen_and_unfrozen(case):
    """A gradient that one call omits is computed again in the next."""
    exact = case.exact()
    for needed in (True, False, True):
        for parameter in case.layer.parameters():
            parameter.grad = None
            parameter.requires_grad_(needed)
        operands = case.operands(requires_grad=True)
        loss_of(case.run(*operands)).backward()
        assert all((parameter.grad is not None) == needed for parameter in case.layer.parameters())
        case.check({"x": operands[0].grad}, exact)
    case.check_grad(operands, exact)


# -- how often, in what order -----------------------------------------------------------------------------------------


def test_gradients_add_up(case):
    """Of three calls, into the same ``.grad``."""
    operands = case.operands(requires_grad=True)
    for _ in range(3):
        loss_of(case.run(*operands)).backward()
    case.check_grad(operands, case.exact(times=3), sums=3)


def test_repeated_backward_of_one_forward(case):
    """With retain_graph; without it the second raises torch's error."""
    operands = case.operands(requires_grad=True)
    loss = loss_of(case.run(*operands))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    case.check_grad(operands, case.exact(times=3), sums=3)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_two_forwards_before_their_backwards(case):
    """Two calls on other data, their backwards in both orders, and an inference between."""
    first, second = case.operands(requires_grad=True), case.operands(requires_grad=True)
    with torch.no_grad():
        second[0].mul_(-0.5)
    expected = []
    for operands in (first, second):
        expected.append(torch.autograd.grad(loss_of(case.run(*operands)), [*operands, *case.layer.parameters()]))
    for order in ((0, 1), (1, 0)):
        losses = [loss_of(case.run(*operands)) for operands in (first, second)]
        with torch.no_grad():
            case.run(*first)
        for index in order:
            actual = torch.autograd.grad(losses[index], [*(first, second)[index], *case.layer.parameters()])
            assert all(map(torch.equal, actual, expected[index]))
    case.check(dict(zip(case.names(first), expected[0], strict=True)), case.exact())


def test_calls_in_a_chain():
    """The states of one call go into the next, as in truncated backpropagation that is not yet truncated."""
    case = Case("gru", **DEEP)

    def twice(layer, x, h0):
        y, h_n = layer(x, h0)
        return (y, *layer(x.flip(0), h_n))

    exact = case.operands(torch.float64, requires_grad=True)
    leaves = [*exact, *case.oracle.parameters()]
    actual = torch.autograd.grad(loss_of(twice(case.oracle, *exact)), leaves)
    operands = case.operands(requires_grad=True)
    loss_of(twice(case.layer, *operands)).backward()
    case.check_grad(operands, dict(zip(case.names(exact), actual, strict=True)), sums=2)


@pytest.mark.parametrize("changed", ["weight_hh_l0", "bias_ih_l1", "x", "h0", "y", "h_n"])
def test_operands_changed_before_backward_raise_or_do_not_matter(case, changed):
    """Either torch's error about versions, or the gradients of the forward call."""
    operands = case.operands(requires_grad=True)
    inputs = [tensor * 1 for tensor in operands]  # leaves that require a gradient cannot be changed
    result = case.run(*inputs)
    loss = loss_of(result)
    named = {**case.leaves(inputs), "y": result[0], "h_n": flat(result)[1]}
    # The loss keeps the results themselves: only a loss that does not can tell what the node makes of the change.
    if changed in ("y", "h_n"):
        loss = sum((tensor * 1).sum() for tensor in flat(result))
    with torch.no_grad():
        named[changed].mul_(3.0)
    leaves = case.leaves(operands)
    try:
        actual = torch.autograd.grad(loss, list(leaves.values()))
    except RuntimeError as error:
        assert VERSION_ERROR in str(error)
        return
    exact = case.exact((lambda r: sum(tensor.sum() for tensor in flat(r))) if changed in ("y", "h_n") else loss_of)
    case.check(dict(zip(leaves, actual, strict=True)), exact)


@pytest.mark.parametrize("changed", ["weight_hh_l0", "weight_ih_l1_reverse", "bias_ih_l0", "x", "h0"])
def test_operands_changed_through_data_before_backward(case, changed):
    """Through ``.data``, which raises no error: the gradients of the forward that was, or torch.nn's; no mixture.

    Torch.nn goes back through the weights that it finds, and so may we, who pack none for calls as short as these.
    """
    actual = []
    for layer, dtype in ((case.layer, torch.float32), (case.oracle, torch.float64)):
        operands = case.operands(dtype, requires_grad=True)
        leaves = dict(zip(case.names(operands), [*operands, *layer.parameters()], strict=True))
        before = leaves[changed].detach().clone()
        loss = loss_of(case.call(layer, *operands))
        leaves[changed].data.mul_(3.0)
        loss_of(case.call(layer, *operands)).backward()
        actual.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
        leaves[changed].data.copy_(before)
    try:
        case.check(actual[0], case.exact())
    except AssertionError:
        case.check(*actual)


def test_python_threads_train_at_once(case):
    """Forward and backward of one layer in several Python threads: each gets what it gets alone."""
    def gradients(index):
        operands = case.operands(requires_grad=True)
        loss = loss_of(case.run(operands[0] * (index + 1), *operands[1:]))
        start.wait()
        return [torch.autograd.grad(loss, list(case.leaves(operands).values()), retain_graph=True) for _ in range(5)]

    start = Barrier(1)
    alone = [gradients(index)[0] for index in range(4)]
    start = Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        for expected, actual in zip(alone, pool.map(gradients, range(4)), strict=True):
            for tensor in actual:
                assert all(map(torch.equal, tensor, expected))


# -- no graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, mode):
    recorded = flat(case.run(*case.operands()))
    assert all(tensor.requires_grad for tensor in recorded)
    with mode():
        results = flat(case.run(*case.operands()))
    for tensor, other in zip(results, recorded, strict=True):
        assert not tensor.requires_grad
        assert tensor.is_inference() == (mode is torch.inference_mode)
        message = difference(
            tensor.numpy(), other.detach().numpy(), *tolerance(np.float32, longest_sum(case.spec))
        )
        assert message is None, message


def test_without_operands_that_require_gradients(case):
    for parameter in case.layer.parameters():
        parameter.requires_grad_(False)
    assert not any(tensor.requires_grad for tensor in flat(case.run(*case.operands())))


def test_inference_tensors_as_input(case):
    """As in torch.nn: allowed where nothing is recorded, else an error, because they cannot be saved."""
    with torch.inference_mode():
        operands = case.operands()
    with torch.no_grad():
        expected = flat(case.run(*case.operands()))
        assert all(map(torch.equal, flat(case.run(*operands)), expected))
    try:
        loss_of(case.run(*operands)).backward()
    except RuntimeError as error:
        assert "Inference tensors cannot be saved for backward" in str(error)
        return
    exact = case.exact()
    case.check({name: tensor.grad for name, tensor in case.layer.named_parameters()}, exact)


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_on_tensors(case):
    """Each is called once with the gradient, and what it returns replaces the gradient."""
    operands = case.operands(requires_grad=True)
    seen = []
    result = case.run(*operands)
    y, h_n = flat(result)[:2]
    for tensor, name in ((y, "y"), (h_n, "h_n"), (operands[0], "x"), (case.layer.weight_ih_l0, "weight_ih_l0")):
        tensor.register_hook(lambda gradient, name=name: seen.append(name) or 2 * gradient)
    for name, parameter in case.layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    loss_of([y, h_n]).backward()
    parameters = [name for name, _ in case.layer.named_parameters()]
    assert sorted(seen) == sorted(["y", "h_n", "x", "weight_ih_l0", *parameters])
    # All that comes in was doubled, and two of what goes out.
    exact = case.exact(lambda result: loss_of(flat(result)[:2]), times=2)
    for name in ("x", "weight_ih_l0"):
        exact[name] = 2 * exact[name]
    case.check_grad(operands, exact)


def test_hooks_on_modules(case):
    """Backward hooks get the same gradients as those of torch.nn's layer."""
    def gradients(layer, dtype):
        seen = []
        handles = [
            layer.register_full_backward_pre_hook(lambda _, grads: seen.extend(grads)),
            layer.register_full_backward_hook(lambda _, dx, dy: seen.extend((*dx, *dy))),
        ]
        operands = case.operands(dtype, requires_grad=True)
        loss_of(case.call(layer, *operands)).backward()
        for handle in handles:
            handle.remove()
        return {str(index): tensor for index, tensor in enumerate(seen) if tensor is not None}

    actual, expected = gradients(case.layer, torch.float32), gradients(case.oracle, torch.float64)
    assert actual.keys() == expected.keys()
    assert actual
    case.check(actual, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode(case):
    operands = case.operands(requires_grad=True)
    with torch.autograd.detect_anomaly():
        loss_of(case.run(*operands)).backward()
        case.check_grad(operands, case.exact())
        y = case.run(*operands)[0]
        with pytest.raises(RuntimeError, match="returned nan values"):
            y.backward(torch.full_like(y, math.nan))


# -- saved tensors ---------------------------------------------------------------------------------------------------


class Box:
    """Holds a saved tensor; whoever keeps the graph keeps this."""

    def __init__(self, tensor):
        self.tensor = tensor


def boxed(boxes):
    """Hooks that put what is saved into boxes, weak references to which go into the list."""
    def pack(tensor):
        box = Box(tensor.detach())
        boxes.append((weakref.ref(box), tensor.dtype, tensor.nbytes))
        return box

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor)


def test_saved_tensors_hooks(case):
    """The reserve passes through them, and lives as long as the graph: until backward frees it or it is deleted."""
    gc.collect()
    gc.disable()  # nothing waits for the collector
    try:
        for end in ("backward", "retained", "dropped"):
            boxes = []
            case.layer.zero_grad()
            operands = case.operands(requires_grad=True)
            with boxed(boxes):
                result = case.run(*operands)
            assert any(dtype == torch.uint8 and size > 4 * T * N * H for _, dtype, size in boxes)
            assert all(box() is not None for box, *_ in boxes)
            if end != "dropped":
                # The results still exist, the loss does not: they must not keep the saved tensors.
                loss_of(result).backward(retain_graph=end == "retained")
                case.check_grad(operands, case.exact())
            assert any(box() is not None for box, *_ in boxes) == (end != "backward")
            del result
            assert all(box() is None for box, *_ in boxes)
    finally:
        gc.enable()


@pytest.mark.parametrize("T", [3, 40], ids=["unpacked", "packed"])
def test_hooks_return_saved_bytes_with_other_strides(T):
    """The third call and its backward are prepared ones."""
    layer, x = LSTM(16, 32), torch.randn(T, 4, 16)

    def grads(unpack):
        layer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            layer(x)[0].square().sum().backward()
        return [p.grad for p in layer.parameters()]

    expected = grads(lambda tensor: tensor)
    for _ in range(4):
        actual = grads(lambda tensor: torch.stack([tensor, tensor], -1)[..., 0])
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda saved: saved[:-1], lambda saved: saved.to("meta")])
@pytest.mark.parametrize("T", [3, 40], ids=["unpacked", "packed"])
def test_hooks_that_return_other_bytes_are_an_error(T, change):
    layer, x = LSTM(16, 32), torch.randn(T, 4, 16)

    def unpack(saved):
        return change(saved) if saved.dtype is torch.uint8 else saved

    for _ in range(4):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            y, _ = layer(x)
        with pytest.raises(RuntimeError, match="a hook on saved tensors must return"):
            y.sum().backward()


def test_save_on_cpu(case):
    operands = case.operands(requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(case.run(*operands))
    loss.backward()
    case.check_grad(operands, case.exact())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("mode", MODES)
def test_checkpoint(mode, reentrant):
    """The gradients have the same bits: the same elements are dropped again."""
    case = Case(mode, dropout=0.5, **DEEP)

    def gradients(run):
        torch.manual_seed(7)
        operands = case.operands(requires_grad=True)
        loss = loss_of(run(*operands)[0])
        torch.rand(3)  # what is drawn between must not matter
        case.layer.zero_grad()
        loss.backward()
        return [leaf.grad for leaf in case.leaves(operands).values()]

    plain = gradients(case.run)
    again = gradients(lambda *operands: checkpoint(case.run, *operands, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))
    other = gradients(lambda *operands: (torch.rand(1), case.run(*operands))[1])
    assert not torch.equal(plain[0], other[0])  # the elements dropped do depend on torch's generator


# Graphs of which many are held at once. Peaks of memory only grow, so that what must take little goes first.
PEAKS = """
import resource, sys, torch
from torch.utils.checkpoint import checkpoint
from fusedrnn.torch import LSTM

T, N, H, COUNT = 100, 32, 64, 30
torch.manual_seed(0)
torch.set_num_threads(1)
layer, x = LSTM(H, H), torch.randn(T, N, H)

def peak():
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024

def dropped(tensor):
    return None if tensor.nbytes > T * N * H else tensor

def hooked():
    with torch.autograd.graph.saved_tensors_hooks(dropped, lambda tensor: tensor):
        return layer(x)

runs = {
    "dropped": hooked,
    "checkpoint": lambda: checkpoint(layer, x, use_reentrant=False),
    "plain": lambda: layer(x),
}
runs["checkpoint"]()[0].sum().backward()

# Memory that was once in use, and is not now, would hide what is measured.
ballast, before = [], peak()
while peak() < before + (4 << 20):
    ballast.append(torch.ones(1 << 18))

grown = {}
for name, run in runs.items():
    before = peak()
    held = [run() for _ in range(COUNT)]
    grown[name] = (peak() - before) / COUNT / (T * N * H * 4)
    del held
# In arrays as large as y, which is one of them. Saved of each step: its input, two states, four gates.
assert grown["plain"] > 7, grown
assert grown["dropped"] < 2, grown
assert grown["checkpoint"] < 2, grown
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_all_memory_of_a_forward_is_in_saved_tensors():
    """Hooks and checkpoints see all of it: the node holds nothing else that is large.

    The results are held, too, because malloc cannot always use the memory that is freed between them.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-W", "error", "-c", PEAKS], check=True, timeout=120, env=environment)
