"""Serves one recurrent network to many clients at once. Each has its own sequence, which arrives frame by frame.

``python -m examples.stream_server test --streams 100`` starts a server and loads it. :mod:`.protocol` describes the
messages, :mod:`.server` collects frames into batches, :mod:`.load` is the load generator, and :mod:`.schedule` is a
load test without sockets.
"""
