"""The compiler: the only package that imports llvmlite."""
