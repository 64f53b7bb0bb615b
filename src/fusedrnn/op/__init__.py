"""The operator that callers see: checks, gradient buffers, reserves, streams."""
