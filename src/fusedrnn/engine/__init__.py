"""Runs a sequence on the generated kernels."""
