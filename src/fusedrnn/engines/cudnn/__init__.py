"""The cuDNN engine, by way of PyTorch."""
