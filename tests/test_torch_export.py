"""torch.export: one operator for a layer, any T and N, programs that are saved, loaded and trained."""

import io

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from fusedrnn import torch as fused
from taggers import H, I, Tagger

LAYERS = {"LSTM": fused.LSTM, "GRU": fused.GRU, "RNN": fused.RNN}
SIZES = ((3, 2), (9, 5), (2, 7), (31, 4), (17, 17))
OP = "fusedrnn.rnn.default"

# torch.export copies a class that torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

layer = pytest.mark.parametrize("kind", LAYERS)


def ops_in(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


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
        given = loaded.module()(x)
        assert all(map(torch.equal, tree_leaves(given), tree_leaves(expected)))
        if not training:
            assert all(map(torch.equal, tree_leaves(given), tree_leaves(tagger(x))))


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


def test_torchs_tables_of_decompositions_have_none_of_ours():
    """Not even after an export to ONNX, for which the operator is decomposed."""
    net = fused.GRU(I, H).eval()
    torch.onnx.export(net, (torch.randn(6, 3, I),), dynamo=True, verbose=False)
    for table in torch._decomp.global_decomposition_table.values():
        assert not [operator for operator in table if "fusedrnn" in str(operator)]


@pytest.mark.parametrize("kind", [*LAYERS, "GRUCell", "LSTMCell", "RNNCell"])
def test_decomposing_by_torchs_table_keeps_the_operator(kind):
    net = getattr(fused, kind)(I, H).requires_grad_(False)
    x = torch.randn((3, I) if kind.endswith("Cell") else (6, 3, I))
    expected = tree_leaves(net(x))
    graph = make_fx(lambda x: tree_leaves(net(x)), decomposition_table=torch._decomp.decomposition_table)(x)
    program = torch.export.export(net, (x,)).run_decompositions(dict(torch._decomp.decomposition_table))
    for found in (graph(x), tree_leaves(program.module()(x))):
        assert all(map(torch.equal, found, expected))
    assert "fusedrnn.rnn.default" in ops_in(program)
