"""A character language model trained on real text twice: with torch.nn, and with the fused layers in its place.

Only :mod:`fusedrnn.demo.model` and what imports it need PyTorch.
"""
