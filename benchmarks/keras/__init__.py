"""``python -m benchmarks.keras``: Keras's own layers beside the same models after ``fusedrnn.keras.accelerate``."""
