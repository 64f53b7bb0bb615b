"""Figures of a benchmark, drawn from its JSON."""
