"""The CPU engine: plans a call, packs weights, launches generated kernels."""
