"""From symbols to machine code; the only package that imports llvmlite."""
