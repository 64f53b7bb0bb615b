"""PyTorch's tools on our layers: weights that they replace or look at, classes that they look for, forked processes."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn.torch
from fusedrnn.torch import accelerate
from torch_layers import KINDS, LAYERS, flat, input_for, make_pair

TORCHSCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported):DeprecationWarning")


# -- weights ----------------------------------------------------------------------------------------------------------

FLAT = {
    "a new list": lambda net: setattr(net, "_flat_weights", [w.detach() * 2 for w in net._flat_weights]),
    "an item": lambda net: net._flat_weights.__setitem__(1, net._flat_weights[1].detach() * 2),
    "a leaf": lambda net: net._flat_weights.__setitem__(0, net._flat_weights[0].detach().clone().requires_grad_()),
    "a parameter afterwards": lambda net: (
        setattr(net, "_flat_weights", [w.detach() * 2 for w in net._flat_weights]),
        setattr(net, "weight_hh_l0", torch.nn.Parameter(net.weight_hh_l0.detach() * 3)),
    ),
    "back to the parameters": lambda net: (
        setattr(net, "_flat_weights", [w.detach() * 2 for w in net._flat_weights]),
        net._init_flat_weights(),
    ),
}


@pytest.mark.parametrize("change", FLAT)
@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in LAYERS), ("LSTM", {"proj_size": 2})], ids=str
)
def test_flat_weights_that_a_tool_replaces(kind, options, change, runs):
    """Ours use the list where torch.nn's forward uses it."""
    x, results = input_for(kind, torch.float64), []
    for net in make_pair(kind, 3, 4, 2, dtype=torch.float64, **options):
        before = net(x)[0]
        FLAT[change](net)
        y = net(x)[0]
        own = net._flat_weights[0] if change == "a leaf" else net.weight_ih_l0
        leaves = [w for w in (*net.parameters(), own) if w.requires_grad]
        if y.requires_grad:
            y.sum().backward()
        results.append((y - before, y.requires_grad, [w.grad for w in leaves]))
    torch.testing.assert_close(results[0], results[1])
    assert len(runs) == 2 and (change in ("a leaf", "back to the parameters") or results[0][0].any())


@pytest.mark.parametrize("kind", ["RNN", "GRU"])  # torch.nn's LSTM cannot
def test_per_sample_gradients(kind):
    x = torch.randn(2, 5, 3)
    actual = []
    for net in make_pair(kind, 3, 4, batch_first=True):
        call_for_per_sample_grads(net)(x)[0].sum().backward()
        actual.append([p.grad_sample for p in net.parameters()])
    torch.testing.assert_close(actual[0], actual[1])


@pytest.fixture
def swapped_on_conversion():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_swapped_on_conversion(kind, swapped_on_conversion, runs):
    ours, torch_net = make_pair(kind, 3, 40)
    x = input_for(kind).repeat_interleave(16, -2)  # enough rows for packed weights, which are cached
    with torch.no_grad():
        ours(x)
    identities = list(map(id, ours.parameters()))
    ours.double()
    torch_net.double()
    torch.testing.assert_close(ours(x.double()), torch_net(x.double()))
    assert list(map(id, ours.parameters())) == identities and [spec.dtype for spec in runs] == ["float32", "float64"]


def negated(weight):
    return torch.complex(torch.zeros_like(weight), -weight).conj().imag


UNUSUAL = {
    "sparse": lambda weight: weight.to_sparse(),
    "CSR": lambda weight: weight.to_sparse_csr(),
    "mkldnn": lambda weight: weight.to_mkldnn(),
    "zero tensor": lambda weight: torch._efficientzerotensor(weight.shape),
    "negated": negated,
    "half": lambda weight: weight.half(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("way", UNUSUAL)
@pytest.mark.parametrize("kind", KINDS)
def test_unusual_parameters(kind, way, runs):
    """For each weight: torch.nn's result or its error."""
    x = input_for(kind)
    for index in range(2):
        actual = []
        for net in make_pair(kind, 3, 4):
            name = [name for name, _ in net.named_parameters()][index]
            value = UNUSUAL[way](getattr(net, name).detach())
            setattr(net, name, torch.nn.Parameter(value, requires_grad=False))
            try:
                with torch.no_grad():
                    actual.append(flat(net(x)))
            except (RuntimeError, ValueError) as error:
                actual.append((type(error), str(error)))
        if isinstance(actual[0], tuple):
            assert actual[0] == actual[1]
        else:
            torch.testing.assert_close(actual[0], actual[1])
    assert not runs


@pytest.mark.parametrize("kind", KINDS)
def test_layers_built_in_inference_mode(kind):
    x = input_for(kind)

    def outcome(net, way):
        states = None
        if "states" in way:
            with torch.inference_mode():
                states = net(x)
                states = states if kind.endswith("Cell") else states[1]
        try:
            with torch.inference_mode("inside" in way):
                result = flat(net(x.clone().requires_grad_("x" in way), states))
            gradients = []
            if result[0].requires_grad:
                result[0].sum().backward()
                gradients = [p.grad for p in net.parameters()]
            return [each.detach() for each in result], gradients
        except RuntimeError as error:
            return "Inference tensors cannot be saved" in str(error), []

    for way in ("inside", "outside", "outside, x needs a gradient", "outside, states created inside"):
        with torch.inference_mode():
            ours, torch_net = make_pair(kind, 3, 4)
        torch.testing.assert_close(outcome(ours, way), outcome(torch_net, way), msg=way)


# -- classes ----------------------------------------------------------------------------------------------------------


@TORCHSCRIPT
@pytest.mark.each_value
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_inside_a_script_module(kind, nested):
    ours, _ = make_pair(kind, 3, 4)
    expected = ours(input_for(kind).fill_(0.5))

    class Old(torch.jit.ScriptModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(ours) if nested else ours
            self.again = self.net

        @torch.jit.script_method
        def forward(self, x):
            return self.net(x)

    old = Old()
    torch.testing.assert_close(old(input_for(kind).fill_(0.5)), expected)
    assert type(ours) is getattr(fusedrnn.torch, kind)
    with torch.no_grad():
        ours.weight_hh_l0.zero_() if kind in LAYERS else ours.weight_ih.zero_()
    torch.testing.assert_close(old(input_for(kind).fill_(0.5)), ours(input_for(kind).fill_(0.5)))


class Pruned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.linear = torch.nn.LSTM(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.lstm(x)[0])


def saliency(model, x):
    from torch.ao.pruning._experimental.pruner import LSTMSaliencyPruner

    pruner = LSTMSaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(model, [{"tensor_fqn": f"lstm.{name}"} for name in ("weight_ih_l0", "weight_hh_l0")])
    pruner.enable_mask_update = True
    pruner.step()
    masked = model(x)
    pruned = pruner.prune()
    assert pruned.lstm.weight_hh_l0.shape == (16, 4)
    return masked, pruned(x), *pruned.parameters()


def weight_norm(model, x):
    pruner = WeightNormSparsifier(0.5, (1, 4))
    pruner.prepare(model, [{"tensor_fqn": "lstm.weight_ih_l0"}, {"tensor_fqn": "linear.weight"}])
    pruner.step()
    masked = model(x)
    pruner.squash_mask()
    return masked, model(x), *model.parameters()


@pytest.mark.parametrize("prune", [saliency, weight_norm])
def test_pruners_of_torch_ao(prune):
    x, ours = torch.randn(5, 2, 8), Pruned()
    accelerate(ours)
    torch.testing.assert_close(prune(ours, x), prune(Pruned(), x))
    assert type(ours.lstm) is fusedrnn.torch.LSTM


def test_pruners_know_our_layers_by_default():
    from torch.ao.pruning._experimental.pruner import LSTMSaliencyPruner

    model, actual = Pruned(), []
    for _ in range(2):
        pruner = LSTMSaliencyPruner({"sparsity_level": 0.5})
        pruner.make_config_from_model(model)
        actual.append([entry["tensor_fqn"] for entry in pruner.config])
        accelerate(model)
    assert actual[0] == actual[1] and len(actual[0]) == 2


# -- floating-point operations ----------------------------------------------------------------------------------------

FLOPS = [
    ("RNN", {"num_layers": 2, "nonlinearity": "relu"}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"bias": False}),
    ("LSTM", {"num_layers": 2, "proj_size": 2}),
    ("GRUCell", {}),
    ("LSTMCell", {"bias": False}),
]


def counted(net, x, states, frozen):
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(frozen not in name)
    with FlopCounterMode(display=False) as counter:
        result = sum(tensor.sum() for tensor in flat(net(x, states)))
        forward = counter.get_total_flops()
        if result.requires_grad:
            result.backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize(("kind", "options"), FLOPS, ids=str)
def test_flop_counters_count_as_for_torch_nn(kind, options):
    """In float64: torch.nn's fused float32 kernel is unknown to counters."""
    cell = kind.endswith("Cell")
    for form, x_needed, h_needed, frozen in product(
        ("cell",) if cell else ("padded", "packed"), (False, True), (None, False, True), ("none", "weight_ih", "l0")
    ):
        ours, torch_net = make_pair(kind, 3, 4, dtype=torch.float64, **options)
        x = input_for(kind, torch.float64).requires_grad_(x_needed)
        x = pack_padded_sequence(x, [5, 3]) if form == "packed" else x
        states = None
        if h_needed is not None:
            lead = () if cell else (options.get("num_layers", 1) * (1 + options.get("bidirectional", False)),)
            sizes = (options.get("proj_size", 4), 4)[: 2 if kind.startswith("LSTM") else 1]
            states = [torch.randn(*lead, 2, size, dtype=torch.float64, requires_grad=h_needed) for size in sizes]
            states = tuple(states) if len(states) == 2 else states[0]
        expected = counted(torch_net, x, states, frozen)
        if form == "packed":
            x = pack_padded_sequence(input_for(kind, torch.float64).requires_grad_(x_needed), [5, 3])
        where = f"{form}, x: {x_needed}, states: {h_needed}, frozen: {frozen}"
        actual = counted(ours, x, states, frozen)
        assert actual[0] == expected[0] > 0, where
        # Of a packed sequence it is not known how many rows the first step has, towards whose states nothing flows.
        exact = form != "packed" or h_needed
        assert actual[1] == expected[1] if exact else expected[1] <= actual[1] <= 1.2 * expected[1], where


# -- processes --------------------------------------------------------------------------------------------------------


def run(program, *arguments):
    code = ["import torch, sys, os", *program]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(code), *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_exported_programs_load_after_import_alone(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = fusedrnn.torch.GRU(3, 4)

        def forward(self, x):
            return self.net(x)[0]

    model, x = Model(), torch.ones(5, 2, 3)
    program = torch.export.export(model, (x,))
    assert "fusedrnn" in str(program.graph)
    path = str(tmp_path / "program.pt2")
    torch.export.save(program, path)
    loaded = run([
        "import fusedrnn.torch",
        "y = torch.export.load(sys.argv[1]).module()(torch.ones(5, 2, 3))",
        "print(float(y.sum()))",
    ], path)  # fmt: skip
    assert float(loaded) == pytest.approx(model(x).sum().item())


@pytest.mark.one_value("kind")
@pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
def test_draft_export(kind):
    """In a separate process, because it leaves files open."""
    actual = run([
        "import fusedrnn.torch",
        "class Model(torch.nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        f"        self.net = fusedrnn.torch.{kind}(3, 4)",
        "    def forward(self, x):",
        "        return self.net(x)[0]",
        "model, x = Model(), torch.randn(2, 3) if sys.argv[1] == 'cell' else torch.randn(5, 2, 3)",
        "program = torch.export.draft_export(model, (x,))",
        "torch.testing.assert_close(program.module()(x), model(x))",
        "print('exported')",
    ], "cell" if kind.endswith("Cell") else "layer")  # fmt: skip
    assert actual.split()[-1] == "exported"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="a fork before the import is seen in /proc")
def test_first_import_in_a_forked_child():
    """The parent has used OpenMP's threads, which the child lacks: it would wait for them for ever."""
    actual = run([
        "torch.set_num_threads(2)",
        "torch.randn(2_000_000).exp_()",
        "child = os.fork()",
        "if not child:",
        "    import fusedrnn.torch",
        "    net = fusedrnn.torch.GRU(128, 128)",
        "    y, h = net(torch.randn(12, 16, 128))",
        "    h.backward(h.detach())",
        "    print('trained', net.weight_hh_l0.grad.shape[0], flush=True)",
        "    os._exit(0)",
        "import fusedrnn.torch.openmp as openmp",
        "assert openmp._PROCESS == os.getpid()",
        "sys.exit(os.waitpid(child, 0)[1])",
    ])  # fmt: skip
    assert actual.split() == ["trained", "384"]
