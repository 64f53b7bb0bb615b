"""The libraries that we are compared with, each in a virtual environment and a process of its own."""
