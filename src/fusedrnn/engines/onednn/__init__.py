"""oneDNN as an engine, through its C API."""
