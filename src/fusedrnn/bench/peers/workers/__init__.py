"""Scripts that the peers' own Pythons run: they need the peer and NumPy, and never import fusedrnn.

``protocol`` is the program; it loads one of the ``with_`` modules, whose ``prepare(problem)`` returns a call to be
timed and a function that turns what the call returned into arrays by name.
"""
