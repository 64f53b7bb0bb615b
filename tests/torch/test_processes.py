"""Our layers in other processes, in files, and with weights that change in every way there is."""

import copy
import io
import multiprocessing
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fusedrnn import RNNSpec
from fusedrnn.spec import MODES
from fusedrnn.testing.tolerance import difference, longest_sum, tolerance
from fusedrnn.torch import GRU, LSTM, RNN, accelerate, restore

T, N, I, H = 5, 3, 4, 17
LIMIT = 120  # seconds; what waits longer hangs
FORK = pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"))
METHODS = pytest.mark.parametrize("method", [FORK, "spawn"])
# From Python 3.12 on a fork warns wherever there are threads: that it works all the same is what is tested.
FORK_WARNING = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def make(mode, **options):
    if mode.startswith("rnn"):
        return RNN(I, H, nonlinearity=mode[4:], **options)
    return {"lstm": LSTM, "gru": GRU}[mode](I, H, **options)


class Net(nn.Module):
    """A layer, and one that occurs twice, between other modules."""

    def __init__(self, lstm=LSTM, gru=GRU):
        super().__init__()
        self.embedding = nn.Linear(3, I)
        self.rnn = lstm(I, H, 2, bidirectional=True, dropout=0.2)
        self.down = nn.Linear(2 * H, H)
        self.shared = gru(H, H)
        self.again = self.shared
        self.head = nn.Linear(H, 2)

    def forward(self, x):
        y = self.down(self.rnn(self.embedding(x))[0])
        return self.head(self.again(self.shared(y)[0])[0])


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers every time; torch's threads are as before afterwards."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def python(code, **variables):
    """A new Python that runs this; its results."""
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)


# -- workers of a DataLoader ------------------------------------------------------------------------------------------


class Features(Dataset):
    """Sequences, what a layer makes of them, and the gradient of that."""

    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return self.x.shape[1]

    def __getitem__(self, index):
        with torch.no_grad():
            y = self.layer(self.x[:, index])[0]
        x = self.x[:, index].clone().requires_grad_()
        self.layer(x)[0].square().sum().backward()
        return y, x.grad


@FORK_WARNING
@METHODS
def test_data_loader(method):
    """Workers start after the parent has used the layer with threads, and compute the same bits."""
    torch.set_num_threads(2)
    layer = make("lstm", num_layers=2, bidirectional=True)
    data = Features(layer, torch.randn(T, 6, I))
    expected = [torch.stack(column) for column in zip(*(data[i] for i in range(6)), strict=True)]
    # To start a process by spawn takes seconds: the same ones serve both epochs.
    options = {"multiprocessing_context": method, "persistent_workers": method == "spawn"}
    loader = DataLoader(data, batch_size=3, num_workers=2, timeout=LIMIT, **options)
    for _ in range(2):
        actual = [torch.cat(column) for column in zip(*loader, strict=True)]
        assert all(map(torch.equal, actual, expected))
    assert torch.equal(data[2][0], expected[0][2])  # and the parent goes on


# -- weights in shared memory -----------------------------------------------------------------------------------------


def target_of(x):
    return x.sum(-1, keepdim=True).cumsum(0).tanh()


def loss_on(model, x):
    return nn.functional.mse_loss(model[1](model[0](x)[0]), target_of(x))


def train(model, seed):
    """Hogwild: steps on weights that another process steps on as well."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss_on(model, torch.randn(T, 8, I, generator=generator)).backward()
        optimizer.step()


def shift(model, told, done):
    """Changes weights when it is told to; says what it computes with those that there are then."""
    torch.set_num_threads(1)
    x = torch.ones(T, 70, I)
    while told.get(timeout=LIMIT):
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.mul_(0.75)
            done.put(model[0](x)[0].numpy())


def outside_process(context, work, *arguments):
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def ended(processes):
    for process in processes:
        process.join(LIMIT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes == [0] * len(codes)


def assert_current(layer, x):
    """The layer uses the weights that there are: torch.nn with the same ones agrees."""
    oracle = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(layer.mode, nn.RNN)
    options = {"nonlinearity": layer.nonlinearity} if oracle is nn.RNN else {}
    plain = oracle(
        layer.input_size, layer.hidden_size, layer.num_layers, bias=layer.bias, bidirectional=layer.bidirectional,
        **options,
    )  # fmt: skip
    plain.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    with torch.no_grad():
        expected = plain.double()(x.double())[0].numpy()
    spec = RNNSpec(layer.mode.lower(), layer.input_size, layer.hidden_size, layer.num_layers, layer.bidirectional)
    # Weights of any size do not contract: what each step got wrong adds up.
    largest = max(parameter.abs().max().item() for parameter in layer.parameters())
    limits = tolerance(np.float32, longest_sum(spec) * len(x), scale=max(1.0, largest) * np.abs(expected).max())
    recorded = layer(x)[0].detach()
    with torch.no_grad():
        actual = layer(x)[0]
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], actual)
    for tensor in (actual, recorded):
        error = difference(tensor.numpy(), expected, *limits)
        assert error is None, error
    return actual


@FORK_WARNING
@pytest.mark.parametrize(("mode", "method"), [pytest.param("lstm", *FORK.values, marks=FORK.marks), ("gru", "spawn")])
def test_hogwild(mode, method):
    """Two processes train the same weights without locks, and the parent, which used them before, sees the changes."""
    if method == "fork":
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
    model = nn.Sequential(make(mode), nn.Linear(H, 1)).share_memory()
    x = torch.randn(T, 64, I)
    before, start = assert_current(model[0], x), loss_on(model, x).item()
    context = multiprocessing.get_context(method)
    assert ended([outside_process(context, train, model, seed) for seed in (1, 2)])
    assert loss_on(model, x).item() < start / 2
    assert not torch.equal(assert_current(model[0], x), before)


@FORK_WARNING
@METHODS
def test_weights_that_another_process_writes(method):
    """The next call uses them, although the tensor's version in this process is the same."""
    if method == "fork":
        torch.set_num_threads(1)
    model = nn.ModuleList([make("lstm", num_layers=2)]).share_memory()
    x = torch.ones(T, 70, I)
    assert_current(model[0], x)
    context = multiprocessing.get_context(method)
    told, done = context.Queue(), context.Queue()
    process = outside_process(context, shift, model, told, done)
    versions = [parameter._version for parameter in model.parameters()]
    for _ in range(3):
        told.put(True)
        expected = done.get(timeout=LIMIT)
        assert [parameter._version for parameter in model.parameters()] == versions
        np.testing.assert_array_equal(assert_current(model[0], x).numpy(), expected)
        for parameter in model.parameters():
            parameter.data[..., 0] += 0.5
        assert_current(model[0], x)
    told.put(False)
    assert ended([process])


# -- weights that change here -----------------------------------------------------------------------------------------


def stepped(optimizer, **options):
    def write(layer):
        torch.manual_seed(1)
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer(layer.parameters(), lr=0.1, **options).step()

    return write


def each(change):
    """A writer that does this to every parameter."""
    def write(layer):
        for parameter in layer.parameters():
            change(parameter)

    return write


def with_no_grad(change):
    def write(layer):
        with torch.no_grad():
            change(layer)

    return write


def write_array(parameter):
    parameter.detach().numpy()[...] *= -0.5


def write_bytes(parameter):
    memory = torch.tensor([], dtype=parameter.dtype).set_(parameter.untyped_storage())
    memory.mul_(-0.5)


def replace_all(layer):
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach() * 0.5))


WRITERS = {
    "data.copy_": each(lambda p: p.data.copy_(torch.randn_like(p))),
    "data.mul_": each(lambda p: p.data.mul_(-0.5)),
    "data of one element": lambda layer: layer.weight_hh_l0.data[H - 1, H - 1].add_(1.0),
    "one bias of one layer": lambda layer: layer.bias_ih_l1.data[H // 2].add_(1.0),
    "data, another tensor": each(lambda p: setattr(p, "data", p.data * 0.5)),
    "other parameters": replace_all,
    "no_grad in place": with_no_grad(each(lambda p: p.add_(0.05))),
    "nn.init": each(nn.init.normal_),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "a NumPy view": each(write_array),
    "the storage": with_no_grad(each(write_bytes)),
    "load_state_dict": lambda layer: layer.load_state_dict({n: v * 0.5 for n, v in layer.state_dict().items()}),
    "load_state_dict, assign": lambda layer: layer.load_state_dict(
        {n: v * 0.5 for n, v in layer.state_dict().items()}, assign=True
    ),
    "a moving average": each(lambda p: p.data.lerp_(torch.ones_like(p), 0.25)),
    "foreach": with_no_grad(lambda layer: torch._foreach_mul_(list(layer.parameters()), 0.5)),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(layer.parameters()) * 0.5, layer.parameters()
    ),
    "SGD": stepped(torch.optim.SGD, momentum=0.9),
    "Adam": stepped(torch.optim.Adam),
    "Adam, foreach": stepped(torch.optim.Adam, foreach=True),
    "Adam, one kernel": stepped(torch.optim.Adam, fused=True),
    "a trip to float64": lambda layer: each(lambda p: p.data.mul_(0.5))(layer.double()) or layer.float(),
    "flatten_parameters": lambda layer: layer.flatten_parameters() or each(lambda p: p.data.mul_(0.5))(layer),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [N, 70])
def test_weights_are_never_stale(mode, writer, batch):
    """The next forward uses changed weights, three times in a row, in training and in inference.

    A short call uses unpacked weights; a call with a large batch packs and caches them.
    """
    layer, x = make(mode, num_layers=2), torch.randn(T, batch, I)
    before = assert_current(layer, x)
    for _ in range(3):
        WRITERS[writer](layer)
        after = assert_current(layer, x)
        assert not torch.equal(after, before)
        before = after


def test_arrays_that_share_memory_with_weights():
    """NumPy arrays from before the first call, written to between calls."""
    layer, x = make("gru"), torch.randn(T, N, I)
    views = [parameter.detach().numpy() for parameter in layer.parameters()]
    before = assert_current(layer, x)
    for view in views:
        view[-1] += 0.5
        after = assert_current(layer, x)
        assert not torch.equal(after, before)
        before = after


def test_training_losses_are_those_of_torch():
    """Over many steps, with inference between them."""
    torch.manual_seed(3)
    ours = nn.Sequential(make("lstm"), nn.Linear(H, 1))
    plain = copy.deepcopy(ours)
    restore(plain)
    assert type(plain[0]) is nn.LSTM
    plain.double()
    losses = []
    for model in (ours, plain):
        generator = torch.Generator().manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        losses.append([])
        for _ in range(20):
            x = torch.randn(T, 8, I, generator=generator).to(model[1].weight.dtype)
            optimizer.zero_grad()
            loss_on(model, x).backward()
            optimizer.step()
            with torch.no_grad():
                losses[-1].append(loss_on(model, x).item())
    assert losses[0][-1] < losses[0][0] / 2
    # A loss is a mean of squares of at most 4, whose root has the error of an output; the errors of 20 steps add up.
    rtol, atol = tolerance(np.float32, (I + H + 2 + 8 * T) * 20, scale=4.0)
    assert difference(np.array(losses[0]), np.array(losses[1]), rtol, atol) is None


# -- threads ----------------------------------------------------------------------------------------------------------

THREADS = """
import sys, torch
from fusedrnn.torch import GRU
layer, x = GRU(128, 256), torch.randn(40, 64, 128)
for count in (1, 3, 2):
    torch.set_num_threads(count)
    print("asked for", count, file=sys.stderr, flush=True)
    with torch.no_grad():
        layer(x)
    layer(x)[0].sum().backward()
"""


def test_the_number_of_threads_is_torchs():
    """Torch.set_num_threads sets it for inference, forward and backward; fusedrnn's own default does not apply."""
    result = python(THREADS, FUSEDRNN_DEBUG="1", FUSEDRNN_NUM_THREADS="4")
    assert result.returncode == 0, result.stderr
    asked, plans = 0, {1: 0, 2: 0, 3: 0}
    for line in result.stderr.splitlines():
        if line.startswith("asked for"):
            asked = int(line.split()[-1])
        elif actual := re.search(r"(\d+) thread\(s\)", line):
            plans[asked] += 1
            assert int(actual[1]) == asked, line
    assert plans == {1: 3, 2: 3, 3: 3}


# -- copies and files -------------------------------------------------------------------------------------------------


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": by_torch,
}


@pytest.fixture(params=["ours", "accelerated"])
def used_model(request):
    """A model that has been trained and used, so that whatever is cached is."""
    model = Net() if request.param == "ours" else Net(nn.LSTM, nn.GRU)
    accelerate(model)
    model(torch.randn(T, N, 3)).sum().backward()
    model.eval()
    with torch.no_grad():
        model(torch.randn(T, N, 3))
    return model


@pytest.mark.parametrize("way", COPIES)
def test_copies(used_model, way):
    """A copy has the same classes, computes the same bits, and shares nothing with the original."""
    x = torch.randn(T, N, 3)
    other = COPIES[way](used_model)
    assert [type(module) for module in other.modules()] == [type(module) for module in used_model.modules()]
    assert type(other.rnn) is LSTM
    assert type(other.shared) is GRU
    assert other.again is other.shared
    assert not other.training
    with torch.no_grad():
        expected = used_model(x)
        assert torch.equal(other(x), expected)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(used_model(x), expected)
        assert not torch.equal(other(x), expected)
    other(x).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_a_state_dict_goes_to_torch_and_back(used_model, tmp_path):
    """Plain tensors under torch.nn's names: saved by one, loaded by the other."""
    torch.save(used_model.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    plain = Net(nn.LSTM, nn.GRU).eval()
    plain.load_state_dict(weights)
    back = Net().eval()
    back.load_state_dict(plain.state_dict())
    x = torch.randn(T, N, 3)
    with torch.no_grad():
        assert torch.equal(back(x), used_model(x))


@pytest.mark.parametrize("used_model", ["accelerated"], indirect=True)
def test_a_restored_model_loads_without_fusedrnn(used_model, tmp_path):
    """It is saved after restore."""
    restore(used_model)
    layers = nn.ModuleList([used_model.rnn, used_model.shared])
    torch.save(layers, tmp_path / "model.pt")
    result = python(LOAD, BLOCKED="fusedrnn", FILE=str(tmp_path / "model.pt"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["torch.nn.modules.rnn.LSTM", "torch.nn.modules.rnn.GRU"]


# -- what is not installed --------------------------------------------------------------------------------------------

BLOCK = """
import os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == os.environ["BLOCKED"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
LOAD = (
    BLOCK
    + """
import torch
for layer in torch.load(os.environ["FILE"], weights_only=False):
    print(type(layer).__module__ + "." + type(layer).__name__)
"""
)
WITHOUT_TORCH = (
    BLOCK
    + """
import fusedrnn
try:
    import fusedrnn.torch
except ImportError as error:
    print(error)
"""
)


@pytest.mark.parametrize("used_model", ["accelerated"], indirect=True)
def test_an_accelerated_model_does_not_load_without_fusedrnn(used_model, tmp_path):
    """Python's own error names the missing module."""
    torch.save(nn.ModuleList([used_model.rnn]), tmp_path / "model.pt")
    result = python(LOAD, BLOCKED="fusedrnn", FILE=str(tmp_path / "model.pt"))
    assert result.returncode != 0
    assert result.stderr.rstrip().splitlines()[-1].startswith("ModuleNotFoundError: No module named 'fusedrnn")


def test_without_torch():
    """``import fusedrnn`` works, and the error of fusedrnn.torch says what to install."""
    result = python(WITHOUT_TORCH, BLOCKED="torch")
    assert result.returncode == 0, result.stderr
    assert "fusedrnn.torch needs PyTorch: install fusedrnn with its extra 'torch'" in result.stdout


def test_fusedrnn_alone_loads_no_torch():
    result = python("import sys, fusedrnn; print(*(name for name in sys.modules if name.split('.')[0] == 'torch'))")
    assert result.returncode == 0, result.stderr
    assert not result.stdout.split()
