"""Outputs and operands changed in place, as torch.nn allows it: results and gradients, or torch.nn's error."""

from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn.torch
from torch_layers import CELLS, KINDS, LAYERS, flat

FORMS = [
    *product(LAYERS, ("batched", "unbatched", "batch_first", "packed")),
    *product(CELLS, ("batched", "unbatched")),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small calls: threads would take longer to start than they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(package, kind, *args, dtype=torch.float64, **options):
    """A module with the same parameters in either package."""
    torch.manual_seed(0)
    return getattr(package, kind)(*args, dtype=dtype, **options)


def outputs(package, kind, form, x, grad):
    """A module's results as a list, and its parameters."""
    options = {} if kind in CELLS else {"batch_first": form == "batch_first"}
    net = make(package, kind, 3, 4, **options)
    if kind in CELLS:
        x = x[0, 0] if form == "unbatched" else x[0]
    elif form == "unbatched":
        x = x[:, 0]
    elif form == "packed":
        x = pack_padded_sequence(x, [5, 3])
    with torch.set_grad_enabled(grad):
        return flat(net(x)), list(net.parameters())


# -- outputs ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "detach_": lambda y: y.detach_(),
    "mul_": lambda y: y.mul_(2.0),
    "add_": lambda y: y.add_(1.0),
    "relu_": lambda y: y.relu_(),
    "zero a part": lambda y: y[..., :2].zero_(),
    "set an item": lambda y: y.__setitem__((..., 0), 7.0),
    "requires_grad_": lambda y: y.requires_grad_(),
    "squeeze_": lambda y: y.unsqueeze_(0).squeeze_(0),
}


def changed(package, kind, form, x, change, which, grad, clone=False):
    """All results after a change of one, and the gradients of a function of them; or the error's type."""
    results, parameters = outputs(package, kind, form, x, grad)
    if clone:
        results = [tensor.clone() for tensor in results]
    try:
        CHANGES[change](results[which])
        loss = sum((tensor * (i + 1)).sin().sum() for i, tensor in enumerate(results))
        gradients = ()
        if loss.requires_grad and grad:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        return str(error).split(".")[0]
    return [(tensor.requires_grad, tensor.detach()) for tensor in results], gradients


@pytest.mark.each_value
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_outputs_changed_in_place(kind, form):
    """Torch.nn raises if its backward needs the output; else the result equals that of a changed copy."""
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    count = len(outputs(torch.nn, kind, form, x, False)[0])
    for change, which, grad in product(CHANGES, range(count), (True, False)):
        ours, torch_outcome, exact = (
            changed(package, kind, form, x, change, which, grad, clone)
            for package, clone in ((fusedrnn.torch, False), (torch.nn, False), (torch.nn, True))
        )
        where = f"{change} of result {which}, recorded: {grad}"
        if isinstance(torch_outcome, str) and isinstance(ours, str):
            assert ours == torch_outcome, where
            continue
        assert isinstance(torch_outcome, str) or not isinstance(ours, str), f"{where}: {ours}"
        torch.testing.assert_close(ours, exact, msg=where)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_backpropagation_detaches_in_place(kind):
    """Through a state that is used, detached and used again; also under a dispatch mode."""
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def train(package, in_place):
        net = make(package, kind, 3, 4) if kind in CELLS else make(package, kind, 3, 4, batch_first=True)
        states, losses = None, []
        for chunk in x.chunk(3):
            result = net(chunk[0], states) if kind in CELLS else net(chunk.transpose(0, 1), states)
            losses.append(flat(result)[0].sin().sum())
            losses[-1].backward()
            tensors = [tensor.detach_() if in_place else tensor.detach() for tensor in flat(result)]
            states = tensors if kind in CELLS else tensors[1:]
            states = tuple(states) if kind.startswith("LSTM") else states[0]
        return [loss.detach() for loss in losses], [p.grad for p in net.parameters()]

    expected = train(torch.nn, in_place=False)
    torch.testing.assert_close(train(fusedrnn.torch, in_place=True), expected)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(train(fusedrnn.torch, in_place=True), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_in_inference_mode(kind):
    net = getattr(fusedrnn.torch, kind)(3, 4)
    x = torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)
    with torch.inference_mode():
        for tensor in flat(net(x)):
            expected = tensor * 2
            tensor.detach_()
            assert torch.equal(tensor.mul_(2), expected)


# -- operands ---------------------------------------------------------------------------------------------------------

# Layers, both directions, T, N: a few rows, for which backward reads the weights as they lie, and more.
SHAPES = [(1, False, 3, 2), (1, True, 1, 2), (2, True, 3, 2), (2, False, 5, 33)]
FROZEN = {
    "none": lambda name: False,
    "all but biases": lambda name: "bias" not in name,
    "biases": lambda name: "bias" in name,
    "the first layer": lambda name: "l0" in name or name == "weight_ih",
    "input weights": lambda name: "weight_ih" in name,
    "recurrent weights": lambda name: "weight_hh" in name,
    "all": lambda name: True,
}


def gradients(package, kind, shape, x_needed, h_needed, frozen, change, dtype=torch.float64, autocast=False):
    """The gradients after one operand has changed in place since forward; the error if autograd refuses; else None."""
    layers, both, steps, batch = shape
    cell = kind in CELLS
    options = {} if cell else {"num_layers": layers, "bidirectional": both}
    net = make(package, kind, 3, 4, dtype=dtype, **options)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    x = torch.randn((batch, 3) if cell else (steps, batch, 3), dtype=dtype, requires_grad=x_needed)
    lead = () if cell else (layers * (1 + both),)
    states = []
    if h_needed is not None:
        count = 2 if kind.startswith("LSTM") else 1
        states = [torch.randn(*lead, batch, 4, dtype=dtype, requires_grad=h_needed) for _ in range(count)]
    # Leaves that need a gradient cannot be changed.
    operands = [tensor * 1 for tensor in (x, *states)]
    hx = None if not states else operands[1] if len(states) == 1 else tuple(operands[1:])
    with torch.autocast("cpu", torch.bfloat16, autocast):
        results = flat(net(operands[0], hx))
    loss = sum((tensor * (i + 1)).sum() for i, tensor in enumerate(results))
    changeable = dict(zip(("x", "h0", "c0"), operands, strict=False)) | dict(net.named_parameters())
    if not loss.requires_grad or (change is not None and change not in changeable):
        return None
    if change is not None:
        with torch.no_grad():
            changeable[change].mul_(0.5)
    needed = [tensor for tensor in (x, *states, *net.parameters()) if tensor.requires_grad]
    try:
        actual = torch.autograd.grad(loss, needed, allow_unused=True)
    except RuntimeError as error:
        # Where a state needs a gradient, torch.nn takes it apart by unbind, whose views refuse any change of the whole.
        assert "modified by an inplace operation" in str(error) or "Unbind" in str(error)
        return "refused for its views" if "Unbind" in str(error) else "refused"
    return [torch.zeros_like(tensor) if each is None else each for tensor, each in zip(needed, actual, strict=True)]


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("kind", "shape"), [*product(LAYERS, SHAPES), *((kind, (1, False, 1, 2)) for kind in CELLS)], ids=str
)
def test_operands_changed_before_backward(kind, shape):
    """For each set of gradients and each changed operand: the error or the result of torch.nn."""
    names = [name for name, _ in make(torch.nn, kind, 3, 4, *(() if kind in CELLS else shape[:1])).named_parameters()]
    if kind not in CELLS and shape[1]:
        names += [f"{name}_reverse" for name in names]
    outcomes = set()
    patterns = ("none", "biases", "the first layer") if shape[0] > 1 else FROZEN
    for x_needed, h_needed, frozen in product((False, True), (None, True), patterns):
        for change in ("x", "h0", "c0", *names):
            torch_outcome = gradients(torch.nn, kind, shape, x_needed, h_needed, frozen, change)
            if torch_outcome is None:
                continue
            ours = gradients(fusedrnn.torch, kind, shape, x_needed, h_needed, frozen, change)
            where = f"x: {x_needed}, states: {h_needed}, frozen: {frozen}, changed: {change}"
            if torch_outcome == "refused for its views" and ours != "refused":
                torch_outcome = gradients(torch.nn, kind, shape, x_needed, h_needed, frozen, None)
            if "refused" in (ours, torch_outcome):
                assert ours == torch_outcome or torch_outcome == "refused for its views", where
            else:
                torch.testing.assert_close(ours, torch_outcome, msg=where)
            outcomes.add(ours == "refused")
    assert outcomes == {False, True}


LOW_PRECISION = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]


@pytest.mark.one_value("kind")
@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # of the flags of oneDNN
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "autocast"), LOW_PRECISION)
def test_low_precision_operands_changed_before_backward(kind, dtype, autocast):
    """The error where torch.nn raises one, which under autocast multiplies copies; else the gradients of forward."""
    shape, options = (1, False, 1 if kind in CELLS else 3, 2), (dtype, autocast)
    names = [name for name, _ in make(torch.nn, kind, 3, 4).named_parameters()]
    outcomes = set()
    for x_needed, h_needed in ((False, None), (True, None), (False, False), (True, True)):
        torch.manual_seed(1)
        unchanged = gradients(fusedrnn.torch, kind, shape, x_needed, h_needed, "none", None, *options)
        for change in ("x", "h0", "c0", *names):
            with torch.backends.mkldnn.flags(enabled=False):  # oneDNN's LSTM is another function on some processors
                expected = gradients(torch.nn, kind, shape, x_needed, h_needed, "none", change, *options)
            torch.manual_seed(1)
            ours = gradients(fusedrnn.torch, kind, shape, x_needed, h_needed, "none", change, *options)
            where = f"x: {x_needed}, states: {h_needed}, changed: {change}"
            if expected != "refused for its views":
                assert (ours == "refused") == (expected == "refused"), where
            if isinstance(ours, list):
                torch.testing.assert_close(ours, unchanged, rtol=0, atol=0, msg=where)
            outcomes.add((change, ours == "refused"))
    recurrent, bias = names[1:3]
    assert ((recurrent, True) in outcomes) != autocast and (bias, False) in outcomes
