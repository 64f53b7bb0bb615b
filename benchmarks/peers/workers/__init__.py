"""Scripts that run in the peers' own environments. They need the peer and NumPy, and do not import fusedrnn.

``protocol`` is the program. It loads one of the ``with_`` modules, whose ``prepare(work)`` returns the call to time and
a function that converts the result of the call to arrays by name.
"""
