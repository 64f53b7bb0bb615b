"""torch.export: one operator for a layer, any T and N, programs that are saved, loaded and trained."""

import io

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from fusedrnn import torch as fused
from fusedrnn.torch import custom_op as ops
from fusedrnn.torch.plan import current_weights
from taggers import H, I, Tagger

LAYERS = {"LSTM": fused.LSTM, "GRU": fused.GRU, "RNN": fused.RNN}
SIZES = ((3, 2), (9, 5), (2, 7), (31, 4), (17, 17))
OP = "fusedrnn.rnn.default"

# torch.export copies a class that torch deprecates, and sees torch.nn's modules write their own attributes.
pytestmark = [
    pytest.mark.one_value("kind"),  # of one operator, whatever the kind
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*_flat_weights.* were assigned during export:UserWarning"),
]

layer = pytest.mark.parametrize("kind", LAYERS)


def ops_in(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.each_value
@layer
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export(kind, strict, training):
    tagger = Tagger(LAYERS[kind](I, H, 2, bidirectional=True, dropout=0.5 * training)).train(training)
    dynamic = {"x": {0: torch.export.Dim("T", min=2, max=500), 1: torch.export.Dim("N", min=2, max=60)}}
    program = torch.export.export(tagger, (torch.randn(6, 3, 3),), dynamic_shapes=dynamic, strict=strict)
    assert ops_in(program).count(OP) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert ops_in(loaded).count(OP) == 1
    assert ops_in(loaded.run_decompositions()).count(OP) == 1
    for T, N in SIZES:
        x = torch.randn(T, N, 3)
        torch.manual_seed(1)
        expected = program.module()(x)
        torch.manual_seed(1)
        actual = loaded.module()(x)
        assert all(map(torch.equal, tree_leaves(actual), tree_leaves(expected)))
        if not training:
            assert all(map(torch.equal, tree_leaves(actual), tree_leaves(tagger(x))))


@layer
def test_exported_programs_train(kind):
    tagger = Tagger(LAYERS[kind](I, H))
    module = torch.export.export(tagger, (torch.randn(6, 3, 3),)).module()
    x = torch.randn(6, 3, 3, requires_grad=True)
    gradients = []
    for model in (module, tagger):
        loss = sum((t * t).sum() for t in tree_leaves(model(x)))
        gradients.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    assert len(gradients[0]) == len(gradients[1])
    assert all(map(torch.equal, *gradients))


# -- decomposition tables ---------------------------------------------------------------------------------------------


def test_torchs_decomposition_tables_do_not_contain_the_operator():
    """Not even after an export to ONNX, which decomposes the operator."""
    net = fused.GRU(I, H).eval()
    torch.onnx.export(net, (torch.randn(6, 3, I),), dynamo=True, verbose=False)
    for table in torch._decomp.global_decomposition_table.values():
        assert not [operator for operator in table if "fusedrnn" in str(operator)]


@pytest.mark.parametrize("kind", [*LAYERS, "GRUCell", "LSTMCell", "RNNCell"])
def test_decomposition_by_torchs_table_keeps_the_operator(kind):
    net = getattr(fused, kind)(I, H).requires_grad_(False)
    x = torch.randn((3, I) if kind.endswith("Cell") else (6, 3, I))
    expected = tree_leaves(net(x))
    graph = make_fx(lambda x: tree_leaves(net(x)), decomposition_table=torch._decomp.decomposition_table)(x)
    program = torch.export.export(net, (x,)).run_decompositions(dict(torch._decomp.decomposition_table))
    for actual in (graph(x), tree_leaves(program.module()(x))):
        assert all(map(torch.equal, actual, expected))
    assert "fusedrnn.rnn.default" in ops_in(program)


# -- other dtypes -----------------------------------------------------------------------------------------------------


def programs(kind, **options):
    """Those of our module and of torch.nn's, with the same parameters; and the modules."""
    modules = [getattr(space, kind)(I, H, **options) for space in (fused, nn)]
    modules[1].load_state_dict(modules[0].state_dict())
    return *(torch.export.export(module, (torch.randn(6, 3, I),)).module() for module in modules), *modules


@layer
def test_programs_in_float64(kind):
    ours, _, _, torch_program = programs(kind, num_layers=2, bidirectional=True)
    x = torch.randn(6, 3, I, dtype=torch.float64)
    for actual, expected in zip(tree_leaves(ours.double()(x)), tree_leaves(torch_program.double()(x)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["LSTM"])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("data", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_programs_refuse_another_dtype(kind, weights, data):
    """The error names both dtypes, as that of torch.nn's programs does."""
    ours = programs(kind)[0].to(weights)
    x = torch.randn(6, 3, I).to(data)
    if weights == data and data in (torch.float32, torch.float64):
        assert tree_leaves(ours(x))[0].dtype == data
        return
    with pytest.raises(RuntimeError, match="dtype"):
        ours(x)


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_lengths_and_packed_sequences_under_autocast(kind):
    net = LAYERS[kind](I, H, 2, bidirectional=True).requires_grad_(False)
    lengths, x = torch.tensor([2, 6, 3]), torch.randn(6, 3, I)
    program = torch.export.export(net, (x,), {"lengths": lengths}).module()
    order = torch.tensor([6, 3, 2])
    packed = pack_padded_sequence(x, order)
    weights = current_weights(net, net._plan(torch.float32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, expected in zip(program(x, lengths=lengths), net(x, lengths=lengths), strict=True):
            assert torch.equal(actual, expected)
        y, final = ops.run(net._plan(torch.float32).spec, packed.data, None, weights, batch_sizes=packed.batch_sizes)
        expected, last = net(packed)
        assert torch.equal(y, expected.data) and torch.equal(final[0], last)
