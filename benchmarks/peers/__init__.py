"""The libraries to compare with, each in a virtual environment and a process of its own."""
