"""Measurements: each a ratio taken in one run against a named rival. ``python -m benchmarks`` prints the table."""
