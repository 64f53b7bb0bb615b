"""autocast on the CPU: the operator, with results in the dtypes of torch.nn's modules."""

import itertools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn.torch
from fusedrnn import cells
from torch_layers import CELLS, KINDS, LAYERS, first, flat, make_pair

I, H, T, N = 6, 17, 7, 3
DTYPES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *DTYPES]
# The rounding of operands at each of the steps, and of the results.
BOUND = {torch.bfloat16: 8 * 2.0**-8, torch.float16: 8 * 2.0**-11}


def input_of(kind, dtype=torch.float32):
    return torch.randn((N, I) if kind in CELLS else (T, N, I)).to(dtype)


def states_of(kind, dtype):
    shape = (N, H) if kind in CELLS else (1, N, H)
    states = tuple(torch.randn(shape).to(dtype) / 2 for _ in range(2))
    return states if "LSTM" in kind else states[0]


def without_onednn(error):
    """Whether torch.nn's LSTM is a function of oneDNN in a format that this processor lacks."""
    return "could not create a primitive descriptor for the LSTM" in str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_their_dtypes(kind, dtype, runs):
    """As torch.nn's for input and states of any dtype, and near the float32 results."""
    ours, plain = make_pair(kind, I, H)
    for x_dtype, state_dtype in itertools.product(FLOATS, [None, *FLOATS]):
        x = input_of(kind, x_dtype)
        hx = () if state_dtype is None else (states_of(kind, state_dtype),)
        with torch.no_grad():
            with torch.autocast("cpu", dtype):
                actual = flat(ours(x, *hx))
            exact_hx = [tuple(s.float() for s in h) if isinstance(h, tuple) else h.float() for h in hx]
            for a, e in zip(actual, flat(plain(x.float(), *exact_hx)), strict=True):
                torch.testing.assert_close(a.float(), e, rtol=0, atol=BOUND[dtype])
            with torch.autocast("cpu", dtype):
                try:
                    dtypes = [e.dtype for e in flat(plain(x, *hx))]
                except RuntimeError as error:
                    assert without_onednn(error)
                    dtypes = [dtype] * 3
            assert [a.dtype for a in actual] == dtypes
    assert len(runs) == 12
    assert {spec.compute for spec in runs} == {"bfloat16" if dtype is torch.bfloat16 else None}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["packed", "projected", "packed and projected", "oneDNN off"])
def test_dtypes_of_an_lstm_without_onednn(what, dtype, runs):
    """torch.nn's results then depend on the dtype of the states; h is a product if projected."""
    size = 5 if "projected" in what else H
    ours, plain = make_pair("LSTM", I, H, proj_size=size % H)
    for x_dtype, state_dtype in itertools.product(FLOATS, [None, *FLOATS]):
        x = torch.randn(T, N, I, dtype=x_dtype)
        hx = () if state_dtype is None else (tuple(torch.zeros(1, N, n, dtype=state_dtype) for n in (size, H)),)
        x = pack_padded_sequence(x, torch.tensor([7, 5, 2])) if "packed" in what else x
        with torch.autocast("cpu", dtype), torch.backends.mkldnn.flags(enabled=what != "oneDNN off"):
            (y, actual), (expected_y, expected) = ours(x, *hx), plain(x, *hx)
        y, expected_y = (sequence.data for sequence in (y, expected_y))
        assert [t.dtype for t in (y, *actual)] == [t.dtype for t in (expected_y, *expected)]
    assert len(runs) == 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_training(kind, dtype, inside):
    """Gradients are float32, of a backward in the context or outside of it."""
    ours, plain = make_pair(kind, I, H)
    x = input_of(kind).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = first(ours(x))
        if inside:
            actual = torch.autograd.grad(y.float().pow(2).sum(), [x, *ours.parameters()])
    if not inside:
        actual = torch.autograd.grad(y.float().pow(2).sum(), [x, *ours.parameters()])
    expected = torch.autograd.grad(first(plain(x)).pow(2).sum(), [x, *plain.parameters()])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=0, atol=2 * BOUND[dtype] * float(e.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_values(kind):
    """The autocast of the CPU does not concern them, as with torch.nn."""
    for module in make_pair(kind, I, H):
        with torch.autocast("cpu", torch.bfloat16):
            assert first(module.to("meta")(input_of(kind).to("meta"))).dtype == torch.float32


def test_gradients_of_gradients_under_autocast():
    """They do not depend on the context in which they are computed."""
    net, x = fusedrnn.torch.GRU(I, H), input_of("GRU").requires_grad_()

    def second():
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return dx

    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)[0]
        inside = second()
    assert torch.equal(inside, second())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_of_different_lengths(kind, dtype, runs):
    net = getattr(fusedrnn.torch, kind)(I, H, 2, bidirectional=True)
    x, lengths = input_of(kind), torch.tensor([4, 7, 1])
    with torch.no_grad(), torch.autocast("cpu", dtype):
        padded, final = net(x, lengths=lengths)
        packed, packed_final = net(pack_padded_sequence(x, lengths, enforce_sorted=False))
        assert torch.equal(pad_packed_sequence(packed)[0], padded)
        assert all(map(torch.equal, flat(final), flat(packed_final)))
        net.batch_first = True
        assert torch.equal(net(x.transpose(0, 1), lengths=lengths)[0], padded.transpose(0, 1))
    assert len(runs) == 3 and padded.dtype == (dtype if kind == "RNN" else torch.float32)


def test_a_format_of_the_module_holds(runs):
    net = fusedrnn.torch.GRU(I, H, compute="int8").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = net(input_of("GRU"))[0]
    assert runs[0].compute == "int8" and y.dtype == torch.float32


@pytest.mark.parametrize("low", DTYPES)
def test_modules_of_the_contexts_dtype(low, runs):
    ours, plain = (net.to(low) for net in make_pair("GRU", I, H))
    x = input_of("GRU", low)
    with torch.no_grad(), torch.autocast("cpu", low):
        actual, expected = ours(x)[0], plain(x)[0]
    assert actual.dtype == expected.dtype == low and runs
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND[low])


def test_float64_is_not_converted(runs):
    ours, plain = make_pair("GRU", I, H, dtype=torch.float64)
    x = input_of("GRU", torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x)[0], plain(x)[0]) and not runs


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own forward mode calls it
@pytest.mark.parametrize("cell", ["gru", "lstm", cells.slstm], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_layer_in_transforms(cell, dtype):
    """The eager results and their dtypes."""
    net, x = fusedrnn.torch.Layer(cell, I, H), torch.randn(T, N, I).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)[0].detach()
        batched = torch.vmap(lambda x: net(x)[0], 1, 1)(x)
        pushed, _ = torch.func.jvp(lambda x: net(x)[0], (x,), (x,))
        called = torch.vmap(lambda p: torch.func.functional_call(net, p, (x,))[0])(
            {name: parameter.detach()[None] for name, parameter in net.named_parameters()}
        )
    for result in (batched, pushed, called[0]):
        torch.testing.assert_close(result.detach(), y, rtol=2.0**-6, atol=2.0**-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_on_another_device():
    """The autocast of the input's device counts."""
    net, x = fusedrnn.torch.Layer("gru", I, H, device="cuda"), torch.randn(T, N, I, device="cuda")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"^input must have dtype"):
        net(x.bfloat16())
    with torch.autocast("cuda", torch.bfloat16):
        y, h_n = net(x.bfloat16(), torch.zeros(1, N, H, device="cuda"))
    assert (y.dtype, h_n.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y, net(x)[0], rtol=0, atol=BOUND[torch.bfloat16])


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_compile(kind, dtype):
    """One graph, the same bits, in training too."""
    net, x = getattr(fusedrnn.torch, kind)(I, H), input_of(kind)

    def call(x):
        with torch.autocast("cpu", dtype):
            return net(x)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = [flat(function(x)) for function in (call, compiled)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    grads = [torch.autograd.grad(y.float().sum(), list(net.parameters())) for y, *_ in results]
    assert all(map(torch.equal, *grads))


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.parametrize("enabled", [True, False])
def test_a_compiled_lstm_without_onednn(enabled):
    net, x = fusedrnn.torch.LSTM(I, H).requires_grad_(False), input_of("LSTM")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.backends.mkldnn.flags(enabled=enabled):
        for a, b in zip(flat(compiled(x)), flat(net(x)), strict=True):
            assert a.dtype == b.dtype == (torch.bfloat16 if enabled else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_compiled_lstm_after_a_layer_in_half_precision(dtype, requires_grad):
    """One graph: whether oneDNN has instructions for the dtype is a constant."""
    net = torch.nn.Sequential(torch.nn.Linear(I, I), fusedrnn.torch.LSTM(I, H), First(), fusedrnn.torch.LSTM(H, H))
    net, x = net.requires_grad_(requires_grad), input_of("LSTM")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        for a, b in zip(flat(compiled(x)), flat(net(x)), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


class First(torch.nn.Module):
    """The output of a layer."""

    def forward(self, results):
        return results[0]


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_traced_graphs(kind):
    net, x = getattr(fusedrnn.torch, kind)(I, H).requires_grad_(False), input_of(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected, graph = net(x), make_fx(net)(x)
    assert all(map(torch.equal, flat(graph(x)), flat(expected)))


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in LAYERS), ("LSTM", {"proj_size": 5})], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [False, True], ids=["float32 input", "low input"])
def test_programs_made_without_autocast(kind, options, dtype, low):
    """What the module gives."""
    net = getattr(fusedrnn.torch, kind)(I, H, 2, bidirectional=True, bias=False, **options).requires_grad_(False)
    x = input_of(kind)
    program = torch.export.export(net, (x,)).module()
    x = x.to(dtype) if low else x
    with torch.autocast("cpu", dtype):
        for a, b in zip(flat(program(x)), flat(net(x)), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype
