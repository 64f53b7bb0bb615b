"""Times the operator against other libraries and earlier revisions of itself, each in a process of its own."""
