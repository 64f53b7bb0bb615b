"""The operator that callers see: validation, gradients, reserve, streams."""
