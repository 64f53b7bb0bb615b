"""The engines by name: registering them, and selecting the one that runs a given RNN.

An engine is registered with a factory, which is called only when an operator needs the engine: expensive imports
belong in the factory. A factory declines a spec if it raises NotImplementedError or ImportError; the message says why.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fusedrnn.engines.interface import Capabilities, Engine, Need
from fusedrnn.jit.host import current_target
from fusedrnn.jit.target import Target
from fusedrnn.locks import Lock
from fusedrnn.network_spec import NetworkSpec
from fusedrnn.spec import RNNSpec

Op = TypeVar("Op")
Factory = Callable[[RNNSpec], Engine]
# Ops cached by spec; each holds packed weights and a workspace.
MOST_OPS = 64


@dataclass(frozen=True, eq=False)
class Registration:
    """A registered engine; the attributes are the arguments of :func:`register`."""

    name: str
    factory: Factory
    capabilities: Capabilities
    order: int
    device: str
    automatic: bool
    description: str

    def rejection(self, spec: RNNSpec, needs: Iterable[Need] = ()) -> str | None:
        """Why the engine cannot run this, as far as its capabilities tell; None if it can."""
        missing = self.capabilities.missing(spec, needs)
        if not missing:
            return None
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not supported by engine {self.name!r}"


_lock = Lock()
_registered: tuple[Registration, ...] = ()  # replaced, never changed: reading it takes no lock
_ops_lock = Lock()
_ops: OrderedDict[tuple[RNNSpec | NetworkSpec, str | None, Target], Any] = OrderedDict()


def register(
    name: str,
    factory: Factory,
    capabilities: Capabilities,
    *,
    order: int,
    device: str = "cpu",
    automatic: bool = True,
    description: str = "",
) -> Registration:
    """Register an engine. Existing ops keep the engines that they have.

    Args:
        name: Its value for ``backend=``.
        factory: Creates the engine for a spec; raises NotImplementedError or ImportError to decline.
        capabilities: What it can do.
        order: Its place in the order of preference, lowest first.
        device: Where it runs.
        automatic: Whether it may be selected without being named.
        description: What it is, in a few words.

    Raises:
        TypeError: If ``name`` is not a string, ``factory`` not callable, ``capabilities`` not a
            :class:`~fusedrnn.engines.interface.Capabilities` or ``order`` not an integer.
        ValueError: If ``name`` is empty or taken.
    """
    global _registered
    if not isinstance(name, str):
        raise TypeError(f"name must be a string; got {type(name).__name__}")
    if not callable(factory):
        raise TypeError(f"factory must be callable; got {type(factory).__name__}")
    if not isinstance(capabilities, Capabilities):
        raise TypeError(f"capabilities must be a Capabilities; got {type(capabilities).__name__}")
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an integer; got {order!r}")
    registration = Registration(name, factory, capabilities, order, device, automatic, description)
    with _lock:
        if not name or name in names():
            raise ValueError(f"name must not be empty or one of {', '.join(names())}; got {name!r}")
        _registered = tuple(sorted((*_registered, registration), key=lambda entry: entry.order))
    _forget_ops()  # without the lock: an op that is being created may need it
    return registration


def unregister(name: str) -> None:
    """Remove an engine. Existing ops keep it.

    Raises:
        ValueError: If no engine has that name.
    """
    global _registered
    with _lock:
        removed = find(name)
        _registered = tuple(entry for entry in _registered if entry is not removed)
    _forget_ops()


def engines() -> tuple[Registration, ...]:
    """All engines, in order of preference."""
    return _registered


def names() -> tuple[str, ...]:
    """Their names, in the same order."""
    return tuple(entry.name for entry in _registered)


def check_backend(backend: object) -> None:
    """Raise the error of :func:`find`, unless ``backend`` is None or the name of an engine."""
    if backend is not None:
        find(backend)


def find(name: object) -> Registration:
    """The engine of that name, which callers know as ``backend``.

    Raises:
        TypeError: If ``name`` is not a string.
        ValueError: If no engine has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, one of {', '.join(names())}, or None; got {type(name).__name__}")
    for entry in _registered:
        if entry.name == name:
            return entry
    raise ValueError(f"backend must be one of {', '.join(names())}; got {name!r}")


def candidates(backend: str | None) -> tuple[Registration, ...]:
    """The engines that may run a call: the one of that name, or for None those that are selected automatically.

    Raises:
        TypeError: If ``backend`` is not a string.
        ValueError: If it names no engine.
    """
    return tuple(e for e in engines() if e.automatic) if backend is None else (find(backend),)


class EngineSelector:
    """Selects the engine for each call of one spec: the first that supports what the call needs.

    An engine is created when it is first selected.

    Args:
        spec: What to run.
        backend: The one engine to use; None for any that may be selected automatically.

    Raises:
        TypeError: If ``backend`` is not a string.
        ValueError: If it names no engine.
    """

    def __init__(self, spec: RNNSpec, backend: str | None = None) -> None:
        self._spec, self._named = spec, backend is not None
        self._candidates = candidates(backend)
        self._created: dict[str, Engine] = {}
        self._declined: dict[str, str] = {}
        self._lock = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The engines that may be selected, whether they decline or not."""
        return tuple(entry.name for entry in self._candidates)

    def select(self, needs: frozenset[Need] = frozenset()) -> tuple[str, Engine]:
        """The name and the engine for calls with these needs.

        Raises:
            NotImplementedError: With the reason of each engine that was rejected.
        """
        rejections = []
        with self._lock:
            for entry in self._candidates:
                rejection = entry.rejection(self._spec, needs) or self._create(entry)
                if rejection is None:
                    return entry.name, self._created[entry.name]
                rejections.append(rejection)
        if not self._named:
            others = [e for e in engines() if not e.automatic and e.rejection(self._spec, needs) is None]
            rejections += [f"backend={entry.name!r} supports it" for entry in others]
        raise NotImplementedError("; ".join(rejections) or "no engine is registered that is used automatically")

    def _create(self, entry: Registration) -> str | None:
        """Create the engine if that has not been tried; why its factory declined, or None."""
        if entry.name not in self._created and entry.name not in self._declined:
            try:
                self._created[entry.name] = entry.factory(self._spec)
            except (NotImplementedError, ImportError) as error:
                self._declined[entry.name] = f"{error} (engine {entry.name!r})"
        return self._declined.get(entry.name)


def cached_op(spec: RNNSpec | NetworkSpec, backend: str | None, create: Callable[[], Op]) -> Op:
    """The op for this spec, backend and current target: created once, and kept while it is among those used last."""
    key = spec, backend, current_target()
    with _ops_lock:
        # A signal handler's call may run in between: an entry may be gone at any time.
        op: Op | None = _ops.pop(key, None)
        if op is None:
            op = create()
        _ops[key] = op
        while len(_ops) > MOST_OPS:
            _ops.popitem(last=False)
        return op


def _forget_ops() -> None:
    with _ops_lock:
        _ops.clear()
