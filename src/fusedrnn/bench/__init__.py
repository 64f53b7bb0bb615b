"""Times the operator and the modules against other ways to run the same network, after a check of every result."""
