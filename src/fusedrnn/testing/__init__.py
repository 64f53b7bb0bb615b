"""Named workloads and tolerances, for tests and benchmarks of any engine."""
