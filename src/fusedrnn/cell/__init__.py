"""The maths of the cells: equations, expressions, derivatives; no NumPy, no LLVM."""
