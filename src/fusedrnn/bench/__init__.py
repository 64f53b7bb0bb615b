"""Benchmarks: named workloads, checked before they are timed, as tables, JSON and plots."""
