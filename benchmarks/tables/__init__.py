"""The tables of ``python -m benchmarks``, one to a file."""
