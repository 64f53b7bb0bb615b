"""Layers that somebody else builds: in a context, in a process, inside objects; and subclasses with ours beneath."""

import copy
import io
import pickle
import threading
from abc import ABC
from types import SimpleNamespace

import pytest
import torch
from torch.nn import LSTM as EARLY  # a name taken before anything is patched
from torch.nn.utils import parametrizations

import fusedrnn.torch
from fusedrnn.torch import LayerReport, accelerate, accelerate_new, accelerated, restore
from torch_layers import KINDS, first


def is_ours(module):
    return type(module).__module__ == "fusedrnn.torch"


class Library:
    """What forecasting libraries do: there is no network before fit(), or before load()."""

    def __init__(self):
        self.model = None

    def fit(self):
        self.model = torch.nn.Sequential(EARLY(3, 4))

    def load(self, file):
        self.model = torch.load(file, weights_only=False)


# -- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_layers_built_in_the_context(kind):
    torch_class = getattr(torch.nn, kind)
    before = dict(vars(torch_class))
    with accelerated():
        torch.manual_seed(0)
        net = torch_class(3, 4)
        assert type(getattr(fusedrnn.torch, kind)(3, 4)) is getattr(fusedrnn.torch, kind)
    torch.manual_seed(0)
    other = torch_class(3, 4)
    assert type(net) is getattr(fusedrnn.torch, kind) and type(other) is torch_class
    assert all(map(torch.equal, net.parameters(), other.parameters())) and set(vars(net)) == set(vars(other))
    assert dict(vars(torch_class)) == before


def test_networks_that_a_library_builds_or_loads():
    library, file = Library(), io.BytesIO()
    torch.save(torch.nn.Sequential(torch.nn.GRUCell(3, 4), EARLY(4, 4)), file)
    with accelerated():
        library.fit()
        assert is_ours(library.model[0])
        file.seek(0)
        library.load(file)
        assert is_ours(library.model[0]) and is_ours(library.model[1])
    file.seek(0)
    library.load(file)
    assert not is_ours(library.model[0])
    with accelerated():
        copied = copy.deepcopy(library.model)
    assert is_ours(copied[0]) and not is_ours(library.model[0])
    torch.testing.assert_close(copied[1](torch.ones(2, 1, 4)), library.model[1](torch.ones(2, 1, 4)))


def test_layers_that_accelerate_leaves_stay_unchanged():
    class Own(torch.nn.GRU):
        pass

    with accelerated():
        nets = Own(3, 4), torch.nn.LSTM(3, 4, dtype=torch.complex64), torch.nn.Linear(3, 4)
    assert [type(net) for net in nets] == [Own, torch.nn.LSTM, torch.nn.Linear]
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"), accelerated():
        torch.nn.LSTM(3, 0)


def test_contexts_nest_and_end_with_errors():
    with accelerated():
        with pytest.raises(ZeroDivisionError), accelerated():
            _ = 1 / 0
        assert is_ours(torch.nn.GRU(3, 4))
    assert not is_ours(torch.nn.GRU(3, 4))

    @accelerated()
    def build():
        return torch.nn.GRU(3, 4)

    assert is_ours(build()) and not is_ours(torch.nn.GRU(3, 4))


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_context_applies_to_its_thread_and_accelerate_new_to_all():
    def build():
        return is_ours(torch.nn.RNN(3, 4))

    with accelerated():
        assert build() and not in_thread(build)
    before = dict(vars(torch.nn.RNN))
    accelerate_new()
    try:
        accelerate_new()  # once more changes nothing
        assert build() and in_thread(build)
        with accelerated():
            assert build()
        assert build()
    finally:
        accelerate_new(False)
    assert not build() and not in_thread(build) and dict(vars(torch.nn.RNN)) == before
    accelerate_new(False)
    assert not build()


def test_another_librarys_wrapper_stays(monkeypatch):
    calls = []
    with accelerated():
        patched = torch.nn.GRU.__init__
        monkeypatch.setattr(torch.nn.GRU, "__init__", lambda self, *args: calls.append(1) or patched(self, *args))
        assert is_ours(torch.nn.GRU(3, 4))
    assert type(torch.nn.GRU(3, 4)) is torch.nn.GRU and len(calls) == 2
    # After undo, our patch is there again, and does nothing by now.
    monkeypatch.undo()
    assert type(torch.nn.GRU(3, 4)) is torch.nn.GRU
    torch.nn.GRU.__init__ = patched.__wrapped__


# -- objects that hold modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holder", "advice"),
    [
        (Library(), "got Library, which holds no module yet; if it builds its network later, as in fit"),
        (SimpleNamespace(policy=torch.nn.GRU(3, 4), steps=3), "which holds modules: give model.policy$"),
        (
            SimpleNamespace(agent=SimpleNamespace(actor=torch.nn.GRU(3, 4), critic=torch.nn.GRU(3, 4))),
            "give model.agent.actor, model.agent.critic$",
        ),
        ([torch.nn.Linear(3, 4), torch.nn.GRU(3, 4)], r"got list, which holds modules: give model\[0\], model\[1\]$"),
        ({"a": torch.nn.GRU(3, 4)}, r"got dict, which holds modules: give model\['a'\]$"),
        ([torch.nn.Linear(3, 4)] * 7, r"model\[3\] and 3 more$"),
        (torch.nn.LSTM, "got type, a class: give a module of it, or build it within `with fusedrnn.torch.accelerated"),
        (None, "got NoneType$"),
    ],
)
def test_errors_advise_what_to_accelerate_instead(holder, advice):
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=advice):
            function(holder)


def test_advice_on_objects_with_circular_references():
    holder = SimpleNamespace()
    holder.itself, holder.layers = holder, {"x": holder, "net": torch.nn.GRU(3, 4)}
    with pytest.raises(TypeError, match=r"give model.layers\['net'\]$"):
        accelerate(holder)


# -- subclasses -------------------------------------------------------------------------------------------------------


class Handling(ABC, torch.nn.RNNBase):
    """As a library wraps torch.nn's: its own forward around that of whatever comes next."""

    def forward(self, x, hx=None, scale=1.0):
        y, final = super().forward(x * scale, hx)
        return y + 1, final

    def initial(self):
        return self.hidden_size


class Wrapped(Handling, torch.nn.LSTM):
    """An LSTM that it wraps."""


class Plain(torch.nn.GRU):
    """With arguments and attributes of its own."""

    def __init__(self, size, extra):
        super().__init__(size, size)
        self.extra = extra

    def reset_parameters(self):
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, 0.1)


class OwnCell(torch.nn.LSTMCell):
    def forward(self, x, hx=None):
        return super().forward(x, hx)[0]


class Slotted(torch.nn.GRU):
    __slots__ = ("more",)


class Permutes(torch.nn.GRU):
    def permute_hidden(self, hx, permutation):
        return super().permute_hidden(hx, permutation)


class Flat(torch.nn.LSTM):
    @property
    def _flat_weights(self):
        return self.lists

    @_flat_weights.setter
    def _flat_weights(self, value):
        self.lists = value


class Alone(torch.nn.RNN):
    def forward(self, x, hx=None):
        return torch.nn.RNN.forward(self, x, hx)


class Seeing(torch.nn.GRU):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Dropped(torch.nn.GRU):
    @property
    def weight_hh_l0(self):
        if "weight_hh_l0" not in self._parameters:
            raise AttributeError("not there yet")
        return self._parameters["weight_hh_l0"] * 0.5


class Base(torch.nn.RNNBase):
    def forward(self, x):
        return x


class Colliding(torch.nn.GRU):
    def _plan(self):
        return "a plan of its own"


SERVED = {
    "wrapped": (lambda: Wrapped(3, 4), (5, 2, 3)),
    "plain": (lambda: Plain(3, "extra"), (5, 2, 3)),
    "cell": (lambda: OwnCell(3, 4), (2, 3)),
    "slots": (lambda: Slotted(3, 4), (5, 2, 3)),
    "parametrized": (lambda: parametrizations.weight_norm(Plain(3, "extra"), "weight_hh_l0"), (5, 2, 3)),
}
LEFT = {
    "it is a subclass of GRU that overrides permute_hidden": lambda: Permutes(3, 4),
    "it is a subclass of LSTM that overrides _flat_weights": lambda: Flat(3, 4),
    "it is a subclass of RNN that has a forward that does not call super().forward": lambda: Alone(3, 4),
    "it is a subclass of GRU that overrides __getattr__": lambda: Seeing(3, 4),
    "it is a subclass of GRU that overrides weight_hh_l0": lambda: Dropped(3, 4),
    "it is a subclass of RNNBase that has a forward of its own": lambda: Base("GRU", 3, 4),
    "it is a subclass of GRU that overrides _plan": lambda: Colliding(3, 4),
}


@pytest.mark.parametrize("which", SERVED)
def test_ours_beneath_a_subclass(which, runs):
    make, shape = SERVED[which]
    torch.manual_seed(0)
    net = make().double()
    kind, x = type(net), torch.randn(shape, dtype=torch.float64)
    expected, state = first(net(x)), net.state_dict()
    torch.autograd.backward(expected.sum())
    gradients = [p.grad.clone() for p in net.parameters()]
    (left,) = accelerate(net).unchanged
    assert left.reason.endswith("subclasses=True puts ours beneath its code") and type(net) is kind
    net.zero_grad()
    assert accelerate(net, subclasses=True).replaced == (LayerReport("", kind.__name__),)
    actual = first(net(x))
    actual.sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([p.grad for p in net.parameters()], gradients)
    assert len(runs) == 1 and isinstance(net, kind.__mro__[1]) and type(net).__name__ == kind.__name__
    net.load_state_dict(state, strict=True)
    assert list(net.state_dict()) == list(state) and not accelerate(net, subclasses=True)
    assert restore(net).replaced == (LayerReport("", kind.__name__),)
    # A parametrized layer's class is a new one.
    assert type(net) is kind or type(net).__bases__ == kind.__bases__
    torch.testing.assert_close(first(net(x)), expected)
    assert len(runs) == 1


def test_a_subclass_keeps_its_own_attributes(runs):
    net = Wrapped(3, 4)
    accelerate(net, subclasses=True)
    x = torch.randn(5, 2, 3)
    assert net.initial() == 4 and torch.equal(net(x, scale=0.0)[0], net(torch.zeros_like(x))[0])
    twin = Wrapped(3, 4)
    accelerate(twin, subclasses=True)
    assert type(twin) is type(net) and isinstance(net, fusedrnn.torch.LSTM) and isinstance(net, Wrapped)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other) is type(net) and torch.equal(other(x)[0], net(x)[0])
    assert b"_fusedrnn" not in pickle.dumps(restore(net) and net)


@pytest.mark.parametrize("reason", LEFT)
def test_subclasses_with_arithmetic_of_their_own_are_left(reason):
    net = LEFT[reason]()
    kind = type(net)
    for options in ({}, {"subclasses": True}):
        (left,) = accelerate(net, **options).unchanged
        assert left.reason == reason and type(net) is kind


def test_subclasses_built_in_the_context():
    with accelerated(subclasses=True):
        net = Plain(3, "extra")
        with accelerated():
            assert type(Plain(3, "extra")) is Plain
    assert isinstance(net, fusedrnn.torch.GRU) and net.extra == "extra" and type(Plain(3, "extra")) is Plain
    accelerate_new(subclasses=True)
    try:
        assert isinstance(Wrapped(3, 4), fusedrnn.torch.LSTM)
    finally:
        accelerate_new(False)


# -- classes that watch their subclasses ------------------------------------------------------------------------------


def watching(kind):
    """A class derived from a layer whose subclasses must be announced in some way."""
    if kind == "needs a key":

        class Watched(torch.nn.GRU):
            def __init_subclass__(cls, *, key, **options):
                super().__init_subclass__(**options)

        return Watched
    if kind == "names differ":
        names = set()

        class Base(torch.nn.GRU):
            def __init_subclass__(cls, **options):
                super().__init_subclass__(**options)
                assert cls.__name__ not in names, "registered twice"
                names.add(cls.__name__)

        class Watched(Base):
            pass

        return Watched

    class Final(type):
        def __new__(cls, name, bases, body):
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("it is final")
            return super().__new__(cls, name, bases, body)

    class Watched(torch.nn.GRU, metaclass=Final):
        pass

    return Watched


@pytest.mark.parametrize("kind", ["needs a key", "names differ"])
def test_init_subclass_does_not_see_the_derived_class(kind):
    watched = watching(kind)
    own = vars(watched).get("__init_subclass__")
    model = torch.nn.Sequential(torch.nn.LSTM(3, 3), watched(3, 3), torch.nn.GRU(3, 3))
    assert len(accelerate(model, subclasses=True)) == 3
    assert isinstance(model[1], watched) and isinstance(model[1], fusedrnn.torch.GRU)
    assert vars(watched).get("__init_subclass__") is own
    with accelerated(subclasses=True):
        assert isinstance(watched(3, 3), fusedrnn.torch.GRU)
    with pytest.raises((TypeError, AssertionError)):  # of its users' classes it is told as before
        type("Watched", (watched,), {})


def test_a_class_that_cannot_be_derived_from_is_left():
    watched = watching("final")
    model = torch.nn.Sequential(torch.nn.LSTM(3, 3), watched(3, 3), torch.nn.GRU(3, 3))
    report = accelerate(model, subclasses=True)
    assert [layer.name for layer in report.replaced] == ["0", "2"]
    assert "cannot be derived from: TypeError: it is final" in report.unchanged[0].reason
    with accelerated(subclasses=True):
        assert type(watched(3, 3)) is watched


def test_contexts_that_end_in_another_order_or_thread():
    outer, inner = accelerated(), accelerated()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert isinstance(torch.nn.GRU(2, 3), fusedrnn.torch.GRU)
    thread = threading.Thread(target=inner.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with accelerated():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    try:  # the classes are patched for the other thread
        assert type(torch.nn.GRU(2, 3)) is torch.nn.GRU
    finally:
        leave.set()
        thread.join()
