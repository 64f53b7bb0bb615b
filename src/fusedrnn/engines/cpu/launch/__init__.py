"""Launch: how arguments reach machine code."""
