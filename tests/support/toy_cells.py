"""The default variant of each cell, and cells that only tests have."""

from fusedrnn.cell.cells import FAMILIES, Cell, make_cell
from fusedrnn.cell.primitives import sigmoid, tanh


def reset_before_gru(x, recurrent, s):
    """Cho's GRU: the recurrent product of n multiplies r·h, which needs a second stage."""
    h = recurrent(s.h)
    r = sigmoid(x.r + h.r)
    z = sigmoid(x.z + h.z)
    n = tanh(x.n + recurrent(r * s.h).n)
    return n + z * (s.h - n)


CELLS = {mode: make_cell(family.default) for mode, family in FAMILIES.items()}
TWO_STAGES = Cell("reset_before_gru", tuple("rzn"), ("h",), reset_before_gru)
