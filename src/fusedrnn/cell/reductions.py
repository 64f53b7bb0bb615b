"""Means and variances over the units of a row: in the language of cells, and as stages of a traced cell.

The functions of the language build operations with the names in :data:`NAMES`. No arithmetic evaluates these: tracing
replaces them by leaves and adds the stages that compute the leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusedrnn.cell.expr import Constant, Expr, Operation, as_expr
from fusedrnn.cell.leaves import MeanCotangent, RowMean, RowVariance, VarianceCotangent
from fusedrnn.cell.primitives import rsqrt
from fusedrnn.cell.traversal import substitute, walk
from fusedrnn.scalars import as_number

NAMES = "row_mean", "row_variance"
"""The operations of :func:`mean` and :func:`variance`."""


def mean(*values: Expr) -> Expr:
    """The mean over all units of a row; with several expressions, over all units of all expressions together."""
    return _reduction(NAMES[0], values)


def variance(*values: Expr) -> Expr:
    """The biased variance over all units of a row; with several expressions, over all units of all of them together."""
    return _reduction(NAMES[1], values)


def layer_norm(*values: Expr, epsilon: float = 1e-5) -> Expr | tuple[Expr, ...]:
    """Each expression minus the mean, divided by the standard deviation: over all units of all expressions together.

    One expression gives one expression, several give a tuple. This is torch.nn.functional.layer_norm without weight and
    bias; a cell declares these as vectors: ``p.gamma * layer_norm(e) + p.beta``.
    """
    epsilon = as_number("epsilon", epsilon)
    scale = rsqrt(variance(*values) + epsilon)
    normalized = tuple((value - mean(*values)) * scale for value in values)
    return normalized[0] if len(values) == 1 else normalized


def _reduction(name: str, values: Sequence[Expr]) -> Expr:
    if not values:
        raise TypeError(f"{name.removeprefix('row_')} takes at least one expression; got none")
    exprs = tuple(map(as_expr, values))
    for value in exprs:
        if isinstance(value, Constant):
            raise TypeError(f"{name.removeprefix('row_')} takes expressions; got {value.value!r}")
    return Operation(name, exprs)


@dataclass(frozen=True)
class Reduction:
    """Expressions that are reduced together, and the leaves of the results that the cell uses."""

    values: tuple[Expr, ...]
    mean: RowMean
    variance: RowVariance | None

    @property
    def leaves(self) -> tuple[RowMean | RowVariance, ...]:
        """The mean, and the variance if it is used."""
        return (self.mean,) if self.variance is None else (self.mean, self.variance)

    @property
    def cotangents(self) -> tuple[MeanCotangent | VarianceCotangent, ...]:
        """The leaves of the gradients of :attr:`leaves`: each a sum over units, divided by the number of values."""
        mean, variance = self.mean, self.variance
        of_mean = MeanCotangent(mean.stage, mean.index)
        return (of_mean,) if variance is None else (of_mean, VarianceCotangent(mean.stage, mean.index))

    def value_cotangents(self) -> tuple[Expr, ...]:
        """The gradient of each expression, without what comes through other uses of it."""
        of_mean, *of_variance = self.cotangents
        if not of_variance:
            return (of_mean,) * len(self.values)
        return tuple(of_mean + 2.0 * of_variance[0] * (value - self.mean) for value in self.values)


def reductions_in(roots: Sequence[Expr]) -> list[tuple[Expr, ...]]:
    """What the expressions reduce, each once, inner reductions first."""
    return list(dict.fromkeys(node.args for node in walk(roots) if isinstance(node, Operation) and node.op in NAMES))


def with_leaves(roots: Sequence[Expr], values: tuple[Expr, ...], stage: int, index: int) -> list[Expr]:
    """The expressions with the leaves of a stage in place of one of the reductions."""
    leaves: dict[Expr, Expr] = {
        Operation(NAMES[0], values): RowMean(stage, index), Operation(NAMES[1], values): RowVariance(stage, index),
    }  # fmt: skip
    return substitute(roots, leaves.get)
