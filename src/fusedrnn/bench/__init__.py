"""Times the operator and the modules against other ways to run the same network, and checks every result first."""
