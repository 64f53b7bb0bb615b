"""Serves one recurrent network to many clients at once, each with a sequence of its own that arrives frame by frame.

``python -m examples.stream_server test --streams 100`` starts a server and loads it. :mod:`.protocol` describes the
messages, :mod:`.server` collects frames into batches, :mod:`.load` is the load generator, and :mod:`.schedule` a load
test without sockets.
"""
