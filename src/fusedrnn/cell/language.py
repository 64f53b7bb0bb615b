"""Cells that users write: the decorator of their equations, and the checks of these equations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import Any, overload

from fusedrnn.cell import primitives
from fusedrnn.cell.derivative import differentiate
from fusedrnn.cell.expr import NO_ARRAY, Constant, Expr
from fusedrnn.cell.initial import InitialValue, checked_initial
from fusedrnn.cell.leaves import PreH, PreX
from fusedrnn.cell.symbols import RAW
from fusedrnn.cell.trace import fuse_gate_sums
from fusedrnn.cell.traversal import walk
from fusedrnn.cell.user_cell import UserCell
from fusedrnn.scalars import as_number, check_bounds

__all__ = ["UserCell", "cell", "clip"]

Equations = Callable[..., Any]
_RESERVED = (
    "i2h_weight", "h2h_weight", "h2r_weight", "peephole_weight", "i2h_bias", "h2h_bias",
    "weight_ih", "weight_hh", "weight_hr", "weight_ph", "bias_ih", "bias_hh",
)  # fmt: skip
_MAX_STATES, _MAX_NAME = 6, 64
_IDENTIFIER = f"an identifier of at most {_MAX_NAME} ASCII letters, not with _ first"


def clip(x: Expr, low: float, high: float) -> Expr:
    """Limit x to the interval from ``low`` to ``high``, two numbers; NaN stays NaN."""
    low, high = as_number("low", low), as_number("high", high)
    check_bounds("low", low, "high", high)
    return primitives.clip(x, low, high)


@overload
def cell(equations: Equations, /) -> UserCell: ...


@overload
def cell(
    *, gates: str, states: str = "h", vectors: str = "", scalars: str = "", name: str | None = None,
    initial: Mapping[str, InitialValue] | None = None, output: str | None = None,
) -> Callable[[Equations], UserCell]: ...  # fmt: skip


def cell(
    equations: Equations | None = None,
    *,
    gates: str = "",
    states: str = "h",
    vectors: str = "",
    scalars: str = "",
    name: str | None = None,
    initial: Mapping[str, InitialValue] | None = None,
    output: str | None = None,
) -> UserCell | Callable[[Equations], UserCell]:
    """Make a cell from its equations: write ``@cell(gates="f n", states="h")`` above a function.

    The function is called once, with symbols. It describes one step for all units at once:

    - ``x.f`` is the pre-activation of gate f from the input, W x + b of its rows; ``x.raw`` is the layer's input
      itself, which then has as many features as there are units;
    - ``recurrent(e).f`` is the pre-activation of gate f from the recurrent weights, U e + d of its rows, where e is any
      expression. A gate takes part in one such product or in none; a cell may have no product;
    - ``s.h`` is a state before the step;
    - ``p.beta``, an attribute of a fourth argument, is a vector or a scalar that the cell declares.

    It returns the new states in their order, the output first; with ``output`` it returns the output and then all
    states. Expressions have Python's arithmetic, and the functions of :mod:`fusedrnn.cell`.

    Args:
        equations: The function ``(x, recurrent, s)``; ``(x, recurrent, s, p)`` if there are vectors or scalars.
        gates: The names of the gates, with spaces between, in the order in which weights stack them: those of the first
            recurrent product, those of the next product, and last those that ``x`` alone gives. Input weights have rows
            for the gates that the equations take from ``x``; recurrent weights have rows for the gates that they take
            from a product.
        states: The names of the states, the output first; at most six.
        output: The name of the output if it is not a state.
        vectors: The names of parameters with one number for each unit, (H,).
        scalars: The names of parameters that are one number, (1,).
        name: The name of the cell; None for the name of the function.
        initial: The initial values of parameters: a mapping from the name of a vector, a scalar or a gate's bias
            (``"f.bias"``) to a number, ``(low, high)`` of a uniform distribution, or :func:`fusedrnn.cell.chrono`. All
            others are uniformly distributed between -1/√H and 1/√H, as in torch.nn.

    Raises:
        TypeError: If the equations do what no cell can: branch on an expression, iterate over one, return something
            else than expressions. Or if an initial value has the wrong type.
        ValueError: If a name is missing, invalid or given twice, or a gate, a state or a parameter is not used as it
            must be; or if ``initial`` has an unknown name.
        AttributeError: If the equations use a name that is not declared.
    """
    def make(function: Equations) -> UserCell:
        return _make(function, (gates, states, vectors, scalars), name, initial, output)

    return make if equations is None else make(equations)


def _make(
    equations: Equations, texts: tuple[str, ...], name: str | None, initial: Mapping[str, InitialValue] | None,
    output: str | None,
) -> UserCell:  # fmt: skip
    if not callable(equations):
        raise TypeError(f"cell takes a function; got {equations!r}: write @cell(gates=...) above one")
    label = str(name or getattr(equations, "__name__", ""))
    if not _is_name(label):
        raise ValueError(f"a cell needs a name, {_IDENTIFIER}; got {label!r}: give name=")
    try:
        gates, states, vectors, scalars = (_names(kind, text) for kind, text in zip(_KINDS, texts, strict=True))
        _check_names(gates, states, vectors, scalars)
        _check_output(output, states)
        values = checked_initial(initial, gates, (*vectors, *scalars))
        user_cell = UserCell(label, gates, states, equations, vectors, scalars, tuple(values.items()), output=output)
        for attribute in ("__module__", "__doc__"):
            object.__setattr__(user_cell, attribute, getattr(equations, attribute, None))
        _check_arguments(user_cell)
        _check(user_cell)
    except RecursionError:
        raise ValueError(f"cell {label}: expressions are nested too deeply: write fewer operations") from None
    except OverflowError as error:
        raise ValueError(f"cell {label}: a number is too large for a float ({error})") from None
    except (TypeError, ValueError, AttributeError) as error:
        text = NO_ARRAY.format("NumPy's") if "ufunc" in str(error) else error
        raise type(error)(f"cell {label}: {text}") from error
    return user_cell


_KINDS = "gates", "states", "vectors", "scalars"


def _is_name(text: str) -> bool:
    is_identifier = text.isascii() and text.isidentifier() and not iskeyword(text)
    return is_identifier and not text.startswith("_") and len(text) <= _MAX_NAME


def _names(kind: str, text: str) -> tuple[str, ...]:
    """The names in a text, with spaces or commas between."""
    if not isinstance(text, str):
        raise TypeError(f"{kind} must be a string such as 'a b'; got {text!r}")
    names = tuple(text.replace(",", " ").split())
    for name in names:
        if not _is_name(name):
            raise ValueError(f"{kind} must be names, each {_IDENTIFIER}; got {name!r}")
    return names


def _check_names(gates: tuple[str, ...], states: tuple[str, ...], *parameters: tuple[str, ...]) -> None:
    """Raise an error unless there are gates and states, and each name is given once."""
    for kind, names in (("gate", gates), ("state", states)):
        if not names:
            raise ValueError(f"a cell needs at least one {kind}: write {kind}s='a b' for two of them")
        if repeated := _repeated(names):
            raise ValueError(f"two {kind}s have the name {repeated!r}")
    if RAW in gates:
        raise ValueError(f"no gate has the name {RAW!r}: x.{RAW} is the input itself")
    if len(states) > _MAX_STATES:
        raise ValueError(f"a cell has at most {_MAX_STATES} states; got {len(states)}")
    own = [name for group in parameters for name in group]
    if repeated := _repeated(own):
        raise ValueError(f"two parameters have the name {repeated!r}")
    if reserved := [name for name in own if name in _RESERVED]:
        raise ValueError(f"the name {reserved[0]!r} is that of a weight or bias that every cell has")


def _check_output(output: str | None, states: tuple[str, ...]) -> None:
    """Raise an error if an output that is not a state has an invalid name, or that of a state."""
    if output is None:
        return
    if not isinstance(output, str):
        raise TypeError(f"output must be a string such as 'y'; got {output!r}")
    if not _is_name(output):
        raise ValueError(f"output must be a name, {_IDENTIFIER}; got {output!r}")
    if output in states:
        raise ValueError(f"output {output!r} is a state: without output= the first state is the output")


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _check_arguments(user_cell: UserCell) -> None:
    """Raise an error unless the equations can be called with the arguments of a cell."""
    has_parameters = bool(user_cell.vectors or user_cell.scalars)
    arguments = ("x", "recurrent", "s", "p") if has_parameters else ("x", "recurrent", "s")
    try:
        inspect.signature(user_cell.equations).bind(*arguments)
    except TypeError:
        why = "the cell has" if has_parameters else "p is for a cell that has"
        raise TypeError(
            f"the equations must be a function of ({', '.join(arguments)}): {why} vectors or scalars"
        ) from None


def _check(user_cell: UserCell) -> None:
    """Raise an error unless the equations are those of a cell, and use all that is declared."""
    traced = user_cell.traced
    expected = f"the new states {', '.join(user_cell.states)}, in this order"
    if user_cell.output is not None:
        expected = f"the output {user_cell.output} and {expected}"
    last: object = traced.outputs[-1]
    if isinstance(last, list):
        raise TypeError(f"the equations must return {expected}, as a tuple; they return a list")
    if len(traced.outputs) != len(traced.output_names):
        got = len(traced.outputs)
        raise ValueError(f"the equations must return {expected}; they return {got} value{'s' * (got != 1)}")
    for output in traced.outputs:
        if not isinstance(output, Expr) or isinstance(output, Constant):
            raise TypeError(f"the equations must return {expected}, each an expression; got {output!r}")
    _check_products(user_cell)
    used = set(walk([*traced.outputs, *traced.operands]))
    for gate in user_cell.gates:
        if gate in traced.input_gates and PreX(gate) not in used:
            raise ValueError(f"gate {gate!r} has no effect: take it from the input, x.{gate}, or from a product")
        if gate not in traced.input_gates and PreH(gate) not in used:
            raise ValueError(f"recurrent(...).{gate} has no effect")
    if not traced.x_gates and not traced.reads_raw_input:
        raise ValueError(f"it reads nothing of the input: write x.{user_cell.gates[0]}, or x.raw for the input itself")
    if unused := [leaf.name for leaf in traced.parameters if leaf not in used]:
        raise ValueError(f"parameter {unused[0]!r} is declared, but has no effect: write p.{unused[0]}")
    try:
        differentiate(fuse_gate_sums(traced))
    except NotImplementedError as error:
        raise ValueError(f"it has no derivative: {error}") from error


def _check_products(user_cell: UserCell) -> None:
    """Raise an error unless the recurrent products let weights be stacked in the order of the gates."""
    stages = user_cell.traced.stages
    if any(stage.projects for stage in stages):
        raise ValueError("recurrent.project is for the built-in LSTM alone")
    if empty := [number for number, stage in enumerate(user_cell.traced.products, 1) if not stage.gates]:
        raise ValueError(f"no gate takes recurrent product {empty[0]}: take one as an attribute, recurrent(...).a")
    order = [gate for stage in stages for gate in stage.gates]
    order += user_cell.traced.input_gates
    if order != [*user_cell.gates]:
        raise ValueError(
            f"gates must be in the order of the recurrent products, those of the input alone last: write "
            f"gates={' '.join(order)!r}"
        )
