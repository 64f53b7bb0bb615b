"""Comparisons with other libraries, and figures of a benchmark. They run in a checkout and are not installed.

``python -m benchmarks.compare``
    Times the operator against other libraries and against earlier revisions of itself.
``python -m benchmarks.compiled_loops``
    Compares the fused layer with cells as loops in PyTorch, plain and compiled.
``python -m benchmarks.jax``
    Compares the operator in JAX with a scan, and flax's layers with the same layers accelerated.
``python -m benchmarks.keras``
    Compares Keras models with the same models after accelerate.
``python -m benchmarks.peers``
    Builds the environments of the libraries for ``benchmarks.compare``.
``python -m benchmarks.figures``
    Draws the JSON of a benchmark as SVG or any other format of Matplotlib.
``python -m benchmarks.accuracy``
    Trains a character model in several formats of GEMM operands and compares its losses.
``python -m benchmarks.page``
    Writes the JSON of a benchmark as one HTML page.
"""

from examples.missing_packages import say_what_is_missing

say_what_is_missing()
