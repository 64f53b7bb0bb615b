"""The reference engine: the cells in NumPy, in any float type."""
