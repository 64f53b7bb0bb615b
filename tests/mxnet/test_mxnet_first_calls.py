"""Initializations that wait for the input size: what replaces them, and what runs beside them."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from forks import FORK_WARNING, FORKS, in_child
from mxnet_calls import GRU
from problems import assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")

X = np.ones((3, 2, 5), np.float32)
BIAS = np.arange(12, dtype=np.float32)


def uniform(shape, rng):
    return rng.uniform(-1, 1, shape)


def test_a_second_initialization_replaces_the_first():
    layer = GRU(4)
    layer.initialize("zeros")
    layer.initialize("ones")
    layer(X)
    assert (layer.l0_i2h_weight.data() == 1).all()


def test_loaded_values_that_wait_are_not_lost():
    layer = GRU(4)
    layer.initialize("zeros")
    layer.load_parameters({"l0_h2h_bias": BIAS}, allow_missing=True)
    with pytest.raises(ValueError, match=r"^force_reinit must be True to overwrite the values that 'gru\d+_' has"):
        layer.initialize("ones")
    layer(X)
    assert_same_bits(layer.l0_h2h_bias.data(), BIAS)
    assert not layer.l0_i2h_weight.data().any()


def test_loaded_values_that_wait_are_overwritten_on_request():
    layer = GRU(4)
    layer.initialize("zeros")
    layer.load_parameters({"l0_h2h_bias": BIAS}, allow_missing=True)
    layer.initialize("ones", force_reinit=True)
    layer(X)
    assert not layer.l0_h2h_bias.data().any()


@pytest.mark.parametrize("train", [False, True])
def test_an_initializer_that_calls_its_layer(train):
    layer, nested = GRU(4), [True]

    def init(shape, rng):
        if nested[0]:
            layer.train(X) if train else layer(X)
        return uniform(shape, rng)

    layer.initialize(init)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^parameters of 'gru\d+_' must have values; got none yet"):
            layer(X)
    nested[0] = False
    layer(X)


def test_an_initializer_that_calls_another_layer():
    inner = GRU(4)
    inner.initialize(seed=0)
    outer = GRU(4)
    outer.initialize(lambda shape, rng: np.full(shape, inner(X).mean()))
    outer(X)
    assert (outer.l0_i2h_weight.data() == inner(X).mean()).all()


def test_layers_whose_initializers_call_each_other_on_two_threads():
    layers = GRU(4), GRU(4)
    both = threading.Barrier(2)

    def init_of(other):
        def init(shape, rng):
            with suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # time for both threads to be here, if they can
            with suppress(ValueError):  # the other's initializer calls back
                other(X)
            return uniform(shape, rng)

        return init

    for layer, other in (layers, layers[::-1]):
        layer.initialize(init_of(other))
    # Threads that wait for each other must not keep the tests from ending.
    threads = [threading.Thread(target=layer, args=(X,), daemon=True) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    for layer in layers:
        layer.l0_i2h_weight.data()


def replace_by_initialize(layer):
    layer.initialize("ones", force_reinit=True)


def replace_by_load(layer):
    layer.load_parameters({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})


SHAPES = {"l0_i2h_weight": (12, 5), "l0_h2h_weight": (12, 4), "l0_i2h_bias": (12,), "l0_h2h_bias": (12,)}
REPLACEMENTS = pytest.mark.parametrize("replace", [replace_by_initialize, replace_by_load])


@REPLACEMENTS
def test_what_replaces_the_values_during_a_first_call_stays(replace):
    inside, go_on = threading.Event(), threading.Event()

    def init(shape, rng):
        inside.set()
        go_on.wait(0.2)  # time for the other thread to arrive where the first is
        return uniform(shape, rng)

    layer = GRU(4)
    layer.initialize(init)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(layer, X)
        assert inside.wait(30)
        replace(layer)
        go_on.set()
        first.result(60)
    layer(X)
    assert (layer.l0_i2h_weight.data() == 1).all()


@REPLACEMENTS
def test_what_an_initializer_replaces_stays(replace):
    layer = GRU(4)

    def init(shape, rng):
        replace(layer)
        return uniform(shape, rng)

    layer.initialize(init)
    layer(X)
    layer(X)
    assert (layer.l0_i2h_weight.data() == 1).all()


@FORKS
@FORK_WARNING
def test_a_fork_during_a_first_call():
    """The child runs the initialization that it inherits."""
    inside, go_on, parent = threading.Event(), threading.Event(), os.getpid()

    def init(shape, rng):
        if os.getpid() == parent:
            inside.set()
            assert go_on.wait(60)
        return uniform(shape, rng)

    layer = GRU(4, backend="reference")
    layer.initialize(init, seed=1)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(layer, X)
        try:
            assert inside.wait(30)
            content = in_child(lambda: layer(X).tobytes())
        finally:
            go_on.set()
        assert content == first.result(60).tobytes()


def test_an_initializer_that_gives_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer = GRU(4, input_size=5)
    layer.initialize(lambda shape, rng: np.full(shape, 1.5, ml_dtypes.bfloat16))
    assert (layer.l0_i2h_weight.data() == 1.5).all()
