"""Kernels: everything that emits a loop of the network."""
