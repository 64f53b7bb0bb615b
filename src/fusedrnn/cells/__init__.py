"""Cells of the literature apart from LSTM and GRU, each written in the language of :mod:`fusedrnn.cell`.

Each is the mode of a spec: ``RNNSpec(cells.janet, input_size=40, hidden_size=128)``. Equations are those of the papers;
the spec determines whether products have a bias.
"""

from fusedrnn.cells import elementwise, gated, noisy, normalized, products
from fusedrnn.cells.elementwise import *  # noqa: F403
from fusedrnn.cells.gated import *  # noqa: F403
from fusedrnn.cells.noisy import *  # noqa: F403
from fusedrnn.cells.normalized import *  # noqa: F403
from fusedrnn.cells.products import *  # noqa: F403

__all__ = [*gated.__all__, *products.__all__, *elementwise.__all__, *normalized.__all__, *noisy.__all__]
