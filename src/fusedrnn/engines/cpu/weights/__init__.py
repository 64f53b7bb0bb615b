"""Packed weights: their layout, the kernel that packs them, their cache."""
