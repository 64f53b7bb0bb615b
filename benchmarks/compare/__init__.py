"""Times the operator against other libraries and earlier revisions of itself, each in its own process."""
