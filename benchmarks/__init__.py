"""Comparisons with other libraries, and the pictures of a benchmark. They run in a checkout and are not installed.

``python -m benchmarks.compare``
    Times the operator against other libraries and against earlier revisions of itself.
``python -m benchmarks.compiled_loops``
    Times cells as loops in PyTorch, plain and compiled, beside the fused layer.
``python -m benchmarks.jax``
    Times the operator in JAX beside a scan, and flax's layers as they are beside the same layers accelerated.
``python -m benchmarks.keras``
    Times Keras models as they are beside the same models after accelerate.
``python -m benchmarks.peers``
    Builds the environments of those libraries.
``python -m benchmarks.figures``
    Draws the JSON of a benchmark as SVG or any other format of Matplotlib.
``python -m benchmarks.accuracy``
    Trains a character model in several formats of GEMM operands and compares its losses.
``python -m benchmarks.page``
    Writes the JSON of a benchmark as one HTML page.
"""
