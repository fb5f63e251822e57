"""Measurements of this package beside its peers, each run by ``python -m benchmarks.<name>``."""
