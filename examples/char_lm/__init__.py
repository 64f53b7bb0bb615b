"""Trains a character language model on English text twice: with torch.nn, then with the fused layers instead.

``python -m examples.char_lm --plot loss.png`` runs it. Only ``model`` and ``training`` import PyTorch.
"""
