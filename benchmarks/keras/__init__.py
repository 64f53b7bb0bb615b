"""``python -m benchmarks.keras``: Keras's own layers, compared with the same models after accelerate."""
