"""The engines there are, what each says it can do, and which of them run a given RNN.

An engine is registered by name with a factory, which is called only when an operator needs the engine: what is heavy
to import is imported there. A factory that raises NotImplementedError or ImportError declines, with that message.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypeVar

from numpy.typing import NDArray

from fusedrnn.engines.grad_buffers import Gradients
from fusedrnn.jit.host import current_target
from fusedrnn.jit.target import Target
from fusedrnn.locks import Lock
from fusedrnn.spec import DTYPES, MODES, OPTIONS, RNNSpec

Array = NDArray[Any]
Keep = Literal["gates", "states"]
Need = Literal["training", "lengths", "dropout"]
"""What an engine may lack and only a call can tell: dropout counts where training drops something."""
NEEDS: tuple[Need, ...] = ("training", "lengths", "dropout")
Op = TypeVar("Op")
# Ops kept by their spec; each holds packed weights and a workspace.
MOST_OPS = 64


class Kept(Protocol):
    """What an engine's forward pass keeps for its backward."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""


class Engine(Protocol):
    """Runs one spec, on arguments that have been checked. Any number of threads may call it at once.

    ``x`` (T, N, I) and ``y`` (T, N, D·S) have elements side by side in their last axis; ``params`` and each of
    ``states``, None for zeros, are contiguous; ``lengths`` is int64 (N,), or None. ``y`` is written, but not its
    padding. Final states are new arrays.
    """

    def compile(self, training: bool = False) -> None:
        """Have at hand what inference, or training too, would make at its first call."""

    def forward(
        self, x: Array, params: Array, states: Sequence[Array] | None, lengths: Array | None, y: Array
    ) -> tuple[Array, ...]:
        """Inference: writes ``y`` and returns the final states."""

    def train(
        self,
        x: Array,
        params: Array,
        states: Sequence[Array] | None,
        lengths: Array | None,
        y: Array,
        keep: Keep,
        seed: int,
    ) -> tuple[tuple[Array, ...], Kept]:
        """Training: writes ``y`` and returns the final states, and what backward needs.

        What is kept is the engine's own: nothing that happens later to an argument or a result changes it.
        """

    def backward(
        self, kept: Any, dy: Array | None, dstates: Sequence[Array | None], gradients: Gradients
    ) -> None:
        """Write or add the gradients, from those of the output and of each final state; None for zero.

        ``kept`` is what :meth:`train` of such an engine for the same spec returned. ``dy`` may hold anything behind a
        sequence's length. ``kept`` stays as it is, for more calls.
        """

    def reserve_bytes(self, steps: int, batch: int, keep: Keep) -> int:
        """The ``nbytes`` of what :meth:`train` keeps of T steps of N sequences."""


Factory = Callable[[RNNSpec], Engine]


@dataclass(frozen=True)
class Supports:
    """What an engine can do.

    Attributes:
        modes: Cells.
        dtypes: Number formats.
        training: Whether it trains.
        lengths: Whether sequences of a batch may differ in length.
        dropout: Whether training may drop elements between layers.
        options: What it has of :data:`OPTIONS`.
    """

    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = DTYPES
    training: bool = True
    lengths: bool = True
    dropout: bool = True
    options: tuple[str, ...] = ()

    def lacking(self, spec: RNNSpec, needs: Iterable[Need] = ()) -> list[str]:
        """What the spec and the needs of a call ask for and is not there, by the names of the arguments."""
        lacking = [need for need in sorted(needs) if not getattr(self, need)]
        checks = {
            f"mode {spec.mode!r}": spec.mode in self.modes,
            f"dtype {spec.dtype!r}": spec.dtype in self.dtypes,
        }
        asked = [option for option in OPTIONS if option not in self.options and spec.asks_for(option)]
        return [option for option, there in checks.items() if not there] + asked + lacking

    def __str__(self) -> str:
        able = [f.name.replace("_", " ") for f in fields(self) if getattr(self, f.name) is True]
        return "; ".join(", ".join(part) for part in (self.modes, self.dtypes, able, self.options) if part)


@dataclass(frozen=True, eq=False)
class Registration:
    """An engine that is registered; the attributes are the arguments of :func:`register`."""

    name: str
    factory: Factory
    supports: Supports
    order: int
    device: str
    automatic: bool
    description: str

    def refusal(self, spec: RNNSpec, needs: Iterable[Need] = ()) -> str | None:
        """Why this engine declines, as far as it says so beforehand; None if it does not."""
        lacking = self.supports.lacking(spec, needs)
        if not lacking:
            return None
        return f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not supported yet by engine {self.name!r}"


_lock = Lock()
_registered: tuple[Registration, ...] = ()  # replaced, never changed: to read it takes no lock
_ops_lock = Lock()
_ops: OrderedDict[tuple[RNNSpec, str | None, Target], Any] = OrderedDict()


def register(
    name: str,
    factory: Factory,
    supports: Supports,
    *,
    order: int,
    device: str = "cpu",
    automatic: bool = True,
    description: str = "",
) -> Registration:
    """Make an engine known. Ops that exist keep the engines that they have.

    Args:
        name: What ``backend=`` calls it.
        factory: Makes the engine of a spec; raises NotImplementedError or ImportError to decline.
        supports: What it can do.
        order: Its place in the order of preference, lowest first.
        device: Where it runs.
        automatic: Whether it is used without being asked for by name.
        description: What it is, in a few words.

    Raises:
        TypeError: If ``name`` is no string, ``factory`` cannot be called, ``supports`` is not a :class:`Supports` or
            ``order`` no integer.
        ValueError: If ``name`` is empty or taken.
    """
    global _registered
    if not isinstance(name, str):
        raise TypeError(f"name must be a string; got {type(name).__name__}")
    if not callable(factory):
        raise TypeError(f"factory must be callable; got {type(factory).__name__}")
    if not isinstance(supports, Supports):
        raise TypeError(f"supports must be a Supports; got {type(supports).__name__}")
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an integer; got {order!r}")
    entry = Registration(name, factory, supports, order, device, automatic, description)
    with _lock:
        if not name or name in names():
            raise ValueError(f"name must be new and not empty, apart from {', '.join(names())}; got {name!r}")
        _registered = tuple(sorted((*_registered, entry), key=lambda one: one.order))
    _forget_ops()  # without the lock, which an op that is being made may want
    return entry


def unregister(name: str) -> None:
    """Forget an engine. Ops that exist keep it.

    Raises:
        ValueError: If there is none of that name.
    """
    global _registered
    with _lock:
        removed = find(name)
        _registered = tuple(entry for entry in _registered if entry is not removed)
    _forget_ops()


def engines() -> tuple[Registration, ...]:
    """Every engine, in order of preference."""
    return _registered


def names() -> tuple[str, ...]:
    """Their names, in the same order."""
    return tuple(entry.name for entry in _registered)


def find(name: object) -> Registration:
    """The engine of that name.

    Raises:
        TypeError: If ``name``, which callers know as ``backend``, is no string.
        ValueError: If there is no such engine.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, one of {', '.join(names())}, or None; got {type(name).__name__}")
    for entry in _registered:
        if entry.name == name:
            return entry
    raise ValueError(f"backend must be one of {', '.join(names())}; got {name!r}")


class Choice:
    """The engines for one spec: each made when first needed, the first that can do what a call needs used for it.

    Args:
        spec: What to run.
        backend: The one engine to use; None for any of those that are used automatically.

    Raises:
        TypeError: If ``backend`` is no string.
        ValueError: If it names no engine.
    """

    def __init__(self, spec: RNNSpec, backend: str | None = None) -> None:
        self._spec, self._forced = spec, backend is not None
        self._candidates = tuple(e for e in engines() if e.automatic) if backend is None else (find(backend),)
        self._made: dict[str, Engine] = {}
        self._failed: dict[str, str] = {}
        self._serving: dict[frozenset[Need], tuple[str, Engine]] = {}
        self._lock = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The engines that may be chosen, whether they accept or not."""
        return tuple(entry.name for entry in self._candidates)

    def serving(self, needs: frozenset[Need] = frozenset()) -> tuple[str, Engine]:
        """The engine for calls that need this, with its name.

        Raises:
            NotImplementedError: Saying of each engine why it declines.
        """
        return self._serving.get(needs) or self._choose(needs)

    def _choose(self, needs: frozenset[Need]) -> tuple[str, Engine]:
        refusals = []
        with self._lock:
            for entry in self._candidates:
                refusal = entry.refusal(self._spec, needs) or self._make(entry)
                if refusal is None:
                    self._serving[needs] = entry.name, self._made[entry.name]
                    return self._serving[needs]
                refusals.append(refusal)
        if not self._forced:
            others = [e for e in engines() if not e.automatic and e.refusal(self._spec, needs) is None]
            refusals += [f"backend={entry.name!r} has it, if asked for" for entry in others]
        raise NotImplementedError("; ".join(refusals) or "no engine is registered that is used automatically")

    def _make(self, entry: Registration) -> str | None:
        """Make the engine, if that has not been done; what speaks against it, or None."""
        if entry.name not in self._made and entry.name not in self._failed:
            try:
                self._made[entry.name] = entry.factory(self._spec)
            except (NotImplementedError, ImportError) as error:
                self._failed[entry.name] = f"{error} (engine {entry.name!r})"
        return self._failed.get(entry.name)


def cached(spec: RNNSpec, backend: str | None, make: Callable[[], Op]) -> Op:
    """What was made for this spec and backend, on the target in force, while among those most recently asked for."""
    key = spec, backend, current_target()
    with _ops_lock:
        # A call from a signal handler may come in between anywhere: nothing is taken to be there still.
        found: Op | None = _ops.pop(key, None)
        if found is None:
            found = make()
        _ops[key] = found
        while len(_ops) > MOST_OPS:
            _ops.popitem(last=False)
        return found


def _forget_ops() -> None:
    with _ops_lock:
        _ops.clear()
