"""Every test of this folder runs on each backend of Keras."""

from pathlib import Path

import pytest

import keras_backends
from keras_backends import BACKENDS, CURRENT, OtherBackend

pytest.importorskip("keras")

FOLDER = Path(__file__).parent
_OTHERS = pytest.StashKey[dict]()


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


def pytest_collection_modifyitems(items):
    """Leave out, on other backends than PyTorch, tests that are not marked ``every_backend``."""
    items[:] = [
        item for item in items
        if item.path.parent != FOLDER or item.callspec.params["backend"] == "torch"
        or item.get_closest_marker("every_backend")
    ]  # fmt: skip


def pytest_itemcollected(item):
    # Keras's variables, with NumPy 2.
    item.add_marker(pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"))


@pytest.fixture(autouse=True)
def _backend(backend):
    """All tests depend on the backend."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Take the result of a test on another backend from the process that ran it."""
    backend = pyfuncitem.callspec.params["backend"]
    if backend == CURRENT:
        return None
    others = pyfuncitem.config.stash.setdefault(_OTHERS, {})
    if backend not in others:
        base = pyfuncitem.config._tmp_path_factory.getbasetemp()
        shared = base.parent if keras_backends.is_worker() else base
        others[backend] = OtherBackend(backend, pyfuncitem.path.parent, shared)
    if failure := others[backend].failure_of(pyfuncitem.name):
        pytest.fail(failure, pytrace=False)
    return True


@pytest.fixture
def fused(monkeypatch):
    """The specs of the calls of the operator, as they come."""
    from fusedrnn.keras import backends

    specs, module = [], backends.BACKEND
    run = module.run

    def recorded(spec, *arguments):
        results = run(spec, *arguments)
        specs.extend([spec] * (results is not None))
        return results

    monkeypatch.setattr(module, "run", recorded)
    return specs
