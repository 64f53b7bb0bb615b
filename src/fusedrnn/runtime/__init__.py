"""Threads and memory; knows nothing of recurrent networks."""
